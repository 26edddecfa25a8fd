"""What the charts share: rows as inline data, numbers and lists as text, labels kept apart, axes and legends."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError

CHARACTER_WIDTH = 0.58  # mean width of a character of the text font, in font sizes


def data(rows: Iterable[dict[str, Any]]) -> alt.Data:
    """Return rows as inline data; NumPy and torch scalars become Python numbers."""
    return alt.Data(values=[{key: plain(value) for key, value in row.items()} for row in rows])


def plain(value: Any) -> Any:
    """Return a NumPy or torch scalar as a Python number, and anything else unchanged."""
    return value.item() if hasattr(value, "item") else value


def distinct(values: Iterable[Any]) -> list[Any]:
    """Return the distinct values in order of first appearance."""
    return list(dict.fromkeys(values))


def require_rows(rows: Sequence[dict[str, Any]], *fields: str) -> None:
    """Raise InputError if there are no rows, or if a row lacks a field."""
    if not rows:
        raise InputError("rows = []: a chart needs at least one row")
    for row in rows:
        for field in fields:
            if field not in row:
                raise InputError(f"rows: {row!r} has no {field!r}; each row needs {', '.join(fields)}")


def flatten_packed(chart: Any, fields: Sequence[str]) -> Any:
    """Add transforms that expand each row into one row per number of its `fields`, strings of numbers with spaces.

    nbformat writes one JSON element per line, so tables of numbers are packed into a few strings in the notebook.
    """
    lists = {field: f"split(datum.{field}, ' ')" for field in fields}
    numbers = {field: f"datum.{field} === '' ? null : toNumber(datum.{field})" for field in fields}
    return chart.transform_calculate(**lists).transform_flatten(list(fields)).transform_calculate(**numbers)


def separate_labels(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move label positions apart, as little as possible, until neighbours are `gap` apart; in [low, high] if they fit.

    Labels that would overlap form a block around the mean of their positions.
    """
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    blocks: list[tuple[float, list[int]]] = []  # centre, members in order
    for i in order:
        centre, members = positions[i], [i]
        while True:
            half = gap * (len(members) - 1) / 2
            clamped = min(max(centre, low + half), max(high - half, low + half))
            if not blocks or clamped - half >= _last_position(blocks[-1], gap) + gap:
                break
            previous_centre, previous_members = blocks.pop()
            members = previous_members + members
            n_previous, n_members = len(previous_members), len(members)
            centre = (previous_centre * n_previous + centre * (n_members - n_previous)) / n_members
        blocks.append((clamped, members))
    moved = [0.0] * len(positions)
    for centre, members in blocks:
        for number, i in enumerate(members):
            moved[i] = centre + gap * (number - (len(members) - 1) / 2)
    return moved


def _last_position(block: tuple[float, list[int]], gap: float) -> float:
    return block[0] + gap * (len(block[1]) - 1) / 2


def nice_range(values: Iterable[float], *, zero: bool = False) -> tuple[float, float]:
    """Return an axis range slightly wider than the finite values; with `zero` it includes 0."""
    finite = [value for value in values if value is not None and math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    margin = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    return (low if zero and low == 0 else low - margin), high + margin


def number_format(highest: float) -> Any:
    """Return the axis format for numbers up to `highest`: 12k from 1000 on, Vega's default below."""
    return "~s" if highest >= 1000 else alt.Undefined


def short_number(value: float) -> str:
    """Write a number with three digits and an SI prefix: 1.23M, 45.0k, 0.312; whole numbers without decimals: 7M, 2."""
    prefixes = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    size, prefix = next((pair for pair in prefixes if abs(value) >= pair[0]), (1.0, ""))
    scaled = value / size
    if scaled == int(scaled) or abs(scaled) < 0.01:
        return f"{scaled:.3g}{prefix}"
    return f"{scaled:#.3g}".rstrip(".") + prefix


def word_list(words: Sequence[Any], limit: int = 6) -> str:
    """Write words as a phrase, 'a, b and c'; beyond `limit` words it ends in 'and 4 more'."""
    shown = [str(word) for word in words[:limit]] + ([f"{len(words) - limit} more"] if len(words) > limit else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def expert_axis(
    experts: Sequence[int],
    *,
    field: str = "expert:N",
    channel: Any = alt.X,
    title: str | None = "expert",
    labels: bool = True,
) -> Any:
    """Return the axis e0, e1, ... of `experts` in this order; at most 20 of them are labelled."""
    step = -(-len(experts) // 20)
    labelled = [f"e{e}" for e in experts[::step]]
    axis = alt.Axis(values=labelled, labels=labels, labelAngle=0, title=title, grid=False, labelFontSize=11)
    return channel(field, sort=[f"e{e}" for e in experts], axis=axis)


def gradient_legend(title: str, **options: Any) -> alt.Legend:
    """Return the legend of a sequential colour scale, below the chart."""
    return alt.Legend(title=title, orient="bottom", gradientLength=160, gradientThickness=10, **options)
