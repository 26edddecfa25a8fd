"""Results for machines: a chapter reports plain values, and a tool reads them back from the notebook."""

import math
from pathlib import Path
from typing import Any

from dsmoe_lite.common.errors import InputError

MIME = "application/vnd.dsmoe.result+json"


def report(**values: Any) -> None:
    """Display `values` (numbers, text, lists and dicts of them), each on a line and, for machines, as JSON.

    Floats keep 4 significant digits. NaN, infinities and other types raise InputError.
    """
    plain = {name: rounded(name, value) for name, value in values.items()}
    display(plain, "\n".join(f"{name.replace('_', ' ')}: {_said(value)}" for name, value in plain.items()))


def display(values: dict[str, Any], text: str) -> None:
    """Display `text` and, for machines, plain `values`, as one output."""
    from IPython.display import display as display_output

    display_output({MIME: values, "text/plain": text}, raw=True)


def read_result(path: Path) -> dict[str, Any]:
    """Everything that the executed notebook at `path` reported; of a name reported twice, the last."""
    import nbformat

    found: dict[str, Any] = {}
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            found.update(output.get("data", {}).get(MIME, {}))
    return found


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_said(item)} ({key})" for key, item in value.items())
    return ", ".join(map(_said, value)) if isinstance(value, list) else str(value)


def rounded(name: str, value: Any) -> Any:
    """`value` as plain data, floats to 4 significant digits; InputError with `name` where it is none, or not finite."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()  # a scalar of numpy or torch
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(f"{name} = {value}: a result must be finite")
        return float(f"{value:.4g}")
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, list | tuple):
        return [rounded(name, item) for item in value]
    if isinstance(value, dict):
        return {str(key): rounded(name, item) for key, item in value.items()}
    raise InputError(f"{name} = {value!r}: a result must be plain data, not {type(value).__name__}")
