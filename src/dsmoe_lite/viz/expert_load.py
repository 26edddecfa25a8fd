"""The chart `expert_load`: does every expert of a layer get its share of the tokens?"""

from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError, require
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.controls import binding
from dsmoe_lite.viz.helpers import data, expert_axis, gradient_legend, plain, require_rows

STARVED, OVERLOADED = 0.5, 1.5  # relative loads at which the colour changes
STATES = {"starved": "▼", "fair": "", "overloaded": "▲"}
WIDTH = 560  # px


def expert_load(
    loads: Sequence[float] | Sequence[dict[str, Any]],
    *,
    step: Any = None,
    title: str = "Does every expert get work?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart | alt.VConcatChart:
    """Draw the load of each expert over the mean load; ▼ below 0.5, ▲ above 1.5.

    loads: E counts, or rows {step, expert, load} for a slider over steps with the whole history below; it starts at
    `step`, by default the last.
    """
    history = _history(loads)
    steps = list(history)
    relative = {step: relative_load(counts) for step, counts in history.items()}
    rows = [
        {"step": step, "expert": f"e{e}", "load": load, "state": _state(load)}
        for step in steps
        for e, load in enumerate(relative[step])
    ]
    shown = steps[-1] if step is None else step
    require(shown in history, "step", step, f"must be one of {', '.join(map(str, steps))}")
    states = [_state(load) for load in relative[shown]]
    at_step = f" at step {shown}" if len(steps) > 1 else ""
    description = description or (
        f"Bar chart of the load of {len(states)} experts over the mean load{at_step}: "
        f"{states.count('starved')} starved, {states.count('overloaded')} overloaded, "
        f"highest {max(relative[shown]):.2f}."
    )
    subtitle = subtitle or f"▼ below {STARVED:g} times the mean load, ▲ above {OVERLOADED:g} times"
    if len(steps) == 1:
        return theme.finish(_load_bars(rows, len(states)), title, subtitle, description)
    step_param = alt.param(name="step", value=shown, bind=binding("Step", steps))
    bars = _load_bars(rows, len(states), step_param)
    return theme.finish(
        alt.vconcat(bars, _history_strip(rows, steps, step_param), spacing=14), title, subtitle, description
    )


def _history(loads: Sequence[Any]) -> dict[Any, list[float]]:
    if len(loads) == 0:
        raise InputError("loads = []: a chart needs at least one expert")
    if not isinstance(loads[0], dict):
        return {0: [float(plain(load)) for load in loads]}
    require_rows(loads, "step", "expert", "load")
    n_experts = 1 + max(int(plain(row["expert"])) for row in loads)
    history = {plain(step): [0.0] * n_experts for step in sorted({plain(row["step"]) for row in loads})}
    for row in loads:
        history[plain(row["step"])][int(plain(row["expert"]))] += float(plain(row["load"]))
    return history


def relative_load(counts: list[float]) -> list[float]:
    """Divide counts by their mean; 0 if there are none. `layers.load.relative_load` does so with tensors."""
    mean = sum(counts) / len(counts)
    return [count / mean if mean else 0.0 for count in counts]


def _state(load: float) -> str:
    return "starved" if load < STARVED else "overloaded" if load > OVERLOADED else "fair"


def _load_bars(rows: list[dict[str, Any]], n_experts: int, step_param: Any = None) -> Any:
    colors = [theme.LIGHT[state] for state in STATES]
    top = max(OVERLOADED + 0.2, 1.1 * max(row["load"] for row in rows))
    y = alt.Y("load:Q", title="load / mean load", scale=alt.Scale(domain=[0, top], nice=False),
              axis=alt.Axis(tickCount=5))  # fmt: skip
    color = alt.Color("state:N", legend=None, scale=alt.Scale(domain=list(STATES), range=colors))
    tooltip = [
        alt.Tooltip("expert:N"),
        alt.Tooltip("load:Q", title="load / mean", format=".3~g"),
        alt.Tooltip("state:N"),
    ]
    base = alt.Chart(data(rows)).encode(x=expert_axis(range(n_experts)), y=y)
    if step_param is not None:
        base = base.transform_filter(f"datum.step == {step_param.name}")
    signs = "{" + ", ".join(f"{state}: '{sign}'" for state, sign in STATES.items()) + "}"
    signed = base.transform_calculate(sign=f"{signs}[datum.state]")
    layers: list[Any] = [
        base.mark_bar().encode(color=color, tooltip=tooltip),
        signed.mark_text(dy=-7, fontSize=9.5, color=theme.LIGHT["ink"]).encode(text="sign:N"),
        *_mean_line(),
    ]
    chart = alt.layer(*layers)
    return (chart if step_param is None else chart.add_params(step_param)).properties(width=WIDTH, height=220)


def _mean_line() -> list[Any]:
    ink = theme.LIGHT["ink"]
    base = alt.Chart(data([{"load": 1.0, "name": "mean"}])).encode(y="load:Q")
    text = base.mark_text(align="left", dx=5, color=ink, fontSize=11)
    return [
        base.mark_rule(color=ink, strokeWidth=1.2, strokeDash=[2, 2]),
        text.encode(x=alt.value(WIDTH), text="name:N"),
    ]


def _history_strip(rows: list[dict[str, Any]], steps: list[Any], step_param: Any) -> Any:
    n_experts = len({row["expert"] for row in rows})
    labelled = [steps[0], steps[len(steps) // 2], steps[-1]]
    y = alt.Y("step:O", title="step", sort=steps, axis=alt.Axis(values=labelled))
    top = max(2.0, *(row["load"] for row in rows))
    legend = gradient_legend("load / mean", values=[0, 1, *(tick for tick in (2, 5, 10, 15) if tick <= top)])
    scale = alt.Scale(domain=[0, top], range=theme.RAMP, type="sqrt", interpolate="rgb")  # the fair share stays visible
    cells = alt.Chart(data(rows)).mark_rect().encode(
        x=expert_axis(range(n_experts), title=None, labels=False),
        y=y,
        color=alt.Color("load:Q", scale=scale, legend=legend),
        tooltip=["step:O", "expert:N", alt.Tooltip("load:Q", format=".3~g")],
    )  # fmt: skip
    chosen = alt.Chart(data({"step": step} for step in steps)).transform_filter(f"datum.step == {step_param.name}")
    frame = chosen.mark_rect(filled=False, stroke=theme.LIGHT["frame"], strokeWidth=2).encode(y=y)
    return alt.layer(cells, frame).properties(width=WIDTH, height=max(60, min(140, 6 * len(steps))))
