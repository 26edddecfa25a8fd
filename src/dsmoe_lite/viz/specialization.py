"""The chart `specialization_against_null`: which experts are more specialised than chance, shuffled labels, gives?"""

from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.helpers import (
    CHARACTER_WIDTH,
    data,
    distinct,
    expert_axis,
    flatten_packed,
    nice_range,
    plain,
    require_rows,
    short_number,
)

Rows = Sequence[dict[str, Any]]
STATES = {
    "above chance": ("line1", "circle"),
    "within chance": ("muted", "diamond"),
    "below chance": ("line3", "triangle-down"),
}
FIELDS = ("value", "null_low", "null", "null_high")
WIDTH = 600  # px


def specialization_against_null(
    rows: Rows,
    *,
    value_title: str = "specialisation",
    title: str = "More than chance?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart | alt.VConcatChart:
    """Draw a mark per observed value over a bar, the interval of shuffled labels, with a tick at its middle value.

    rows: {what, expert (optional), value, null_low, null, null_high}. With experts there is one panel per layer or
    model (`what`), highest value first; without, one row each. Shape and colour show above, within and below chance.
    """
    require_rows(rows, "what", *FIELDS)
    marks = [_mark(row) for row in rows]
    by_expert = sum("expert" in mark for mark in marks)
    if by_expert not in (0, len(marks)):
        raise InputError("rows: some have an 'expert' and some do not: give it in all rows or in none")
    names = distinct(mark["what"] for mark in marks)
    groups = {name: [mark for mark in marks if mark["what"] == name] for name in names}
    texts = {name: _experts_text(groups[name]) if by_expert else _value_text(groups[name][0]) for name in names}
    if not description:
        unit = "experts" if by_expert else "values"
        description = f"{value_title} of {len(marks)} {unit} beside shuffled labels. "
        description += ". ".join(f"{name}: {texts[name]}" for name in names) + "."
    subtitle = subtitle or "Mark: observed. Bar and tick: interval and middle value with shuffled labels."
    states = [state for state in STATES if any(mark["state"] == state for mark in marks)]
    found = [mark[key] for mark in marks for key in ("value", "null_low", "null_high")]
    limits = nice_range(found, zero=not by_expert)
    if not by_expert:
        return theme.finish(_rows(marks, names, states, limits, value_title), title, subtitle, description)
    panels = [
        _panel(groups[name], states, limits, value_title).properties(
            title=alt.TitleParams(name, subtitle=texts[name], fontSize=12.5, subtitleFontSize=11.5, offset=6)
        )
        for name in names
    ]
    return theme.finish(alt.vconcat(*panels, spacing=16), title, subtitle, description)


def _mark(row: dict[str, Any]) -> dict[str, Any]:
    value, low, null, high = (float(plain(row[field])) for field in FIELDS)
    if not low <= null <= high:
        raise InputError(f"rows: {row['what']}: null_low = {low:g}, null = {null:g}, null_high = {high:g} must rise")
    state = "above chance" if value > high else "below chance" if value < low else "within chance"
    expert = {} if row.get("expert") is None else {"expert": f"e{int(plain(row['expert']))}"}
    numbers = dict(zip(FIELDS, (value, low, null, high), strict=True))
    return {"what": row["what"], **expert, **numbers, "state": state}


def _experts_text(marks: list[dict[str, Any]]) -> str:
    states = [mark["state"] for mark in marks]
    highest = max(marks, key=lambda mark: mark["value"])
    below = states.count("below chance")
    return (f"{states.count('above chance')} of {len(marks)} above chance" + (f", {below} below" if below else "")
            + f"; highest {highest['expert']} {short_number(highest['value'])}, "
            f"by chance {short_number(highest['null'])}")  # fmt: skip


def _value_text(mark: dict[str, Any]) -> str:
    return f"{short_number(mark['value'])}, by chance {short_number(mark['null'])}"


def _panel(marks: list[dict[str, Any]], states: list[str], limits: tuple[float, float], value_title: str) -> Any:
    """Draw the experts of one layer or model side by side, highest value first."""
    marks = sorted(marks, key=lambda mark: -mark["value"])
    if len({mark["expert"] for mark in marks}) < len(marks):
        raise InputError(f"rows: {marks[0]['what']} has an expert twice")
    step = min(30.0, WIDTH / len(marks))
    x = expert_axis([int(mark["expert"][1:]) for mark in marks], title=None)
    y = alt.Y("value:Q", title=value_title, scale=alt.Scale(domain=list(limits), nice=False, zero=False),
                  axis=alt.Axis(tickCount=4))  # fmt: skip
    columns = {field: " ".join(f"{mark[field]:.4g}" for mark in marks) for field in FIELDS}
    columns["e"] = " ".join(mark["expert"][1:] for mark in marks)
    columns["code"] = " ".join(str(states.index(mark["state"])) for mark in marks)
    layers = _layers({"x": x}, "expert:N", states, {"y": y}, 0.6 * step, 45)
    chart = flatten_packed(alt.layer(*layers, data=data([columns])), list(columns)).transform_calculate(
        expert="'e' + datum.e", state=f"split('{'|'.join(states)}', '|')[datum.code]"
    )
    return chart.properties(width=step * len(marks), height=120)


def _rows(
    marks: list[dict[str, Any]], names: list[str], states: list[str], limits: tuple[float, float], value_title: str
) -> Any:
    """Draw one row per layer or model."""
    if len(names) < len(marks):
        raise InputError("rows: without 'expert', each 'what' has one row")
    width = WIDTH - int(min(max(len(name) for name in names) * 12 * CHARACTER_WIDTH, 200))
    y = alt.Y("what:N", sort=names, title=None, axis=alt.Axis(labelColor=theme.LIGHT["ink"], labelLimit=200))
    x = alt.X("value:Q", title=value_title, scale=alt.Scale(domain=list(limits), nice=False, zero=False),
              axis=alt.Axis(tickCount=5, grid=False))  # fmt: skip
    layers = _layers({"y": y}, "what:N", states, {"x": x}, 14, 80)
    base = alt.Chart().encode(y=y)
    for value, edge, ahead in (("value", "value", 9), ("null", "null_high", 5)):
        number = base.transform_calculate(number=f"format(datum.{value}, '.2f')")
        text = number.mark_text(
            align="left", dx=ahead, fontSize=11, color=theme.LIGHT["muted" if value == "null" else "ink"]
        )
        layers.append(text.encode(x=alt.X(f"{edge}:Q"), text="number:N"))
    return alt.layer(*layers, data=data(marks)).properties(width=width, height=32 * len(names))


def _layers(
    name_axis: dict[str, Any], name: str, states: list[str], value_axis: dict[str, Any], thickness: float, size: int
) -> list[Any]:
    """Return bars, ticks and marks; each axis is given as {channel: encoding}."""
    base: Any = alt.Chart().encode(**name_axis)
    ((channel, axis),) = value_axis.items()
    interval = {channel: "null_low:Q", f"{channel}2": "null_high:Q"}
    colors, shapes = zip(*(STATES[state] for state in states), strict=True)
    color = alt.Color("state:N", scale=alt.Scale(domain=states, range=[theme.LIGHT[role] for role in colors]),
                      legend=alt.Legend(title=None, orient="top") if len(states) > 1 else None)  # fmt: skip
    shape = alt.Shape("state:N", scale=alt.Scale(domain=states, range=list(shapes)))
    numbers = [alt.Tooltip(f"{field}:Q", format=".3~g") for field in FIELDS]
    tooltip = [alt.Tooltip(name), alt.Tooltip("state:N"), *numbers]
    orient = "vertical" if channel == "x" else "horizontal"
    tick = base.mark_tick(orient=orient, size=thickness, thickness=1.5, opacity=1, color=theme.LIGHT["ink"])
    marks = base.mark_point(filled=True, size=size, opacity=1).encode(color=color, shape=shape, tooltip=tooltip)
    return [
        base.mark_rule(color=theme.LIGHT["fair"], strokeWidth=thickness).encode(**interval),
        tick.encode(**{channel: "null:Q"}),
        marks.encode(**{channel: axis}),
    ]
