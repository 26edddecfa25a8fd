"""What the papers print, from data/published.json: each entry with its source."""

import json
from typing import Any

from dsmoe_lite.errors import RunError
from dsmoe_lite.paths import DATA


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
