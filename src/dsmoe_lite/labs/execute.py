"""One chapter, run with parameters: checked before any kernel starts, written whole into a notebook of its own."""

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError, RunError, require
from dsmoe_lite.common.files import write_text
from dsmoe_lite.labs.parameters import Parameter, read_schema
from dsmoe_lite.labs.results import read_result

NAME_LENGTH = 60  # characters of a file name that spell out parameters


@dataclass(frozen=True)
class Run:
    """An executed chapter: where it lies, what it reported, and its seconds (`cpu_s` over all its processes)."""

    notebook: Path
    parameters: dict[str, Any]
    result: dict[str, Any]
    wall_s: float
    cpu_s: float


def chapter_schema(chapter: Path) -> dict[str, Parameter]:
    """The parameters of the notebook at `chapter`; one without a parameters cell raises InputError."""
    import nbformat

    try:
        cells = nbformat.read(chapter, as_version=4).cells
    except (ValueError, nbformat.ValidationError):
        raise InputError(f"{chapter} is not a notebook any more: restore it from the repository") from None
    for cell in cells:
        if "parameters" in cell.metadata.get("tags", []):
            return read_schema(cell.source)
    raise InputError(f"{chapter.name} has no cell tagged parameters")


def run_chapter(chapter: Path, parameters: Mapping[str, Any], out: Path | None = None) -> Run:
    """Execute `chapter` with checked `parameters` into the folder or .ipynb file `out` (by default runs/).

    Nothing is written until the chapter has ended. One that fails is kept beside as *.failed.ipynb and raises RunError;
    bad input found by the chapter itself raises InputError and keeps nothing.
    """
    target = _target(chapter, parameters, out or paths.RUNS)
    start, cpu = time.perf_counter(), _children_cpu()
    with tempfile.TemporaryDirectory(prefix="dsmoe-run-") as folder:
        aside = Path(folder) / "executed.ipynb"
        failure = _execute(chapter, parameters, aside)
        if failure is None:
            write_text(target, _unpaired(aside, chapter))
        else:
            kept = target.with_suffix(".failed.ipynb")
            write_text(kept, _unpaired(aside, chapter))
            raise RunError(f"{chapter.stem}: {failure}; kept as {kept}")
    wall_s, cpu_s = time.perf_counter() - start, _children_cpu() - cpu
    return Run(target, dict(parameters), read_result(target), wall_s, cpu_s)


def _execute(chapter: Path, parameters: Mapping[str, Any], aside: Path) -> str | None:
    """Run papermill into `aside`; return what failed, in one line."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    from dsmoe_lite.labs import jupyter_kernel

    source = aside.with_name("chapter.ipynb")  # papermill would format braces in the reader's own path
    source.write_bytes(chapter.read_bytes())
    try:
        papermill.execute_notebook(
            source,
            aside,
            dict(parameters),
            kernel_name=jupyter_kernel.NAME,
            language="python",
            cwd=aside.parent,
            progress_bar={"desc": chapter.stem, "leave": False, "disable": None},
            kernel_manager_class=jupyter_kernel.OwnKernelManager,
        )
    except papermill.PapermillExecutionError as error:
        if error.ename == InputError.__name__:
            raise InputError(f"{chapter.stem}: {error.evalue}") from None
        return f"cell In [{error.exec_count}] stopped with {error.ename}: {_first_line(error.evalue)}"
    except DeadKernelError:
        return "the kernel died (out of memory?)"
    return None


def _target(chapter: Path, parameters: Mapping[str, Any], out: Path) -> Path:
    out = out.expanduser().resolve()
    if out.suffix == ".ipynb":
        target = out
    else:
        spelled = "".join(f"-{re.sub('[^A-Za-z0-9.+=_-]+', '_', f'{n}={v}')}" for n, v in sorted(parameters.items()))
        stamp = hashlib.sha256(json.dumps(dict(parameters), sort_keys=True).encode()).hexdigest()[:8]
        target = out / f"{chapter.stem}{spelled[:NAME_LENGTH]}-{stamp}.ipynb"
    require(paths.NOTEBOOKS.resolve() not in target.parents, "out", str(out), "a chapter is never run in place")
    above = next(folder for folder in target.parents if folder.exists())
    require(above.is_dir() and os.access(above, os.W_OK), "out", str(out), f"{above} is not a folder you can write to")
    return target


def _unpaired(executed: Path, chapter: Path) -> str:
    """The executed notebook without what ties it to its source file and to the temporary folder."""
    import nbformat

    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata.pop("jupytext", None)
    notebook.metadata.papermill.update(input_path=chapter.name, output_path="")
    return nbformat.writes(notebook) + "\n"


def _children_cpu() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]
