"""Versions of file formats: a file of an unknown version is refused in one line."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from dsmoe_lite.common.errors import InputError

CHECKPOINT_REMEDY = "load it with the version of dsmoe-lite that wrote it, or train again"
RECORD_REMEDY = "move the record away and run the experiment again, or use the version of dsmoe-lite that wrote it"


def require_schema(version: Any, known: Collection[int], remedy: str, path: Path | None = None) -> None:
    """Raise InputError naming the path, the version and the remedy unless `version` is one of `known`.

    path: None if the caller adds it to the message.
    """
    if version not in tuple(known):  # a damaged version may be unhashable
        prefix = "" if path is None else f"{path}: "
        versions = " and ".join(map(str, sorted(known)))
        raise InputError(f"{prefix}schema_version = {version!r}: this package reads {versions}; {remedy}")
