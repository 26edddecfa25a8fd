"""The folder of a training run: one process at a time trains in it, and its settings never change."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dsmoe_lite.common.errors import InputError, RunError, require
from dsmoe_lite.common.files import read_json, write_json
from dsmoe_lite.common.schema import require_entries
from dsmoe_lite.config import ModelConfig, from_dict, to_dict
from dsmoe_lite.training.config import TrainConfig

CONFIGS: dict[str, type] = {"model": ModelConfig, "train": TrainConfig}  # parts of the settings that are configs


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Make `folder` and lock it for this process. Raises RunError if another process has locked it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            yield
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{folder}: is not a folder; choose another folder for the run") from None
    except Timeout:
        raise RunError(f"{folder}: another process is using this folder; wait for it or choose another") from None


def check_settings(folder: Path, settings: dict[str, dict[str, Any]]) -> None:
    """Store the `settings` of a new run, or raise InputError if those stored in the folder differ."""
    path = folder / "settings.json"
    if not path.is_file():
        write_json(path, settings)
    stored = _read(path, settings)
    for part, config in CONFIGS.items():
        if part not in stored:
            continue
        try:
            stored[part] = to_dict(from_dict(config, stored[part]))  # fields that are newer than the run: defaults
        except InputError as error:
            raise InputError(f"{path}: {error}; another version wrote it: choose another folder") from None
    current: dict[str, dict[str, Any]] = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    for part, values in current.items():
        for name, value in values.items():
            old = stored[part].get(name)
            require(old == value, f"{part}.{name}", value, f"{folder} holds a run with {old!r}; choose another folder")


def _read(path: Path, parts: Iterable[str]) -> dict[str, dict[str, Any]]:
    try:
        settings = read_json(path)
        require_entries(settings, dict.fromkeys(parts, dict), "not the settings of a run")
    except InputError:
        remedy = "choose another folder, or remove this one to start again"
        raise InputError(f"{path}: damaged settings; {remedy}") from None
    return {part: settings[part] for part in parts}
