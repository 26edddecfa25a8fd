"""The notebook that a student gets: text, given code, stubs and visible checks, with the student's own values."""

import ast
import re
from pathlib import Path
from typing import Any

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.common.files import write_text
from dsmoe_lite.teaching.lab import Cell, Lab
from dsmoe_lite.teaching.variant import Variant

NEVER = ("solution", "hidden")
METADATA = "dsmoe_lab"  # of the notebook: which lab, which student, which variant
PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")  # of a parameter, in text


def release_name(lab: Lab, student: str) -> str:
    """The file's name."""
    return f"{lab.name}-{student}.ipynb"


def write_release(lab: Lab, variant: Variant, folder: Path) -> tuple[Path, bool]:
    """Write the student's notebook into `folder` and return its path, and whether it is new.

    Raises InputError if a different file has this name: an earlier version of the lab, or of another secret.
    """
    path, text = folder / release_name(lab, variant.student), release(lab, variant)
    if path.exists():
        if path.read_text(encoding="utf-8", errors="replace") == text:
            return path, False
        raise InputError(f"{path}: exists and differs; choose another folder with --out, or move it away")
    write_text(path, text)
    return path, True


def release(lab: Lab, variant: Variant) -> str:
    """The text of the student's .ipynb file, the same bytes each time."""
    import nbformat

    cells = []
    for number, cell in enumerate(lab.cells):
        if cell.role in NEVER:
            continue
        make = nbformat.v4.new_markdown_cell if cell.kind == "markdown" else nbformat.v4.new_code_cell
        metadata: dict[str, Any] = {"tags": list(cell.tags)} if cell.tags else {}
        metadata |= {"question": cell.question} if cell.question else {}
        cells.append(make(_source(cell, lab, variant), id=f"cell-{number}", metadata=metadata))
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    label = {"lab": lab.name, "student": variant.student, "variant": variant.mark}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, METADATA: label})
    nbformat.validate(notebook)
    return str(nbformat.writes(notebook)) + "\n"


def _source(cell: Cell, lab: Lab, variant: Variant) -> str:
    if "parameters" in cell.tags:
        return _with_values(cell.source, variant.values)
    if cell.kind != "markdown":
        return cell.source
    if cell.question and not cell.role and cell == next(one for one in lab.cells if one.question == cell.question):
        source = f"{cell.source}{_forbidden(lab, cell.question)}"
    else:
        source = cell.source

    def value(found: re.Match[str]) -> str:
        if found[1] not in variant.values:
            raise InputError(f"{lab.path}: {found[0]}: no such parameter; there are {', '.join(variant.values)}")
        return str(variant.values[found[1]])

    return PLACEHOLDER.sub(value, source)


def _forbidden(lab: Lab, question: str) -> str:
    """A sentence on what the answer must not import."""
    forbid = lab.questions[question].settings.forbid
    modules = ", ".join(f"`{module}`" for module in forbid)
    return f"\n\n*Your answer must not import {modules}.*" if forbid else ""


def _with_values(source: str, values: dict[str, Any]) -> str:
    """The parameters cell with other defaults; comments stay."""
    lines = source.encode().splitlines()
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            old, line = statement.value, statement.lineno - 1
            new = repr(values[statement.target.id]).encode()
            lines[line] = lines[line][: old.col_offset] + new + lines[line][old.end_col_offset :]
    return b"\n".join(lines).decode()
