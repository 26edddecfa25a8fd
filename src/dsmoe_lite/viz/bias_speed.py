"""The chart `bias_speed`: how fast should loss-free balancing move its biases?"""

import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

import altair as alt

from dsmoe_lite.viz import theme
from dsmoe_lite.viz.controls import Control
from dsmoe_lite.viz.curves import over_seeds
from dsmoe_lite.viz.helpers import data, flatten_packed, nice_range, plain, require_rows, word_list

TRACE_WIDTH, ENDS_WIDTH, HEIGHT = 350, 190, 240  # px


def bias_speed(
    rows: Sequence[dict[str, Any]],
    *,
    speed: float,
    last: int = 100,
    title: str = "How fast should the bias move?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.HConcatChart:
    """Draw MaxVio batch by batch for a chosen bias speed, the others in grey; beside it MaxVio at the end by speed.

    rows: {speed, batch, max_vio}. A slider over the speeds, evenly spaced on a log scale, works without a kernel; it
    starts at `speed`. The end is the mean of the `last` batches.
    """
    require_rows(rows, "speed", "batch", "max_vio")
    by_speed: dict[float, list[tuple[int, float]]] = {}
    for row in rows:
        by_speed.setdefault(float(plain(row["speed"])), []).append((plain(row["batch"]), float(plain(row["max_vio"]))))
    ends, traces = [], []
    for value in sorted(by_speed):
        points = sorted(by_speed[value])
        end = mean(vio for _, vio in points[-last:])
        ends.append({"speed": value, "end": end, "text": f"γ = {value:.2g}: MaxVio {end:.2f} at the end"})
        binned = over_seeds([{"model": "", "batch": batch, "y": vio} for batch, vio in points], "y", x="batch")[""]
        batches, vios = (" ".join(f"{point[key]:.4g}" for point in binned) for key in ("x", "mean"))
        traces.append({"speed": value, "batch": batches, "max_vio": vios})
    control = Control("speed", "Bias speed γ", speed, base=10)
    if not description:
        texts = word_list([f"{row['speed']:.2g}: {row['end']:.2f}" for row in ends], limit=len(ends))
        description = f"Line chart of MaxVio against batch for {len(ends)} bias speeds, which a slider chooses, and "
        description += f"MaxVio at the end by speed: {texts}."
    subtitle = subtitle or f"Grey: the other speeds. The end: the mean of the last {last} batches."
    chart = alt.hconcat(_trace(traces, ends, control), _ends(ends, control), spacing=30)
    return theme.finish(chart.add_params(control.param(ends)), title, subtitle, description)


def _trace(traces: list[dict[str, Any]], ends: list[dict[str, Any]], control: Control) -> Any:
    vios = [float(vio) for trace in traces for vio in trace["max_vio"].split()]
    batches = [float(batch) for trace in traces for batch in trace["batch"].split()]
    x = alt.X("batch:Q", title="batch", axis=alt.Axis(grid=False, tickCount=4),
              scale=alt.Scale(domain=[0, max(batches)], nice=False))  # fmt: skip
    scale = alt.Scale(domain=list(nice_range(vios, zero=True)), nice=False)
    y = alt.Y("max_vio:Q", title="MaxVio", axis=alt.Axis(tickCount=5), scale=scale)
    base = alt.Chart(data(traces))
    tooltip = [alt.Tooltip("batch:Q", format="d"), alt.Tooltip("max_vio:Q", title="MaxVio", format=".3~g")]
    others = flatten_packed(base, ["batch", "max_vio"]).mark_line(color=theme.LIGHT["fair"], strokeWidth=1)
    chosen = flatten_packed(control.filter(base), ["batch", "max_vio"])
    text = control.filter(alt.Chart(data(ends))).mark_text(
        align="left", baseline="bottom", dy=-5, fontWeight=600, color=theme.LIGHT["line1_label"]
    )
    layers = [
        others.encode(x=x, y=y, detail="speed:N"),
        chosen.mark_line(color=theme.LIGHT["line1"], strokeWidth=2.2).encode(x=x, y=y, tooltip=tooltip),
        text.encode(x=alt.value(0), y=alt.value(0), text="text:N"),
    ]
    return alt.layer(*layers).properties(width=TRACE_WIDTH, height=HEIGHT)


def _ends(ends: list[dict[str, Any]], control: Control) -> Any:
    speeds = [row["speed"] for row in ends]
    powers = range(math.ceil(math.log10(speeds[0]) - 0.01), math.floor(math.log10(speeds[-1]) + 0.01) + 1)
    x = alt.X("speed:Q", title="bias speed γ (log scale)",
              scale=alt.Scale(type="log", domain=[speeds[0], speeds[-1]], nice=False, padding=8),
              axis=alt.Axis(grid=False, values=[10.0**power for power in powers], format="~r"))  # fmt: skip
    scale = alt.Scale(domain=list(nice_range([row["end"] for row in ends], zero=True)), nice=False)
    y = alt.Y("end:Q", title="MaxVio at the end", axis=alt.Axis(tickCount=5), scale=scale)
    tooltip = [alt.Tooltip("speed:Q", title="γ", format=".3~r"), alt.Tooltip("end:Q", title="MaxVio", format=".3~g")]
    base = alt.Chart(data(ends)).encode(x=x, y=y)
    dots = base.mark_circle(size=40, opacity=1, color=theme.LIGHT["fair"]).encode(tooltip=tooltip)
    chosen = control.filter(base).mark_circle(size=110, opacity=1, color=theme.LIGHT["line1"])
    line = base.mark_line(color=theme.LIGHT["fair"], strokeWidth=1.5)
    return alt.layer(line, dots, chosen.encode(tooltip=tooltip)).properties(width=ENDS_WIDTH, height=HEIGHT)
