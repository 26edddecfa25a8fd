"""Configs as plain data that JSON and YAML can store."""

from dataclasses import asdict, fields
from numbers import Number
from typing import Any


def make_plain(config: Any) -> None:
    """Replace numpy's numbers in the fields of a frozen config by Python's, which JSON can store."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Number) and hasattr(value, "item"):
            object.__setattr__(config, field.name, value.item())


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a config into plain data, for JSON or YAML."""
    return asdict(config)
