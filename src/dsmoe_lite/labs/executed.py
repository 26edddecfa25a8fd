"""What `run_chapter` leaves in a notebook's metadata, and the results in a folder that it has written."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.labs.chapters import chapter_schema
from dsmoe_lite.labs.results import read_result

DIGEST = "dsmoe_digest"  # key in the metadata: the hash of the cells, which shows whether a person edited them
RECORD = "dsmoe_run"  # key in the metadata: what was run, on what, and what it took


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
    """The results of `run_chapter` in a folder, by name; failed runs and other notebooks are passed over.

    Raises InputError for a notebook that cannot be read.
    """
    import nbformat

    for path in sorted(folder.glob("*.ipynb")):
        try:
            notebook = nbformat.read(path, as_version=4)
            record = dict(notebook.metadata.get(RECORD, {}))
            if not record or record.pop("failure") is not None:
                continue
            chapter, source, values = (record.pop(name) for name in ("chapter", "source", "parameters"))
            parameters = {name: values[name] for name in chapter_schema(path)}  # JSON has them by name
            result = read_result(path)
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError, nbformat.ValidationError):
            raise InputError(f"{path}: is damaged or cannot be read; move it away") from None
        edited = notebook.metadata.get(DIGEST) != cells_digest(notebook)
        yield Executed(path, chapter, source, parameters, result, record, edited)


def parameter_defaults(chapter: Path) -> dict[str, Any]:
    """The default of each parameter of a notebook."""
    return {name: parameter.default for name, parameter in chapter_schema(chapter).items()}


def source_digest(source: bytes) -> str:
    """The hash of the cells of a notebook, given as its file's bytes; outputs do not count.

    Raises InputError if it is no valid notebook.
    """
    import nbformat

    try:
        text = source.decode("utf-8")
        if "nbformat" not in json.loads(text):
            raise ValueError("its nbformat is missing")
        notebook = nbformat.reads(text, as_version=4)
        nbformat.validate(notebook)
        cells = [[cell.cell_type, cell.source] for cell in notebook.cells]
    except (ValueError, TypeError, AttributeError, RecursionError, nbformat.ValidationError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"this is no valid notebook ({reason}): save it again in JupyterLab") from None
    return _hash(json.dumps(cells))


def cells_digest(notebook: Any) -> str:
    """The hash of a result's cells and outputs."""
    cells = [[cell.cell_type, cell.source, cell.get("outputs", [])] for cell in notebook.cells]
    return _hash(json.dumps(cells, sort_keys=True))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
