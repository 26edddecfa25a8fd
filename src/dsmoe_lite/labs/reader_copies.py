"""Readers work on copies of the chapters in work/, so that saving never changes the reference outputs."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from dsmoe_lite.common import paths
from dsmoe_lite.common.files import atomic_write, write_json
from dsmoe_lite.labs.plain_markdown import rewrite_notebook

CHAPTER = "[0-9][0-9]_*.ipynb"
ASKS = re.compile(r"^lab\.ask\(", re.MULTILINE)
ANSWER_ENDS = re.compile(r"^(#|\*\*Ask)", re.MULTILINE)
SUMMARY = "The answer, in words (guess first)"
SOURCE_HASH = "dsmoe_source"  # key in a copy's metadata: the hash of the chapter it was made from


def copy_chapters(source: Path, work: Path) -> list[str]:
    """Copy missing chapters and all images into `work`; return one line for each outdated copy."""
    outdated = []
    for chapter in sorted(source.glob(CHAPTER)):
        copy = work / chapter.name
        if not copy.exists():
            _write_copy(chapter, copy)
        elif _source_hash(copy) not in (None, _hash(chapter)):
            outdated.append(
                f"{chapter.name} has changed since your copy: dsmoe lab --fresh {chapter.name[:2]} renews it"
            )
    _copy_images(source / "images", work / "images")
    return outdated


def renew(chapter: Path, work: Path) -> Path | None:
    """Replace the copy of `chapter` in `work`; return the backup of the old copy, or None if there was none."""
    copy = work / chapter.name
    backup = None
    if copy.exists():
        backup = _backup_name(copy)
        os.replace(copy, backup)
    _write_copy(chapter, copy)
    return backup


def _write_copy(chapter: Path, copy: Path) -> None:
    notebook = _read(chapter)
    metadata = notebook.setdefault("metadata", {})
    metadata.pop("jupytext", None)  # a copy is not paired with a .py file
    metadata[SOURCE_HASH] = _hash(chapter)
    chapters = {int(path.name[:2]): _read(path) for path in sorted(chapter.parent.glob(CHAPTER))}
    rewrite_notebook(notebook, chapters, chapter.parent / "references.bib")
    hide_answers(notebook["cells"])
    write_json(copy, notebook)
    _trust(copy)


def hide_answers(cells: list[dict[str, Any]]) -> None:
    """Clear the outputs of each cell that asks for a guess, and fold the text after it, which gives the answer.

    The answer ends at the next heading or question of the same Markdown cell.
    """
    asked = False
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and ASKS.search(source):
            cell["outputs"], cell["execution_count"] = [], None
            asked = True
        elif cell["cell_type"] == "markdown" and asked:
            end = ANSWER_ENDS.search(source)
            answer, rest = (source[: end.start()], source[end.start() :]) if end else (source, "")
            if answer.strip():
                answer = f"<details><summary>{SUMMARY}</summary>\n\n{answer.strip()}\n\n</details>\n\n"
            cell["source"] = (answer + rest).rstrip()
            asked = False


def _trust(copy: Path) -> None:
    """Sign the copy, so that JupyterLab trusts its outputs, which are the course's, and shows its widgets."""
    import nbformat
    from nbformat.sign import NotebookNotary

    NotebookNotary().sign(nbformat.read(copy, as_version=4))


def _copy_images(source: Path, target: Path) -> None:
    for image in sorted(source.glob("*")):
        copy = target / image.name
        if not copy.exists() or copy.read_bytes() != image.read_bytes():
            with atomic_write(copy) as temporary:
                shutil.copyfile(image, temporary)


def _source_hash(copy: Path) -> str | None:
    try:
        return _read(copy).get("metadata", {}).get(SOURCE_HASH)
    except (ValueError, AttributeError):
        return None  # the reader has changed this file; JupyterLab reports what is wrong with it


def _backup_name(copy: Path) -> Path:
    backup = copy.with_name(f"{copy.name}.bak")
    number = 1
    while backup.exists():
        number += 1
        backup = copy.with_name(f"{copy.name}.bak{number}")
    return backup


def _hash(chapter: Path) -> str:
    return hashlib.sha256(chapter.read_bytes()).hexdigest()[:16]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    copy_chapters(paths.NOTEBOOKS, paths.WORK)
