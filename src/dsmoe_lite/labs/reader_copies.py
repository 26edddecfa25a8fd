"""Readers' copies: chapters are worked on in work/, so a reader's save never touches the reference outputs."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from dsmoe_lite.common.files import atomic_write, write_json
from dsmoe_lite.labs.plain_markdown import make_plain

CHAPTER = "[0-9][0-9]_*.ipynb"
STAMP = "dsmoe_source"  # metadata of a copy: the hash of the chapter it was made from


def copy_chapters(source: Path, work: Path) -> list[str]:
    """Copy into `work` the chapters it lacks, and the pictures; return one line for each copy that is outdated."""
    outdated = []
    for chapter in sorted(source.glob(CHAPTER)):
        copy = work / chapter.name
        if not copy.exists():
            _write_copy(chapter, copy)
        elif _made_from(copy) not in (None, _hash(chapter)):
            outdated.append(
                f"{chapter.name} has changed since your copy: dsmoe lab --fresh {chapter.name[:2]} renews it"
            )
    _copy_pictures(source / "images", work / "images")
    return outdated


def renew(chapter: Path, work: Path) -> Path | None:
    """Make the copy of `chapter` in `work` anew; return where the old one is kept, or None where there was none."""
    copy = work / chapter.name
    kept = None
    if copy.exists():
        kept = _free_name(copy)
        os.replace(copy, kept)
    _write_copy(chapter, copy)
    return kept


def _write_copy(chapter: Path, copy: Path) -> None:
    notebook = _read(chapter)
    metadata = notebook.setdefault("metadata", {})
    metadata.pop("jupytext", None)  # a copy is paired with no .py
    metadata[STAMP] = _hash(chapter)
    siblings = {int(path.name[:2]): _read(path) for path in sorted(chapter.parent.glob(CHAPTER))}
    make_plain(notebook, siblings, chapter.parent / "references.bib")
    write_json(copy, notebook)
    _trust(copy)


def _trust(copy: Path) -> None:
    """Sign the copy as the reader's own: its outputs are the course's, and JupyterLab then shows its widgets."""
    import nbformat
    from nbformat.sign import NotebookNotary

    NotebookNotary().sign(nbformat.read(copy, as_version=4))


def _copy_pictures(source: Path, target: Path) -> None:
    for picture in sorted(source.glob("*")):
        there = target / picture.name
        if not there.exists() or there.read_bytes() != picture.read_bytes():
            with atomic_write(there) as aside:
                shutil.copyfile(picture, aside)


def _made_from(copy: Path) -> str | None:
    try:
        return _read(copy).get("metadata", {}).get(STAMP)
    except (ValueError, AttributeError):
        return None  # the reader's own file: JupyterLab says what is wrong with it


def _free_name(copy: Path) -> Path:
    kept = copy.with_name(f"{copy.name}.bak")
    number = 1
    while kept.exists():
        number += 1
        kept = copy.with_name(f"{copy.name}.bak{number}")
    return kept


def _hash(chapter: Path) -> str:
    return hashlib.sha256(chapter.read_bytes()).hexdigest()[:16]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
