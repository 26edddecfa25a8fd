"""CUDA C++ in a chapter: excerpts that are the source, and cells that do without g++."""

import json
from pathlib import Path

import pytest

from dsmoe_lite.errors import InputError
from dsmoe_lite.kernels.build import SOURCES
from dsmoe_lite.labs.kernels import or_recorded, show_source


def test_an_excerpt_is_the_source_with_its_comment() -> None:
    shown = show_source("gemm_hopper.cuh", "void produce(").data
    code = shown.removeprefix("```cpp\n").removesuffix("\n```\n*kernels/gemm_hopper.cuh*")
    assert code in (SOURCES / "gemm_hopper.cuh").read_text(encoding="utf-8")
    assert code.startswith("// The thread that has all tiles copied")
    assert code.endswith("\n}")


@pytest.mark.parametrize(("start", "lines"), [("no such line", 0), ("__device__", 8)])
def test_an_excerpt_is_named_by_one_line(start: str, lines: int) -> None:
    with pytest.raises(
        InputError, match=f"start = '{start}': must be in one line of grouped.cuh, not in [1-9]?{lines}"
    ):
        show_source("grouped.cuh", start)


def test_without_gxx_the_recorded_output_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def mine() -> None:
        raise AssertionError("must not run")

    outputs = [{"name": "stdout", "output_type": "stream", "text": ["one\n", "two\n"]}]
    cells = [
        {"source": ["print('not this')"], "outputs": [{"text": ["no"]}]},
        {"source": ["def mine(): ...\n", "or_recorded(mine, chapter)"], "outputs": outputs},
    ]
    notebook = tmp_path / "x.ipynb"
    notebook.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    monkeypatch.setenv("PATH", str(tmp_path))
    or_recorded(mine, notebook)
    said = capsys.readouterr()
    assert said.out == "one\ntwo\n"
    assert said.err == "g++ not found (apt install g++): this is the recorded output\n"
