"""The chart `bias_step`: how much does one step of the bias move, by the function that makes scores of logits?"""

from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import require
from dsmoe_lite.viz import identity, theme
from dsmoe_lite.viz.controls import Control
from dsmoe_lite.viz.helpers import data, distinct, plain, require_rows, word_list

WIDTH, HEIGHT = 470, 250  # px


def bias_step(
    rows: Sequence[dict[str, Any]],
    *,
    experts: int,
    title: str = "How many more tokens does one step of the bias bring?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Draw the growth of an expert's tokens against the spread of the logits, one line per kind of scores.

    rows: {scores, experts, spread, growth}; growth is a share above 0, drawn on a log scale. A menu of the numbers
    of experts works without a kernel and starts at `experts`.
    """
    require_rows(rows, "scores", "experts", "spread", "growth")
    points = [{key: plain(row[key]) for key in ("scores", "experts", "spread", "growth")} for row in rows]
    for point in points:
        require(point["growth"] > 0, "growth", point["growth"], "must be above 0: its axis is logarithmic")
    names, widest = distinct(point["scores"] for point in points), max(point["spread"] for point in points)
    ends = [p for p in points if p["spread"] == widest]
    at_start = [f"{p['scores']} {p['growth']:.2%}" for p in ends if p["experts"] == experts]
    description = description or (
        f"Line chart of the growth of an expert's tokens against the spread of the logits, for {experts} experts, a "
        f"number that a menu changes. At a spread of {widest:g}: {word_list(at_start)}."
    )
    control = Control("experts", "Experts", experts)
    low, high = (pick(point["growth"] for point in points) for pick in (min, max))
    scale = alt.Scale(type="log", domain=[low / 1.5, high * 1.5], nice=False)
    y = alt.Y("growth:Q", title="growth of the expert's tokens (log scale)", scale=scale,
              axis=alt.Axis(format="~%", values=[0.001, 0.01, 0.1, 1.0, 10.0]))  # fmt: skip
    x = alt.X("spread:Q", title="standard deviation of the logits", axis=alt.Axis(grid=False),
              scale=alt.Scale(domain=[min(p["spread"] for p in points), widest], nice=False))  # fmt: skip
    color = alt.Color("scores:N", legend=None, scale=alt.Scale(domain=names, range=identity.colors(names)))
    dash = alt.StrokeDash("scores:N", legend=None, scale=alt.Scale(domain=names, range=theme.DASHES[: len(names)]))
    tooltip = [alt.Tooltip("scores:N"), alt.Tooltip("spread:Q", title="standard deviation"),
               alt.Tooltip("growth:Q", format=".2%")]  # fmt: skip
    label = alt.Color("scores:N", legend=None, scale=alt.Scale(domain=names, range=identity.label_colors(names)))
    lines = control.filter(alt.Chart(data(points))).mark_line(strokeWidth=2)
    texts = control.filter(alt.Chart(data(ends))).mark_text(style="line_name", align="left", dx=8, fontWeight=600)
    chart = alt.layer(
        lines.encode(x=x, y=y, color=color, strokeDash=dash, tooltip=tooltip),
        texts.encode(x=x, y=y, text="scores:N", color=label),
    ).resolve_scale(color="independent")
    chart = chart.properties(width=WIDTH, height=HEIGHT).add_params(control.param(points))
    return theme.finish(chart, title, subtitle, description)
