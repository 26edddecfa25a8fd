"""CUDA C++ in a chapter: excerpts of the package's source, and cells that also work without g++."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.kernels.build import SOURCES, cpu_library_of
from dsmoe_lite.kernels.launch import launch_on_cpu

LAUNCHER = """
extern "C" int run(const bf16* a, const bf16* b, const int* ends, int n, int k, bf16* out) {
  Sizes s{ends, 1, ends[0], 0, n, k};
  dim3 grid{unsigned(most_tiles<Layout::NT, mma_rung::BM, mma_rung::BN>(s))};
  return launch(mma_rung::gemm<Layout::NT, Form::ONE, Store<bf16>>, grid, mma_rung::THREADS,
                sizeof(mma_rung::Shared), nullptr, Operands<bf16>{{a}, {b}}, s, Store<bf16>{out});
}
"""  # one expert


def show_source(file: str, start: str) -> Any:
    """Show a function or struct of kernels/`file` as a code block, with the comment above it.

    start: text of its first line. Raises InputError unless exactly one line contains it.
    """
    from IPython.display import Markdown

    lines = (SOURCES / file).read_text(encoding="utf-8").splitlines()
    matches = [number for number, line in enumerate(lines) if start in line]
    if len(matches) != 1:
        raise InputError(f"start = {start!r}: must be in one line of {file}, not in {len(matches)}")
    first, python = matches[0], file.endswith(".py")
    while first and lines[first - 1].startswith(("//", "template", "__global__", "__device__", "@")):
        first -= 1
    if python:
        empty = (number for number in range(matches[0], len(lines)) if not lines[number])
        last = next(empty, len(lines)) - 1
    else:
        last = next(number for number in range(matches[0], len(lines)) if lines[number] in ("}", "};"))
    block = ["```python" if python else "```cpp", *lines[first : last + 1], "```", f"*kernels/{file}*"]
    return Markdown("\n".join(block))


def multiply_with(text: str, rows: Tensor, matrix: Tensor) -> Tensor:
    """Multiply rows (N, k) by matrix (n, k)^T on the CPU with the kernel in `text`, a modified copy of gemm_mma.cuh.

    All tensors are bfloat16. Raises RunError if the source does not compile or the launch fails.
    """
    out = rows.new_empty(len(rows), len(matrix))
    ends = torch.tensor([len(rows)], dtype=torch.int32)
    launch_on_cpu(cpu_library_of(text + LAUNCHER), "run", rows, matrix, ends, *matrix.shape, out)
    return out


def run_or_show_recorded(run: Callable[[], None], notebook: Path) -> None:
    """Call `run`, which compiles kernels and prints; without g++, print the output that `notebook` has stored.

    The cell is found by its call, `run_or_show_recorded(<name of run>,`.
    """
    if shutil.which("g++") is not None:
        run()
        return
    print("g++ not found (apt install g++): this is the recorded output", file=sys.stderr)
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    calls = [cell for cell in cells if f"run_or_show_recorded({run.__name__}," in "".join(cell["source"])]
    for output in (output for cell in calls for output in cell["outputs"]):
        print("".join(output.get("text", [])), end="")
