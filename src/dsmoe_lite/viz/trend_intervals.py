"""The chart `trend_intervals`: which claimed trends appear, by the intervals of differences between models?"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError, require_choice
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.helpers import CHARACTER_WIDTH, data, distinct, nice_range, plain, require_rows

COLORS = {"holds": "line1", "leans": "line3", "inconclusive": "muted", "reversed": "line2"}  # role by verdict
SYMLOG_CONSTANT = 0.01  # a symlog axis is close to linear below it, and logarithmic above
SYMLOG_FROM = 10.0  # largest over median interval end from which the axis is symlog
SYMLOG_TICKS = [sign * 10.0**power for power in range(-2, 3) for sign in (-1, 1)]
TEXT_SIZE, NAME_SIZE = 11.5, 12  # font sizes
ROW_HEIGHT = 36  # px


def trend_intervals(
    rows: Sequence[dict[str, Any]],
    *,
    x_title: str = "first minus second",
    title: str = "Which trends appear?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Draw one row per claim: a dot with its 95% interval, beside a line at 0, and the verdict with its numbers.

    rows: {what, figure, mean, low, high, verdict, limits (optional)}; ticks mark the limits, the ends of a margin.
    Below 0 the first model has the lower value. A dot is filled if the trend is significant after correction.
    """
    require_rows(rows, "what", "figure", "mean", "low", "high", "verdict")
    marks = [_mark(row) for row in rows]
    if len({mark["name"] for mark in marks}) < len(marks):
        raise InputError("rows: two of them have the same 'what' and 'figure'")
    verdicts = distinct(mark["verdict"] for mark in marks)
    texts = "; ".join(f"{mark['name'].replace('|', ', ')}: {mark['text']}" for mark in marks)
    description = description or f"Dot chart of differences with 95% intervals, against 0: {texts}."
    limits = [
        {"name": mark["name"], "limit": float(limit)}
        for mark, row in zip(marks, rows, strict=True)
        for limit in row.get("limits", ())
    ]
    legend = ["Dot and bar: mean difference and its 95% interval.", "Filled dot: significant after correction."]
    subtitle = subtitle or [legend[0], legend[1] + (" Tick: margin." if limits else "")]
    names_width = min(
        max(len(part) for mark in marks for part in mark["name"].split("|")) * NAME_SIZE * CHARACTER_WIDTH, 280
    )
    texts_width = max(len(mark["text"]) for mark in marks) * TEXT_SIZE * CHARACTER_WIDTH
    width = int(max(theme.MAX_WIDTH - 76 - names_width - texts_width, 180))
    y = alt.Y("name:N", sort=[mark["name"] for mark in marks], title=None,
              axis=alt.Axis(labelExpr="split(datum.label, '|')", labelColor=theme.LIGHT["ink"], labelLimit=280,
                            labelLineHeight=14, labelOffset=-7, grid=True))  # fmt: skip
    ends = [value for mark in marks for value in (mark["low"], mark["high"])] + [mark["limit"] for mark in limits]
    x = _axis(ends, x_title)
    colors = alt.Scale(domain=verdicts, range=[theme.LIGHT[COLORS[verdict]] for verdict in verdicts])
    color = alt.Color("verdict:N", scale=colors, legend=None)
    base = alt.Chart(data(marks)).encode(y=y, color=color)
    dots = base.encode(x=x, tooltip=["name:N", "text:N"])
    layers: list[Any] = [
        alt.Chart(data([{"mean": 0.0}])).mark_rule(color=theme.LIGHT["ink"], strokeWidth=1.2).encode(x=x),
        base.mark_rule(strokeWidth=3).encode(x=alt.X("low:Q"), x2="high:Q"),
        dots.transform_filter("datum.filled").mark_point(size=80, filled=True, opacity=1),
        dots.transform_filter("!datum.filled").mark_point(size=70, fill=theme.LIGHT["card"], strokeWidth=2, opacity=1),
        base.mark_text(style="row_text", align="left", dx=8, fontSize=TEXT_SIZE).encode(
            x=alt.value(width), text="text:N", color=alt.value(theme.LIGHT["ink"])
        ),
    ]
    if limits:
        tick = alt.Chart(data(limits)).mark_tick(size=20, thickness=2, opacity=1, color=theme.LIGHT["muted"])
        layers.append(tick.encode(y=y, x=alt.X("limit:Q")))
    chart = alt.layer(*layers).properties(width=width, height=ROW_HEIGHT * len(marks))
    return theme.finish(chart, title, subtitle, description)


def _mark(row: dict[str, Any]) -> dict[str, Any]:
    mean, low, high = (float(plain(row[field])) for field in ("mean", "low", "high"))
    require_choice("verdict", row["verdict"], COLORS)
    if not -math.inf < low <= mean <= high < math.inf:
        raise InputError(
            f"rows: {row['what']}: low = {low:g}, mean = {mean:g}, high = {high:g} must be in rising order"
        )
    text = f"{row['verdict']}, {mean:+.3f} ± {(high - low) / 2:.3f}"
    return {"name": f"{row['what']}|{row['figure']}", "mean": mean, "low": low, "high": high, "text": text,
            "verdict": row["verdict"], "filled": row["verdict"] in ("holds", "reversed")}  # fmt: skip


def _axis(values: list[float], title: str) -> alt.X:
    if max(map(abs, values)) < SYMLOG_FROM * statistics.median(map(abs, values)):
        low, high = nice_range([0.0, *values])
        scale = alt.Scale(domain=[low, high], nice=False, zero=False)
        return alt.X("mean:Q", title=title, scale=scale, axis=alt.Axis(tickCount=5, grid=False))
    low, high = (1.15 * limit for limit in (min([*values, -SYMLOG_CONSTANT]), max([*values, SYMLOG_CONSTANT])))
    ticks = sorted([0.0, *(tick for tick in SYMLOG_TICKS if low <= tick <= high)])
    scale = alt.Scale(type="symlog", constant=SYMLOG_CONSTANT, domain=[low, high], nice=False)
    return alt.X("mean:Q", title=f"{title} (linear near 0, then logarithmic)", scale=scale,
                 axis=alt.Axis(values=ticks, format="~g", grid=False))  # fmt: skip
