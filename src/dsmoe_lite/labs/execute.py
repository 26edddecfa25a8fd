"""Run one chapter with parameters: check them before a kernel starts, then write the executed notebook atomically."""

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

NAME_LENGTH = 60  # characters of the parameters in a file name


@dataclass(frozen=True)
class ExecutedChapter:
    """An executed chapter: its notebook, the results that it reported, and its seconds (`cpu_s`: all processes)."""

    notebook: Path
    parameters: dict[str, Any]
    result: dict[str, Any]
    wall_s: float
    cpu_s: float


def chapter_schema(chapter: Path) -> dict[str, Parameter]:
    """The parameters of the notebook `chapter`. Raises InputError if no cell is tagged `parameters`."""
    import nbformat

    try:
        cells = nbformat.read(chapter, as_version=4).cells
    except (ValueError, nbformat.ValidationError):
        raise InputError(f"{chapter} is not a notebook any more: restore it from the repository") from None
    for cell in cells:
        if "parameters" in cell.metadata.get("tags", []):
            return read_schema(cell.source)
    raise InputError(f"{chapter.name} has no cell tagged parameters")


def run_chapter(chapter: Path, parameters: Mapping[str, Any], out: Path | None = None) -> ExecutedChapter:
    """Execute `chapter` with checked `parameters` and write it to `out`, a folder or an .ipynb file (default: runs/).

    Nothing is written before the chapter has ended. Raises RunError if it fails, with the notebook saved as
    *.failed.ipynb, and InputError, with nothing saved, for bad input that the chapter itself rejects.
    """
    target = _target(chapter, parameters, out or paths.RUNS)
    start, cpu = time.perf_counter(), _children_cpu()
    with tempfile.TemporaryDirectory(prefix="dsmoe-run-") as folder:
        executed = Path(folder) / "executed.ipynb"
        failure = _execute(chapter, parameters, executed)
        if failure is None:
            write_text(target, _without_pairing(executed, chapter))
        else:
            failed = target.with_suffix(".failed.ipynb")
            write_text(failed, _without_pairing(executed, chapter))
            raise RunError(f"{chapter.stem}: {failure}; kept as {failed}")
    wall_s, cpu_s = time.perf_counter() - start, _children_cpu() - cpu
    return ExecutedChapter(target, dict(parameters), read_result(target), wall_s, cpu_s)


def _execute(chapter: Path, parameters: Mapping[str, Any], executed: Path) -> str | None:
    """Write the executed notebook to `executed`; return None, or the failure in one line."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    from dsmoe_lite.labs import jupyter_kernel

    source = executed.with_name("chapter.ipynb")  # papermill would format braces in the reader's path
    source.write_bytes(chapter.read_bytes())
    try:
        papermill.execute_notebook(
            source,
            executed,
            dict(parameters),
            kernel_name=jupyter_kernel.NAME,
            language="python",
            cwd=executed.parent,
            progress_bar={"desc": chapter.stem, "leave": False, "disable": None},
            kernel_manager_class=jupyter_kernel.SameInterpreterKernelManager,
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
        values = "".join(f"-{re.sub('[^A-Za-z0-9.+=_-]+', '_', f'{n}={v}')}" for n, v in sorted(parameters.items()))
        digest = hashlib.sha256(json.dumps(dict(parameters), sort_keys=True).encode()).hexdigest()[:8]
        target = out / f"{chapter.stem}{values[:NAME_LENGTH]}-{digest}.ipynb"
    require(paths.NOTEBOOKS.resolve() not in target.parents, "out", str(out), "a chapter is never run in place")
    parent = next(folder for folder in target.parents if folder.exists())
    writable = parent.is_dir() and os.access(parent, os.W_OK)
    require(writable, "out", str(out), f"{parent} is not a folder you can write to")
    return target


def _without_pairing(executed: Path, chapter: Path) -> str:
    """The executed notebook without its link to the .py source and without the temporary folder's paths."""
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
