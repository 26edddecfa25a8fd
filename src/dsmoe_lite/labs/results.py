"""Machine-readable results: a chapter reports plain values, and tools read them from the executed notebook."""

import math
from pathlib import Path
from typing import Any

from dsmoe_lite.common.errors import InputError

MIME = "application/vnd.dsmoe.result+json"


def report(**values: Any) -> None:
    """Display `values` (numbers, text, lists and dicts of these), one per line, and attach them as JSON.

    Floats are rounded to 4 significant digits. Raises InputError for NaN, infinities and other types.
    """
    plain = {name: to_plain_data(name, value) for name, value in values.items()}
    display(plain, "\n".join(f"{name.replace('_', ' ')}: {_format(value)}" for name, value in plain.items()))


def display(values: dict[str, Any], text: str) -> None:
    """Display one output: `text` to read, and `values` in machine-readable form."""
    from IPython.display import display as display_output

    display_output({MIME: values, "text/plain": text}, raw=True)


def read_result(path: Path) -> dict[str, Any]:
    """All results that the executed notebook at `path` reported; the last one if a name was reported twice."""
    import nbformat

    results: dict[str, Any] = {}
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            results.update(output.get("data", {}).get(MIME, {}))
    return results


def _format(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_format(item)} ({key})" for key, item in value.items())
    return ", ".join(map(_format, value)) if isinstance(value, list) else str(value)


def to_plain_data(name: str, value: Any) -> Any:
    """Convert to plain data, floats to 4 significant digits. Raises InputError for other types, NaN and infinity."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()  # a scalar of numpy or torch
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(f"{name} = {value}: a result must be finite")
        return float(f"{value:.4g}")
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, list | tuple):
        return [to_plain_data(name, item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_plain_data(name, item) for key, item in value.items()}
    raise InputError(f"{name} = {value!r}: a result must be plain data, not {type(value).__name__}")
