"""The figures that papers print, from data/published.json, each with its source."""

import re
from pathlib import Path
from typing import Any

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.common.files import read_json
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.common.schema import require_schema

PATH = DATA / "published.json"
SCHEMA_VERSION = 1
UNITS = {"": 1.0, "K": 1e3, " KB": 1e3, "B": 1e9, "T": 1e12, "%": 0.01}  # of printed figures


def load(path: Path = PATH) -> dict[str, Any]:
    """Read the figures. Raises InputError if the file is damaged or its schema version unknown."""
    values = read_json(path)
    require_schema(values.get("schema_version"), {SCHEMA_VERSION}, "restore the file from the repository", path)
    return values


def printed(model: str, quantity: str) -> str:
    """Return a figure of one of the nine validation models as printed. Raises KeyError if the paper prints none."""
    figures: dict[str, str] = {entry["quantity"]: entry["text"] for entry in load()["models"][model]["printed"]}
    return figures[quantity]


def as_printed(value: float, text: str) -> str:
    """Format `value` with the unit and the decimals of a printed figure: (4.333e12, "4.3T") -> "4.3T".

    Raises InputError if `text` is not a number with one of UNITS.
    """
    match = re.fullmatch(r"([\d,]+)(?:\.(\d+))?( ?[A-Z%]*)", text)
    if match is None or match[3] not in UNITS:
        raise InputError(f"figure = {text!r}: must be a number with one of the units {', '.join(filter(None, UNITS))}")
    commas = "," if "," in match[1] else ""
    return f"{value / UNITS[match[3]]:{commas}.{len(match[2] or '')}f}{match[3]}"
