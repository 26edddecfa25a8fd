"""The chart `fp8_error`: what does one large number cost those that share its scale?"""

from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import require
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.controls import Control
from dsmoe_lite.viz.helpers import data, distinct, plain, require_rows, word_list

WIDTH, ROW_HEIGHT = 470, 34  # px


def fp8_error(
    rows: Sequence[dict[str, Any]],
    *,
    outlier: float,
    title: str = "How exact are the numbers beside an outlier?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Draw the relative error of a vector in FP8 as one bar per way to share scales, for a chosen size of an outlier.

    rows: {scales, outlier, error}; error is a share, drawn on a log scale. A slider over the sizes, evenly spaced on a
    log scale, works without a kernel; it starts at `outlier`. A tick marks the error without an outlier, the smallest
    of the sizes.
    """
    require_rows(rows, "scales", "outlier", "error")
    marks = [{key: plain(row[key]) for key in ("scales", "outlier", "error")} for row in rows]
    names, smallest = distinct(mark["scales"] for mark in marks), min(mark["outlier"] for mark in marks)
    for mark in marks:
        require(mark["error"] > 0, "error", mark["error"], "must be above 0: its axis is logarithmic")
        mark["text"] = "100%" if mark["error"] >= 0.995 else f"{100 * mark['error']:.2g}%"
    control = Control("outlier", "Outlier", outlier, base=10)
    at_start = [f"{m['scales']} {m['text']}" for m in marks if abs(m["outlier"] / outlier - 1) < 1e-6]
    description = description or (
        f"Bar chart of relative errors with an outlier of {outlier:g}, a size that a slider changes: "
        f"{word_list(at_start)}."
    )
    subtitle = subtitle or "Mean relative error of the other numbers. Tick: without the outlier."
    low, high = min(mark["error"] for mark in marks) / 2, max(mark["error"] for mark in marks) * 2
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    x = alt.X("error:Q", title="relative error (log scale)", scale=scale,
              axis=alt.Axis(format="~%", grid=True, values=[0.001, 0.01, 0.1, 1.0]))  # fmt: skip
    y = alt.Y("scales:N", sort=names, title=None, axis=alt.Axis(labelLimit=200, labelColor=theme.LIGHT["ink"]))
    tooltip = [alt.Tooltip("scales:N", title="one scale for"), alt.Tooltip("text:N", title="error")]
    base = alt.Chart(data(marks))
    chosen = control.filter(base)
    without = base.transform_filter(f"abs(datum.outlier - {smallest:g}) < {smallest / 1000:g}")
    layers = [
        chosen.mark_bar(color=theme.LIGHT["line1"], cornerRadiusEnd=3, height=16).encode(
            x=x, x2=alt.datum(low), y=y, tooltip=tooltip
        ),
        without.mark_tick(color=theme.LIGHT["line4"], thickness=2.5, size=24).encode(x=x, y=y),
        chosen.mark_text(align="left", dx=6, fontWeight=600).encode(x=x, y=y, text="text:N"),
    ]
    chart = alt.layer(*layers).properties(width=WIDTH, height=ROW_HEIGHT * len(names)).add_params(control.param(marks))
    return theme.finish(chart, title, subtitle, description)
