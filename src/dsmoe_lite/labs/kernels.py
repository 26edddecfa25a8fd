"""CUDA C++ in a chapter: an excerpt of the package's source, and a cell that does without g++."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsmoe_lite.errors import InputError
from dsmoe_lite.kernels.build import SOURCES


def show_source(file: str, start: str) -> Any:
    """The function or struct of kernels/`file` whose line holds `start`, with the comment above it, as a code block.

    InputError where no line holds it, or several do.
    """
    from IPython.display import Markdown

    lines = (SOURCES / file).read_text(encoding="utf-8").splitlines()
    found = [number for number, line in enumerate(lines) if start in line]
    if len(found) != 1:
        raise InputError(f"start = {start!r}: must be in one line of {file}, not in {len(found)}")
    first = found[0]
    while first and lines[first - 1].startswith(("//", "template", "__global__", "__device__")):
        first -= 1
    last = next(number for number in range(found[0], len(lines)) if lines[number] in ("}", "};"))
    return Markdown("\n".join(["```cpp", *lines[first : last + 1], "```", f"*kernels/{file}*"]))


def or_recorded(run: Callable[[], None], notebook: Path) -> None:
    """Run `run`, which compiles kernels and prints; without g++ print what the notebook's stored output has instead.

    The cell is found by its call, `or_recorded(<name of run>`.
    """
    if shutil.which("g++") is not None:
        run()
        return
    print("g++ not found (apt install g++): this is the recorded output", file=sys.stderr)
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    mine = [cell for cell in cells if f"or_recorded({run.__name__}," in "".join(cell["source"])]
    for output in (output for cell in mine for output in cell["outputs"]):
        print("".join(output.get("text", [])), end="")
