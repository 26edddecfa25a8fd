"""CUDA C++ in a chapter: excerpts that are the source, and cells that do without g++."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.kernels.build import SOURCES
from dsmoe_lite.labs.cuda_source import multiply_with, run_or_show_recorded, show_source


def test_an_excerpt_is_the_source_with_its_comment() -> None:
    shown = show_source("gemm_hopper.cuh", "void produce(").data
    code = shown.removeprefix("```cpp\n").removesuffix("\n```\n*kernels/gemm_hopper.cuh*")
    assert code in (SOURCES / "gemm_hopper.cuh").read_text(encoding="utf-8")
    assert code.startswith("// The thread that has all tiles copied")
    assert code.endswith("\n}")


def test_an_excerpt_of_python_ends_at_the_empty_line() -> None:
    shown = show_source("triton_kernels.py", "def _add_product(").data
    code = shown.removeprefix("```python\n").removesuffix("\n```\n*kernels/triton_kernels.py*")
    assert code + "\n\n" in (SOURCES / "triton_kernels.py").read_text(encoding="utf-8")
    assert code.startswith("@triton.jit\ndef _add_product(")
    assert code.splitlines()[-1].startswith("    return ")


def test_a_product_by_a_changed_kernel() -> None:
    text = (SOURCES / "gemm_mma.cuh").read_text(encoding="utf-8")
    rows, matrix = torch.randn(70, 24).bfloat16(), torch.randn(40, 24).bfloat16()
    wanted = rows.double() @ matrix.double().T
    torch.testing.assert_close(multiply_with(text, rows, matrix).double(), wanted, atol=1e-2, rtol=1e-2)
    wrong = text.replace("total = FORM == Form::SUM ? 2 * steps : steps", "total = 0")
    assert wrong != text
    assert not multiply_with(wrong, rows, matrix).any()
    with pytest.raises(RunError, match="no_such_name"):
        multiply_with(text + "int broken = no_such_name;\n", rows, matrix)


@pytest.mark.parametrize("start", ["no such line", "__device__"])
def test_an_excerpt_is_named_by_one_line(start: str) -> None:
    lines = (SOURCES / "grouped.cuh").read_text(encoding="utf-8").splitlines()
    found = sum(start in line for line in lines)
    with pytest.raises(InputError, match=f"start = '{start}': must be in one line of grouped.cuh, not in {found}$"):
        show_source("grouped.cuh", start)


def test_without_gxx_the_recorded_output_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def mine() -> None:
        raise AssertionError("must not run")

    outputs = [{"name": "stdout", "output_type": "stream", "text": ["one\n", "two\n"]}]
    cells = [
        {"source": ["print('not this')"], "outputs": [{"text": ["no"]}]},
        {"source": ["def mine(): ...\n", "run_or_show_recorded(mine, chapter)"], "outputs": outputs},
    ]
    notebook = tmp_path / "x.ipynb"
    notebook.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    monkeypatch.setenv("PATH", str(tmp_path))
    run_or_show_recorded(mine, notebook)
    said = capsys.readouterr()
    assert said.out == "one\ntwo\n"
    assert said.err == "g++ not found (apt install g++): this is the recorded output\n"


def test_the_chapter_runs_without_gxx(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dsmoe_lite", "run", "10", "-p", "profile=smoke", "--out", str(tmp_path)]
    path = str(Path(sys.executable).parent)  # no compiler in it
    done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (notebook,) = tmp_path.glob("*.ipynb")
    text = notebook.read_text(encoding="utf-8")
    assert "g++ not found (apt install g++): this is the recorded output" in text
    assert "not checked: g++ not found (apt install g++)" in text
