"""Run one chapter with parameters: check them before a kernel starts, then write the executed notebook atomically."""

import hashlib
import json
import logging
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from dsmoe_lite import __version__
from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError, RunError, require
from dsmoe_lite.common.files import write_text
from dsmoe_lite.common.machine import require_profile
from dsmoe_lite.labs.executed import DIGEST, RECORD, cells_digest, parameter_defaults, source_digest
from dsmoe_lite.labs.results import read_result
from dsmoe_lite.training.provenance import commit

NAME_LENGTH = 60  # characters of the parameters in a file name


@dataclass(frozen=True)
class ExecutedChapter:
    """An executed chapter: its notebook, the results that it reported, and its seconds (`cpu_s`: all processes).

    kept: an earlier result of the same command that a person has edited, so that `notebook` has a new name.
    """

    notebook: Path
    parameters: dict[str, Any]
    result: dict[str, Any]
    wall_s: float
    cpu_s: float
    kept: Path | None = None


def run_chapter(chapter: Path, parameters: Mapping[str, Any], out: Path | None = None) -> ExecutedChapter:
    """Execute `chapter` with checked `parameters` and write it to `out`, a folder or an .ipynb file (default: runs/).

    Nothing is written before the chapter has ended, and what a person has edited is never replaced: in a folder the
    result gets a new name. Raises RunError if the chapter fails, with the notebook saved as *.failed.ipynb. Raises
    InputError, with nothing saved, for profile gpu without a GPU, for a file `out` that is not an unedited result, and
    for bad input that the chapter itself rejects.
    """
    require_profile(parameters.get("profile", ""))
    target = _target(chapter, parameters, out or paths.RUNS)
    source = chapter.read_bytes()  # what is recorded is what is run, if somebody edits the chapter meanwhile
    record: dict[str, Any] = {
        "chapter": chapter.stem,
        "source": source_digest(source),
        "parameters": parameter_defaults(chapter) | dict(parameters),
        "versions": _versions(),
    }
    start, cpu, memory = time.perf_counter(), _children_cpu(), _children_memory()
    with tempfile.TemporaryDirectory(prefix="dsmoe-run-") as folder:
        executed = Path(folder) / "executed.ipynb"
        failure = _execute(chapter.stem, source, parameters, executed)
        wall_s, cpu_s, peak = time.perf_counter() - start, _children_cpu() - cpu, _children_memory()
        record |= {
            "wall_s": round(wall_s, 1),
            "cpu_s": round(cpu_s, 1),
            "peak_mb": round(peak) if peak is not None and peak > (memory or 0.0) else None,  # else an earlier run's
            "failure": failure,
        }
        wanted = target if failure is None else target.with_suffix(".failed.ipynb")
        notebook = _free_name(wanted)
        write_text(notebook, _finished(executed, chapter, record))
    if failure is not None:
        raise RunError(f"{chapter.stem}: {failure}; kept as {notebook}")
    kept = None if notebook == wanted else wanted
    return ExecutedChapter(notebook, dict(parameters), read_result(notebook), wall_s, cpu_s, kept)


def _execute(name: str, chapter: bytes, parameters: Mapping[str, Any], executed: Path) -> str | None:
    """Run the notebook `chapter` and write it to `executed`; return None, or the failure in one line."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    from dsmoe_lite.labs import jupyter_kernel

    source = executed.with_name("chapter.ipynb")  # papermill would format braces in the reader's path
    source.write_bytes(chapter)
    logging.getLogger("papermill").setLevel(
        logging.ERROR
    )  # it warns of defaults that it cannot parse, as text with "="
    try:
        papermill.execute_notebook(
            source,
            executed,
            dict(parameters),
            kernel_name=jupyter_kernel.NAME,
            language="python",
            cwd=executed.parent,
            progress_bar={"desc": name, "leave": False, "disable": None},
            kernel_manager_class=jupyter_kernel.SameInterpreterKernelManager,
        )
    except papermill.PapermillExecutionError as error:
        if error.ename == InputError.__name__:
            raise InputError(f"{name}: {error.evalue}") from None
        return f"cell In [{error.exec_count}] stopped with {error.ename}: {_first_line(error.evalue)}"
    except DeadKernelError:
        return "the kernel died (out of memory?)"
    return None


def _target(chapter: Path, parameters: Mapping[str, Any], out: Path) -> Path:
    out = out.expanduser().resolve()
    if out.suffix == ".ipynb":
        target = out
        edited = "is no unedited result of `dsmoe run`; name another file, or move this one away"
        require(_may_replace(target), "out", str(out), edited)
    else:
        values = "".join(f"-{re.sub('[^A-Za-z0-9.+=_-]+', '_', f'{n}={v}')}" for n, v in sorted(parameters.items()))
        given: Any = dict(parameters)
        if chapter.parent != paths.NOTEBOOKS:  # a notebook of the reader's, perhaps named as a chapter
            given = [given, str(chapter)]
        digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:8]
        target = out / f"{chapter.stem}{values[:NAME_LENGTH]}-{digest}.ipynb"
    require_results_folder(target.parent)
    return target


def require_results_folder(folder: Path) -> None:
    """Raise InputError if results cannot, or must not, be written into `folder`, an absolute path."""
    inside = paths.NOTEBOOKS.resolve() in (folder, *folder.parents)
    require(not inside, "out", str(folder), "a chapter is never run in place")
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK)
    require(writable, "out", str(folder), f"{existing} is not a folder you can write to")


def _free_name(target: Path) -> Path:
    """`target`, or the first of target-2, target-3, ... that is free or may be replaced."""
    names = (target if n == 1 else target.with_name(f"{target.stem}-{n}.ipynb") for n in count(1))
    return next(name for name in names if _may_replace(name))


def _may_replace(target: Path) -> bool:
    """Whether there is no such file, or a result as it was written: no cell or output was edited since."""
    import nbformat

    if not target.exists():
        return True
    try:
        notebook = nbformat.read(target, as_version=4)
        return notebook.metadata.get(DIGEST) == cells_digest(notebook)
    except (OSError, ValueError, AttributeError, nbformat.ValidationError):
        return False


def _finished(executed: Path, chapter: Path, record: Mapping[str, Any]) -> str:
    """The executed notebook without its .py source and the temporary folder's paths, with its record and digest."""
    import nbformat

    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata.pop("jupytext", None)
    notebook.metadata.papermill.update(input_path=chapter.name, output_path="")
    notebook.metadata[RECORD] = dict(record)
    notebook.metadata[DIGEST] = cells_digest(notebook)
    return nbformat.writes(notebook) + "\n"


def _children_cpu() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _children_memory() -> float | None:
    """The most memory that a child process has taken so far, in MB; None where the system does not report it."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e6


def _versions() -> dict[str, Any]:
    names = {"dsmoe_lite": __version__, "commit": commit(), "python": platform.python_version()}
    return names | {"torch": version("torch")}


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]
