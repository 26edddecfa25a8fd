"""Small pieces that the charts share: plain numbers, label placement, intervals."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError

CHARACTER = 0.58  # mean width of a character of the text font, in font sizes


def data(rows: Iterable[dict[str, Any]]) -> alt.Data:
    """Rows as inline data; NumPy and torch scalars become Python numbers."""
    return alt.Data(values=[{key: plain(value) for key, value in row.items()} for row in rows])


def plain(value: Any) -> Any:
    """A Python number for a NumPy or torch scalar; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def in_order(values: Iterable[Any]) -> list[Any]:
    """The distinct values, in order of first appearance."""
    return list(dict.fromkeys(values))


def flattened(chart: Any, fields: Sequence[str]) -> Any:
    """The chart with each row opened into one row an element: `fields` hold as many numbers, joined by spaces.

    nbformat writes one JSON element a line, so a table of numbers is a few strings in the notebook.
    """
    lists = {field: f"split(datum.{field}, ' ')" for field in fields}
    numbers = {field: f"datum.{field} === '' ? null : toNumber(datum.{field})" for field in fields}
    return chart.transform_calculate(**lists).transform_flatten(list(fields)).transform_calculate(**numbers)


def need_rows(rows: Sequence[dict[str, Any]], *fields: str) -> None:
    """Raise InputError where there are no rows, or where a row lacks a field."""
    if not rows:
        raise InputError("rows = []: a chart needs at least one row")
    for row in rows:
        for field in fields:
            if field not in row:
                raise InputError(f"rows: {row!r} has no {field!r}; each row needs {', '.join(fields)}")


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move positions apart, as little as possible, until neighbours are `gap` away; inside [low, high] if possible."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    blocks: list[tuple[float, list[int]]] = []  # centre, members in order
    for i in order:
        centre, members = positions[i], [i]
        while True:
            half = gap * (len(members) - 1) / 2
            placed = min(max(centre, low + half), max(high - half, low + half))
            if not blocks or placed - half >= _end(blocks[-1], gap) + gap:
                break
            before, earlier = blocks.pop()
            members = earlier + members
            centre = (before * len(earlier) + centre * (len(members) - len(earlier))) / len(members)
        blocks.append((placed, members))
    moved = [0.0] * len(positions)
    for centre, members in blocks:
        for place, i in enumerate(members):
            moved[i] = centre + gap * (place - (len(members) - 1) / 2)
    return moved


def _end(block: tuple[float, list[int]], gap: float) -> float:
    return block[0] + gap * (len(block[1]) - 1) / 2


def nice_range(values: Iterable[float], *, zero: bool = False) -> tuple[float, float]:
    """An axis range a little wider than the finite values."""
    finite = [value for value in values if value is not None and math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    margin = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    return (low if zero and low == 0 else low - margin), high + margin


def number_format(highest: float) -> Any:
    """The axis format for numbers up to `highest`: 12k in thousands, Vega's own below."""
    return "~s" if highest >= 1000 else alt.Undefined


def short(value: float) -> str:
    """A number in three digits with its unit: 1.23M, 45.0k, 0.312; whole numbers as they are: 7M, 2."""
    units = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    size, unit = next((pair for pair in units if abs(value) >= pair[0]), (1.0, ""))
    shown = value / size
    if shown == int(shown) or abs(shown) < 0.01:
        return f"{shown:.3g}{unit}"
    return f"{shown:#.3g}".rstrip(".") + unit


def listed(names: Sequence[Any], most: int = 6) -> str:
    """Names as a phrase: 'a, b and c'."""
    words = [str(name) for name in names[:most]] + ([f"{len(names) - most} more"] if len(names) > most else [])
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def expert_axis(
    experts: Sequence[int],
    *,
    field: str = "expert:N",
    channel: Any = alt.X,
    title: str | None = "expert",
    labels: bool = True,
) -> Any:
    """The axis e0, e1, ... of `experts`, in their order; at most 20 of them are labelled."""
    every = -(-len(experts) // 20)
    shown = [f"e{e}" for e in experts[::every]]
    axis = alt.Axis(values=shown, labels=labels, labelAngle=0, title=title, grid=False, labelFontSize=11)
    return channel(field, sort=[f"e{e}" for e in experts], axis=axis)


def gradient(title: str, **options: Any) -> alt.Legend:
    """The legend of a sequential scale, beneath the chart."""
    return alt.Legend(title=title, orient="bottom", gradientLength=160, gradientThickness=10, **options)
