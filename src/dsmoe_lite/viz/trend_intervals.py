"""Many claims at once: differences between models with their intervals, beside 0, and what they were judged."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError, require_choice
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.parts import CHARACTER, data, in_order, need_rows, nice_range, plain

COLORS = {"holds": "line1", "leans": "line3", "inconclusive": "muted", "reversed": "line2"}  # by verdict
LINEAR = 0.01  # up to here a wide axis is all but linear, beyond logarithmic
WIDE = 10.0  # largest end of an interval over the median one from which the axis is wide
TICKS = [sign * 10.0**power for power in range(-2, 3) for sign in (-1, 1)]
TEXT, NAME, ROW = 11.5, 12, 36


def trend_intervals(
    rows: Sequence[dict[str, Any]],
    *,
    x_title: str = "first minus second",
    title: str = "Which trends appear?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """One row a claim: a dot with its 95% interval, beside 0; the verdict and the numbers are written out.

    rows: {what, figure, mean, low, high, verdict, limits (optional)}; limits are where a margin ends, ticks. Below 0
    the first model has the lower value. A dot is filled where the trend is significant after correction.
    """
    need_rows(rows, "what", "figure", "mean", "low", "high", "verdict")
    marks = [_mark(row) for row in rows]
    if len({mark["name"] for mark in marks}) < len(marks):
        raise InputError("rows: two of them have the same 'what' and 'figure'")
    verdicts = in_order(mark["verdict"] for mark in marks)
    said = "; ".join(f"{mark['name'].replace('|', ', ')}: {mark['text']}" for mark in marks)
    description = description or f"Dot chart of differences with 95% intervals, against 0: {said}."
    limits = [
        {"name": mark["name"], "limit": float(limit)}
        for mark, row in zip(marks, rows, strict=True)
        for limit in row.get("limits", ())
    ]
    legend = ["Dot and bar: mean difference and its 95% interval.", "Full dot: significant after correction."]
    subtitle = subtitle or [legend[0], legend[1] + (" Tick: margin." if limits else "")]
    names = min(max(len(part) for mark in marks for part in mark["name"].split("|")) * NAME * CHARACTER, 280)
    numbers = max(len(mark["text"]) for mark in marks) * TEXT * CHARACTER
    width = int(max(theme.MAX_WIDTH - 76 - names - numbers, 180))
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
        dots.transform_filter("datum.full").mark_point(size=80, filled=True, opacity=1),
        dots.transform_filter("!datum.full").mark_point(size=70, fill=theme.LIGHT["card"], strokeWidth=2, opacity=1),
        base.mark_text(align="left", dx=8, fontSize=TEXT).encode(
            x=alt.value(width), text="text:N", color=alt.value(theme.LIGHT["ink"])
        ),
    ]
    if limits:
        tick = alt.Chart(data(limits)).mark_tick(size=20, thickness=2, opacity=1, color=theme.LIGHT["muted"])
        layers.append(tick.encode(y=y, x=alt.X("limit:Q")))
    chart = alt.layer(*layers).properties(width=width, height=ROW * len(marks))
    return theme.finish(chart, title, subtitle, description)


def _mark(row: dict[str, Any]) -> dict[str, Any]:
    mean, low, high = (float(plain(row[field])) for field in ("mean", "low", "high"))
    require_choice("verdict", row["verdict"], COLORS)
    if not -math.inf < low <= mean <= high < math.inf:
        raise InputError(f"rows: {row['what']}: low = {low:g}, mean = {mean:g}, high = {high:g} must rise")
    text = f"{row['verdict']}, {mean:+.3f} ± {(high - low) / 2:.3f}"
    return {"name": f"{row['what']}|{row['figure']}", "mean": mean, "low": low, "high": high, "text": text,
            "verdict": row["verdict"], "full": row["verdict"] in ("holds", "reversed")}  # fmt: skip


def _axis(values: list[float], title: str) -> alt.X:
    if max(map(abs, values)) < WIDE * statistics.median(map(abs, values)):
        low, high = nice_range([0.0, *values])
        scale = alt.Scale(domain=[low, high], nice=False, zero=False)
        return alt.X("mean:Q", title=title, scale=scale, axis=alt.Axis(tickCount=5, grid=False))
    low, high = (1.15 * limit for limit in (min([*values, -LINEAR]), max([*values, LINEAR])))
    ticks = sorted([0.0, *(tick for tick in TICKS if low <= tick <= high)])
    scale = alt.Scale(type="symlog", constant=LINEAR, domain=[low, high], nice=False)
    return alt.X("mean:Q", title=f"{title} (linear near 0, logarithmic beyond)", scale=scale,
                 axis=alt.Axis(values=ticks, format="~g", grid=False))  # fmt: skip
