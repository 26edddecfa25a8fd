"""What `run_chapter` leaves in a notebook's metadata, and the results in a folder that it has written."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmoe_lite.labs.chapters import chapter_schema
from dsmoe_lite.labs.results import read_result

DIGEST = "dsmoe_digest"  # key in the metadata: the hash of the cells, which shows whether a person edited them
RECORD = "dsmoe_run"  # key in the metadata: what was run, on what, and what it took
FAILED = ".failed.ipynb"  # end of the name of a run that failed


@dataclass(frozen=True)
class Executed:
    """A result in a folder. parameters: all of them, defaults too. source: the hash of the notebook that was run.

    record: {wall_s, cpu_s, peak_mb (None if unknown), versions}. edited: whether a person has changed the notebook.
    """

    path: Path
    chapter: str
    source: str
    parameters: dict[str, Any]
    result: dict[str, Any]
    record: dict[str, Any]
    edited: bool


def read_executed(folder: Path) -> Iterator[Executed]:
    """The results of `run_chapter` in a folder, by name; other files are passed over."""
    import nbformat

    for path in sorted(folder.glob("*.ipynb")):
        try:
            notebook = nbformat.read(path, as_version=4)
            record = dict(notebook.metadata[RECORD])
            chapter, source, values = (record.pop(name) for name in ("chapter", "source", "parameters"))
            parameters = {name: values[name] for name in chapter_schema(path)}  # JSON has them by name
        except (OSError, ValueError, AttributeError, KeyError, TypeError, nbformat.ValidationError):
            continue
        if not path.name.endswith(FAILED):
            edited = notebook.metadata.get(DIGEST) != cells_digest(notebook)
            yield Executed(path, chapter, source, parameters, read_result(path), record, edited)


def all_parameters(chapter: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a run with the defaults of those that were not given."""
    return {name: one.default for name, one in chapter_schema(chapter).items()} | dict(parameters)


def source_digest(chapter: Path) -> str:
    """The hash of a notebook's cells, without outputs."""
    import nbformat

    cells = [[cell.cell_type, cell.source] for cell in nbformat.read(chapter, as_version=4).cells]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()[:16]


def cells_digest(notebook: Any) -> str:
    """The hash of a result's cells and outputs."""
    cells = [[cell.cell_type, cell.source, cell.get("outputs", [])] for cell in notebook.cells]
    return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).hexdigest()[:16]
