"""A training run's folder: one owner at a time, one set of settings for good."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dsmoe_lite.errors import InputError, RunError, require
from dsmoe_lite.files import write_json


@contextmanager
def own(folder: Path | None) -> Iterator[None]:
    """Hold `folder` for this process, made if it is not there; RunError when another process holds it."""
    if folder is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            yield
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{folder}: is not a folder; choose another place for the run") from None
    except Timeout:
        raise RunError(f"{folder}: another process is training in this folder; wait for it or choose another") from None


def keep_settings(folder: Path, settings: dict[str, dict[str, Any]]) -> None:
    """Write `settings` into a new run's folder; in an old one raise InputError where they differ from its own."""
    path = folder / "settings.json"
    if not path.is_file():
        write_json(path, settings)
    before = _read(path, settings)
    now: dict[str, dict[str, Any]] = json.loads(json.dumps(settings))  # tuples as the lists that JSON keeps
    for part, values in now.items():
        for name, value in values.items():
            had = before[part].get(name)
            require(had == value, f"{part}.{name}", value, f"{folder} holds a run with {had!r}; choose another folder")


def _read(path: Path, parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        return {part: dict(settings[part]) for part in parts}
    except (ValueError, KeyError, TypeError):
        remedy = "choose another folder, or remove this one to start again"
        raise InputError(f"{path}: damaged settings; {remedy}") from None
