"""The chart `roofline`: does memory bandwidth or arithmetic limit an operation?"""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.controls import Control
from dsmoe_lite.viz.helpers import (
    CHARACTER_WIDTH,
    data,
    distinct,
    plain,
    require_rows,
    separate_labels,
    short_number,
)

Rows = Sequence[dict[str, Any]]
TEXT_SIZE = 11.5  # font size
ROOFLINE_SIZE = (600, 330)  # px
LABEL_GAP, LEADER = 17, 14  # px: between two labels of the roofline, from a point to its label


def roofline(
    rows: Rows,
    *,
    peak: float,
    bandwidth: float,
    device: str = "",
    tokens: int | None = None,
    title: str = "Does memory or arithmetic set the limit?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Draw attainable FLOP/s against arithmetic intensity, log-log: a roof that rises with bandwidth up to the peak.

    rows: {name, intensity (FLOP per byte), flops (optional, measured FLOP/s)}; a point without a measurement is a ring
    on the roof. peak: FLOP/s of the device; bandwidth: its bytes/s; device: its name. tokens: rows have the tokens of a
    batch, a power of two, under this name; a slider, which starts here and needs no kernel, moves the points.
    """
    require_rows(rows, "name", "intensity")
    for name, value in (("peak", peak), ("bandwidth", bandwidth)):
        if not 0 < value < math.inf:
            raise InputError(f"{name} = {value!r}: must be above 0")
    points = [_point(row, peak, bandwidth) for row in rows]
    knee = peak / bandwidth
    limits = f"peak {_flops(peak)}, bandwidth {_unit(bandwidth, 'B/s')}; they meet at {knee:.3g} FLOP per byte"
    limits = f"{device}: {limits}" if device else limits[0].upper() + limits[1:]
    control = None if tokens is None else Control("tokens", "Tokens in a batch", tokens, base=2)
    at_start = [point for point in points if point.get("tokens") == tokens]
    readings = "; ".join(f"{p['name']} {p['intensity']:.3g} FLOP per byte, {p['speed']}" for p in at_start)
    moved = "" if control is None else f"For {tokens:,} tokens in a batch, which a slider changes: "
    description = description or f"Roofline. {limits}. {moved}{readings}."
    legend = {True: "Dot: measured.", False: "Ring: not measured; the roof is its upper bound."}
    subtitle = subtitle or [f"{limits}.", " ".join(legend[kind] for kind in distinct(p["measured"] for p in points))]
    chart = _roofline(points, peak, bandwidth, control)
    chart = chart if control is None else chart.add_params(control.param(points))
    return theme.finish(chart, title, subtitle, description)


def _point(row: dict[str, Any], peak: float, bandwidth: float) -> dict[str, Any]:
    intensity, flops = float(plain(row["intensity"])), plain(row.get("flops"))
    if not 0 < intensity < math.inf or (flops is not None and not 0 < flops < math.inf):
        raise InputError(f"rows: {row['name']}: intensity and flops must be above 0")
    roof = min(peak, bandwidth * intensity)
    measured = flops is not None
    speed = f"{_flops(flops)}, {flops / roof:.0%} of the roof" if measured else f"at most {_flops(roof)}"
    point = {"name": str(row["name"]), "intensity": intensity, "flops": float(flops) if measured else roof,
             "measured": measured, "speed": speed}  # fmt: skip
    return point | ({"tokens": int(plain(row["tokens"]))} if "tokens" in row else {})


def _flops(value: float) -> str:
    return _unit(value, "FLOP/s")


def _unit(value: float, unit: str) -> str:
    """Write a value with an SI prefix before its unit: 989 TFLOP/s."""
    number = short_number(value)
    prefix = number[-1] if number[-1].isalpha() else ""
    return f"{number.removesuffix(prefix)} {prefix}{unit}"


def _roofline(points: list[dict[str, Any]], peak: float, bandwidth: float, control: Control | None) -> Any:
    knee = peak / bandwidth
    x_range = _log_range([knee / 3, 3 * knee, *(p["intensity"] for p in points)])
    y_range = _log_range([peak, bandwidth * x_range[0], *(p["flops"] for p in points)])
    roof = [{"intensity": i, "flops": min(peak, bandwidth * i)} for i in (x_range[0], knee, x_range[1])]
    x, y = (
        _log_axis(alt.X, "intensity:Q", "arithmetic intensity (FLOP per byte moved, log scale)", x_range),
        _log_axis(alt.Y, "flops:Q", "FLOP/s (log scale)", y_range),
    )
    accent = theme.LIGHT["line1"]
    marks = alt.Chart(data(points)).encode(x=x, y=y)
    together = [[p for p in points if p.get("tokens") == n] for n in distinct(p.get("tokens") for p in points)]
    placed = [label for some in together for label in _labels(some, peak, x_range, y_range)]
    labels: Any = alt.Chart(data(placed))
    if control is not None:
        marks, labels = control.filter(marks), control.filter(labels)
    tooltip = [alt.Tooltip("name:N"), alt.Tooltip("intensity:Q", format=".3~g"), alt.Tooltip("speed:N", title="FLOP/s")]
    layers: list[Any] = [
        alt.Chart(data(roof)).mark_line(color=theme.LIGHT["ink"], strokeWidth=2).encode(x=x, y=y),
        alt.Chart(data(roof[1:2])).mark_rule(color=theme.LIGHT["muted"], strokeDash=[2, 3]).encode(x=x),
        labels.mark_rule(color=theme.LIGHT["muted"], strokeWidth=0.8).encode(x=x, y=y, x2="label_x:Q", y2="label_y:Q"),
    ]
    dot: dict[str, Any] = {"size": 70, "color": accent}
    ring: dict[str, Any] = {"size": 60, "fill": theme.LIGHT["card"], "stroke": accent, "strokeWidth": 2}
    for measured, style in ((True, dot), (False, ring)):
        if any(point["measured"] == measured for point in points):
            of_kind = marks.transform_filter(f"{'' if measured else '!'}datum.measured")
            layers.append(of_kind.mark_circle(opacity=1, **style).encode(tooltip=tooltip))
    halo = {
        "stroke": theme.LIGHT["card"],
        "strokeWidth": 4,
        "strokeJoin": "round",
    }  # so that lines do not cross the letters
    for side, dx in (("left", 3), ("right", -3)):
        if not any(label["align"] == side for label in placed):
            continue
        text = labels.transform_filter(f"datum.align == '{side}'").encode(x="label_x:Q", y="label_y:Q", text="text:N")
        layers += [text.mark_text(align=side, dx=dx, fontSize=TEXT_SIZE, **style) for style in (halo, {})]
    if control is not None:
        read = alt.Chart(data([{}])).transform_calculate(
            text=f"'tokens in a batch: ' + format({control.reading}, ',.0f')"
        )
        bold: dict[str, Any] = {
            "align": "left",
            "baseline": "bottom",
            "dy": -5,
            "fontWeight": 600,
            "color": theme.LIGHT["line1_label"],
        }
        layers.append(read.mark_text(**bold).encode(x=alt.value(0), y=alt.value(0), text="text:N"))
    return alt.layer(*layers).properties(width=ROOFLINE_SIZE[0], height=ROOFLINE_SIZE[1])


def _log_range(values: list[float]) -> tuple[float, float]:
    margin = (max(values) / min(values)) ** 0.07
    return min(values) / margin, max(values) * margin


def _log_axis(channel: Any, field: str, title: str, limits: tuple[float, float]) -> Any:
    """Return a log axis with ticks at powers of ten, and at 2 and 5 times them if the range is short."""
    digits = (1, 2, 5) if limits[1] / limits[0] < 300 else (1,)
    ticks = [digit * 10.0**power for power in range(-6, 19) for digit in digits]
    axis = alt.Axis(values=[tick for tick in ticks if limits[0] <= tick <= limits[1]],
                    labelExpr="format(datum.value, datum.value < 1 ? '~r' : '~s')")  # fmt: skip
    return channel(field, title=title, scale=alt.Scale(type="log", domain=list(limits), nice=False), axis=axis)


def _labels(
    points: list[dict[str, Any]], peak: float, x_range: tuple[float, float], y_range: tuple[float, float]
) -> list[dict[str, Any]]:
    """Place each point's label to its right, or to its left if it does not fit; labels are apart and below the peak."""
    width, height = ROOFLINE_SIZE
    x_pixel, y_pixel = (  # in units of the log axes
        math.log(limits[1] / limits[0]) / size for limits, size in ((x_range, width), (y_range, height))
    )
    heights = separate_labels([math.log(point["flops"]) for point in points], LABEL_GAP * y_pixel,
                              math.log(y_range[0]), math.log(peak) - LABEL_GAP * y_pixel)  # fmt: skip
    labels = []
    for point, label_height in zip(points, heights, strict=True):
        text = f"{point['name']}: {point['speed'].replace(' of the roof', '')}" if point["measured"] else point["name"]
        needed = len(text) * TEXT_SIZE * CHARACTER_WIDTH + LEADER
        on_right = math.log(x_range[1] / point["intensity"]) / x_pixel >= needed
        label_x = point["intensity"] * math.exp((LEADER if on_right else -LEADER) * x_pixel)
        label = {"intensity": point["intensity"], "flops": point["flops"], "text": text, "label_x": label_x,
                 "align": "left" if on_right else "right", "label_y": math.exp(label_height)}  # fmt: skip
        labels.append(label | ({"tokens": point["tokens"]} if "tokens" in point else {}))
    return labels
