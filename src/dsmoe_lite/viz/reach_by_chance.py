"""The chart `reach_by_chance`: how many devices does a token reach, by the number of experts that it chooses?"""

from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.viz import theme
from dsmoe_lite.viz.controls import Control
from dsmoe_lite.viz.helpers import data, plain, require_rows

WIDTH, HEIGHT = 500, 200  # px


def reach_by_chance(
    rows: Sequence[dict[str, Any]],
    *,
    devices: int,
    top_k: int,
    title: str = "How many devices does a token reach by chance?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Draw the devices that a token reaches against the experts that it chooses, with one number of experts marked.

    rows: {top_k, reached}; devices: how many there are. A slider over top_k works without a kernel and starts at top_k.
    """
    require_rows(rows, "top_k", "reached")
    control = Control("top_k", "Experts of a token, top-k", top_k)
    points = [_point(row, devices) for row in rows]
    start = next(point for point in points if point["top_k"] == top_k)
    description = description or (
        f"Line chart of the devices that a token reaches by chance against the experts that it chooses. "
        f"{start['text']}; a slider changes the number of experts."
    )
    subtitle = subtitle or f"Experts are drawn at random. Dashed: all {devices} devices."
    return theme.finish(
        _curve(points, devices, control).add_params(control.param(points)), title, subtitle, description
    )


def _point(row: dict[str, Any], devices: int) -> dict[str, Any]:
    k, reached = int(plain(row["top_k"])), float(plain(row["reached"]))
    experts = "1 expert" if k == 1 else f"{k} experts"
    return {"top_k": k, "reached": reached, "text": f"{experts}: {reached:.1f} of {devices} devices"}


def _curve(points: list[dict[str, Any]], devices: int, control: Control) -> Any:
    choices = [point["top_k"] for point in points]
    x = alt.X("top_k:Q", title="experts of a token", scale=alt.Scale(domain=[choices[0], choices[-1]], nice=False),
              axis=alt.Axis(grid=False, tickMinStep=1, format="d"))  # fmt: skip
    y = alt.Y("reached:Q", title="devices reached", axis=alt.Axis(tickCount=4, format="d"),
              scale=alt.Scale(domain=[0, 1.05 * devices], nice=False))  # fmt: skip
    base = alt.Chart(data(points)).encode(x=x, y=y)
    tooltip = [alt.Tooltip("top_k:Q", title="experts"), alt.Tooltip("reached:Q", title="devices", format=".3~g")]
    chosen = control.filter(base)
    line, fair = theme.LIGHT["line1"], theme.LIGHT["fair"]
    text: dict[str, Any] = {
        "align": "left",
        "baseline": "bottom",
        "dy": -5,
        "fontWeight": 600,
        "color": theme.LIGHT["line1_label"],
    }
    layers = [
        alt.Chart(data([{"reached": devices}])).mark_rule(color=theme.LIGHT["muted"], strokeDash=[4, 3]).encode(y=y),
        base.mark_line(color=fair, strokeWidth=1.5),
        base.mark_circle(color=fair, size=36, opacity=1).encode(tooltip=tooltip),
        chosen.mark_rule(color=line, strokeWidth=1.2).encode(y=y, y2=alt.datum(0)),
        chosen.mark_circle(color=line, size=120, opacity=1).encode(tooltip=tooltip),
        chosen.mark_text(**text).encode(x=alt.value(0), y=alt.value(0), text="text:N"),
    ]
    return alt.layer(*layers).properties(width=WIDTH, height=HEIGHT)
