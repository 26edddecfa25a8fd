"""What the papers print, from data/published.json: each entry with its source."""

import json
import re
from typing import Any

from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.common.paths import DATA

UNITS = {"": 1.0, "K": 1e3, " KB": 1e3, "B": 1e9, "T": 1e12, "%": 0.01}  # what printed figures are counted in


def load() -> dict[str, Any]:
    """Read data/published.json; raises RunError when its schema is not the one this package knows."""
    path = DATA / "published.json"
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if values.get("schema_version") != 1:
        raise RunError(f"{path}: schema_version = {values.get('schema_version')!r}: this package reads version 1")
    return values


def printed(model: str, quantity: str) -> str:
    """The figure as printed for one of the nine validation models; raises KeyError when the paper prints none."""
    figures: dict[str, str] = {entry["quantity"]: entry["text"] for entry in load()["models"][model]["printed"]}
    return figures[quantity]


def as_printed(value: float, text: str) -> str:
    """`value` in the unit and with the decimals of a printed figure: (4.333e12, "4.3T") -> "4.3T".

    InputError where `text` is not a number with one of UNITS.
    """
    found = re.fullmatch(r"([\d,]+)(?:\.(\d+))?( ?[A-Z%]*)", text)
    if found is None or found[3] not in UNITS:
        raise InputError(f"figure = {text!r}: must be a number with one of the units {', '.join(filter(None, UNITS))}")
    commas = "," if "," in found[1] else ""
    return f"{value / UNITS[found[3]]:{commas}.{len(found[2] or '')}f}{found[3]}"
