"""Versions and entries of files: a file of an unknown version, or without an entry, is refused in one line."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dsmoe_lite.common.errors import InputError, require

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


JSON_NAMES = {dict: "a mapping", list: "a list", str: "text", bool: "true or false", int: "a whole number"}


def require_entries(values: Mapping[str, Any], types: Mapping[str, type], remedy: str, prefix: str = "") -> None:
    """Require an entry of each of `types` in what a JSON file held. A float may be written as a whole number."""
    for name, wanted in types.items():
        value = values.get(name)
        right = type(value) in ((int, float) if wanted is float else (wanted,))
        require(right, f"{prefix}{name}", value, f"must be {JSON_NAMES.get(wanted, 'a number')}; {remedy}")
