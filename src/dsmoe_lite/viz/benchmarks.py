"""Charts of the bench: ratios of times, and what a device could reach at most."""

import math
import re
from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.parts import CHARACTER, data, in_order, need_rows, nice_range, plain, short, spread

Rows = Sequence[dict[str, Any]]
ROUND = [digit * 10.0**power for power in range(-3, 4) for digit in (1, 2, 5)]  # ticks of a wide ratio axis
WIDE = 4.0  # highest over lowest ratio from which the axis is logarithmic
TEXT, NAME = 11.5, 12  # font sizes
ROOF = (600, 330)  # px
LINE, LEADER = 17, 14  # px between two names of the roofline, and from a point to its name


def ratio_bars(
    rows: Rows,
    *,
    x_title: str = "time over the other's time",
    title: str = "How many times as long?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """One row a ratio: a dot with its 95% interval, beside 1, where both take as long; the numbers are written out.

    rows: {what, against, ratio, low, high, goal (optional)}; the goal is a tick. Wide ranges are drawn on a log scale.
    """
    need_rows(rows, "what", "against", "ratio", "low", "high")
    marks = [_mark(row) for row in rows]
    if len({mark["name"] for mark in marks}) < len(marks):
        raise InputError("rows: two of them have the same 'what' and 'against'")
    said = "; ".join(f"{mark['name'].replace('|', ' ')} {mark['text']}" for mark in marks)
    description = description or f"Dot chart of ratios with 95% intervals, against 1: {said}."
    goals = [mark for mark in marks if "goal" in mark]
    subtitle = subtitle or "Dot and bar: ratio and its 95% interval. Line: 1, as long." + (
        " Tall tick: goal." if goals else ""
    )
    names = min(max(len(part) for mark in marks for part in mark["name"].split("|")) * NAME * CHARACTER, 230)
    numbers = max(len(mark["text"]) for mark in marks) * TEXT * CHARACTER
    width = int(min(theme.MAX_WIDTH - 60 - names - numbers, 460))
    y = alt.Y("name:N", sort=[mark["name"] for mark in marks], title=None,
              axis=alt.Axis(labelExpr="split(datum.label, '|')", labelColor=theme.LIGHT["ink"], labelLimit=230,
                            labelLineHeight=14, labelOffset=-7, grid=True))  # fmt: skip
    x = _ratio_axis([1.0] + [value for mark in marks for key, value in mark.items() if key not in ("name", "text")],
                    x_title)  # fmt: skip
    base = alt.Chart(data(marks)).encode(y=y)
    blue = theme.LIGHT["line1"]
    layers: list[Any] = [
        alt.Chart(data([{"ratio": 1.0}])).mark_rule(color=theme.LIGHT["ink"], strokeWidth=1.2).encode(x=x),
        base.mark_rule(strokeWidth=3, color=blue).encode(x=alt.X("low:Q"), x2="high:Q"),
        base.mark_circle(size=80, opacity=1, color=blue).encode(x=x, tooltip=["name:N", "text:N"]),
        base.mark_text(align="left", dx=8, fontSize=TEXT).encode(x=alt.value(width), text="text:N"),
    ]
    if goals:
        ticks = alt.Chart(data(goals)).mark_tick(size=22, thickness=2.5, opacity=1, color=theme.LIGHT["line2"])
        layers.append(ticks.encode(y=y, x=alt.X("goal:Q")))
    chart = alt.layer(*layers).properties(width=width, height=38 * len(marks))
    return theme.finish(chart, title, subtitle, description)


def _mark(row: dict[str, Any]) -> dict[str, Any]:
    ratio, low, high = (float(plain(row[field])) for field in ("ratio", "low", "high"))
    if not 0 < low <= ratio <= high < math.inf:
        raise InputError(
            f"rows: {row['what']}: low = {low:g}, ratio = {ratio:g}, high = {high:g} must rise from above 0"
        )
    text = f"{_ratio(ratio)} ({_ratio(low)} to {_ratio(high)})"
    mark = {"name": f"{row['what']}|over {row['against']}", "ratio": ratio, "low": low, "high": high, "text": text}
    goal = plain(row.get("goal"))
    if goal is None:
        return mark
    if not goal > 0:
        raise InputError(f"rows: {row['what']}: goal = {goal:g} must be above 0")
    return {**mark, "goal": float(goal), "text": f"{text}, goal {_ratio(goal)}"}


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else short(value)


def _ratio_axis(values: list[float], title: str) -> alt.X:
    low, high = min(values), max(values)
    if high / low < WIDE:
        low, high = nice_range(values)
        return alt.X("ratio:Q", title=title, scale=alt.Scale(domain=[low, high], nice=False, zero=False),
                     axis=alt.Axis(tickCount=5, grid=False))  # fmt: skip
    low, high = low / 1.15, high * 1.15
    ticks = [tick for tick in ROUND if low <= tick <= high]
    return alt.X("ratio:Q", title=f"{title} (log scale)", scale=alt.Scale(type="log", domain=[low, high], nice=False),
                 axis=alt.Axis(values=ticks, format="~g", grid=False))  # fmt: skip


def roofline(
    rows: Rows,
    *,
    peak: float,
    bandwidth: float,
    device: str = "",
    title: str = "Does memory or arithmetic set the limit?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Attainable FLOP/s against arithmetic intensity, log-log: a roof that rises with bandwidth up to the peak.

    rows: {name, intensity (FLOP a byte), flops (optional, FLOP/s measured)}; a point without a measurement is a ring on
    the roof. peak: FLOP/s; bandwidth: bytes/s; device: whose they are.
    """
    need_rows(rows, "name", "intensity")
    for name, value in (("peak", peak), ("bandwidth", bandwidth)):
        if not 0 < value < math.inf:
            raise InputError(f"{name} = {value!r}: must be above 0")
    points = [_point(row, peak, bandwidth) for row in rows]
    knee = peak / bandwidth
    limits = f"peak {_flops(peak)}, bandwidth {_unit(bandwidth, 'B/s')}; they meet at {knee:.3g} FLOP a byte"
    limits = f"{device}: {limits}" if device else limits[0].upper() + limits[1:]
    said = "; ".join(f"{p['name']} {p['intensity']:.3g} FLOP a byte, {p['said']}" for p in points)
    description = description or f"Roofline. {limits}. {said}."
    legend = {True: "Dot: measured.", False: "Ring: not measured, at most by the roof."}
    subtitle = subtitle or [f"{limits}.", " ".join(legend[kind] for kind in in_order(p["measured"] for p in points))]
    return theme.finish(_roof(points, peak, bandwidth), title, subtitle, description)


def _point(row: dict[str, Any], peak: float, bandwidth: float) -> dict[str, Any]:
    intensity, flops = float(plain(row["intensity"])), plain(row.get("flops"))
    if not 0 < intensity < math.inf or (flops is not None and not 0 < flops < math.inf):
        raise InputError(f"rows: {row['name']}: intensity and flops must be above 0")
    roof = min(peak, bandwidth * intensity)
    measured = flops is not None
    said = f"{_flops(flops)}, {flops / roof:.0%} of the roof" if measured else f"at most {_flops(roof)}"
    return {"name": str(row["name"]), "intensity": intensity, "flops": float(flops) if measured else roof,
            "measured": measured, "said": said}  # fmt: skip


def _flops(value: float) -> str:
    return _unit(value, "FLOP/s")


def _unit(value: float, unit: str) -> str:
    """A number with the unit's prefix before the unit: 989 TFLOP/s."""
    number, prefix = re.fullmatch(r"([\d.e+-]+)([PTGMk]?)", short(value)).groups()  # type: ignore[union-attr]
    return f"{number} {prefix}{unit}"


def _roof(points: list[dict[str, Any]], peak: float, bandwidth: float) -> Any:
    knee = peak / bandwidth
    x_range = _log_range([knee / 3, 3 * knee, *(p["intensity"] for p in points)])
    y_range = _log_range([peak, bandwidth * x_range[0], *(p["flops"] for p in points)])
    roof = [{"intensity": i, "flops": min(peak, bandwidth * i)} for i in (x_range[0], knee, x_range[1])]
    x, y = (
        _log_axis(alt.X, "intensity:Q", "arithmetic intensity (FLOP a byte moved, log scale)", x_range),
        _log_axis(alt.Y, "flops:Q", "FLOP/s (log scale)", y_range),
    )
    blue = theme.LIGHT["line1"]
    drawn = alt.Chart(data(points)).encode(x=x, y=y)
    named: Any = alt.Chart(data(_labels(points, peak, x_range, y_range)))
    dots, rings = drawn.transform_filter("datum.measured"), drawn.transform_filter("!datum.measured")
    tooltip = [alt.Tooltip("name:N"), alt.Tooltip("intensity:Q", format=".3~g"), alt.Tooltip("said:N", title="FLOP/s")]
    layers: list[Any] = [
        alt.Chart(data(roof)).mark_line(color=theme.LIGHT["ink"], strokeWidth=2).encode(x=x, y=y),
        alt.Chart(data(roof[1:2])).mark_rule(color=theme.LIGHT["muted"], strokeDash=[2, 3]).encode(x=x),
        named.mark_rule(color=theme.LIGHT["muted"], strokeWidth=0.8).encode(x=x, y=y, x2="at:Q", y2="beside:Q"),
        dots.mark_circle(size=70, opacity=1, color=blue).encode(tooltip=tooltip),
        rings.mark_circle(size=60, opacity=1, fill=theme.LIGHT["card"], stroke=blue, strokeWidth=2).encode(
            tooltip=tooltip
        ),
    ]
    halo = {"stroke": theme.LIGHT["card"], "strokeWidth": 4, "strokeJoin": "round"}  # keeps lines off the letters
    for side, dx in (("left", 3), ("right", -3)):
        text = named.transform_filter(f"datum.align == '{side}'").encode(x="at:Q", y="beside:Q", text="text:N")
        layers += [text.mark_text(align=side, dx=dx, fontSize=TEXT, **style) for style in (halo, {})]
    return alt.layer(*layers).properties(width=ROOF[0], height=ROOF[1])


def _log_range(values: list[float]) -> tuple[float, float]:
    margin = (max(values) / min(values)) ** 0.07
    return min(values) / margin, max(values) * margin


def _log_axis(channel: Any, field: str, title: str, ends: tuple[float, float]) -> Any:
    """A log axis with ticks at powers of ten, and at 2 and 5 times them where the range is short."""
    digits = (1, 2, 5) if ends[1] / ends[0] < 300 else (1,)
    ticks = [digit * 10.0**power for power in range(-6, 19) for digit in digits]
    axis = alt.Axis(values=[tick for tick in ticks if ends[0] <= tick <= ends[1]], format="~s")
    return channel(field, title=title, scale=alt.Scale(type="log", domain=list(ends), nice=False), axis=axis)


def _labels(
    points: list[dict[str, Any]], peak: float, x_range: tuple[float, float], y_range: tuple[float, float]
) -> list[dict[str, Any]]:
    """Where each point's text stands: right of it, or left where there is no room; apart, and below the peak."""
    width, height = ROOF
    a_pixel_right, a_pixel_up = (
        math.log(ends[1] / ends[0]) / size for ends, size in ((x_range, width), (y_range, height))
    )
    places = spread([math.log(point["flops"]) for point in points], LINE * a_pixel_up, math.log(y_range[0]),
                    math.log(peak) - LINE * a_pixel_up)  # fmt: skip
    labels = []
    for point, place in zip(points, places, strict=True):
        text = f"{point['name']}: {point['said'].replace(' of the roof', '')}" if point["measured"] else point["name"]
        left = math.log(x_range[1] / point["intensity"]) / a_pixel_right >= len(text) * TEXT * CHARACTER + LEADER
        at = point["intensity"] * math.exp((LEADER if left else -LEADER) * a_pixel_right)
        labels.append({"intensity": point["intensity"], "flops": point["flops"], "text": text, "at": at,
                       "align": "left" if left else "right", "beside": math.exp(place)})  # fmt: skip
    return labels
