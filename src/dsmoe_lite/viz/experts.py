"""Charts of the experts of one layer, and the question that each answers.

- expert_load: does every expert get its share of the tokens?
- domain_heatmap: do experts specialise by domain?
- router_probabilities: how does the router score the experts for one token?
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.helpers import data, distinct, expert_axis, gradient_legend, plain, require_rows

STARVED, OVERLOADED = 0.5, 1.5  # relative loads at which the colour changes
STATES = {"starved": "▼", "fair": "", "overloaded": "▲"}
WIDTH = 560  # px


def expert_load(
    loads: Sequence[float] | Sequence[dict[str, Any]],
    *,
    capacity: float | None = None,
    title: str = "Does every expert get work?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart | alt.VConcatChart:
    """Draw the load of each expert over the mean load; ▼ below 0.5, ▲ above 1.5.

    loads: E counts, or rows {step, expert, load} for a slider over steps with the whole history below. capacity: slots
    per expert, in the unit of the loads, drawn as a line.
    """
    history = _history(loads)
    steps = list(history)
    relative = {step: relative_load(counts) for step, counts in history.items()}
    rows = [
        {"step": step, "expert": f"e{e}", "load": load, "state": _state(load)}
        for step in steps
        for e, load in enumerate(relative[step])
    ]
    final = relative[steps[-1]]
    states = [_state(load) for load in final]
    at_step = f" at step {steps[-1]}" if len(steps) > 1 else ""
    description = description or (
        f"Bar chart of the load of {len(final)} experts over the mean load{at_step}: "
        f"{states.count('starved')} starved, {states.count('overloaded')} overloaded, highest {max(final):.2f}."
    )
    subtitle = subtitle or f"▼ below {STARVED:g} times the mean load, ▲ above {OVERLOADED:g} times"
    mean = sum(history[steps[-1]]) / len(final)
    limit = None if capacity is None else float(plain(capacity)) / (mean or 1.0)
    if len(steps) == 1:
        return theme.finish(_load_bars(rows, len(final), limit), title, subtitle, description)
    step_param = alt.param(name="step", value=steps[-1], bind=_step_control(steps))
    bars = _load_bars(rows, len(final), limit, step_param)
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


def _step_control(steps: list[Any]) -> Any:
    gaps = {later - earlier for earlier, later in pairwise(steps)}
    if len(gaps) == 1:
        return alt.binding_range(min=steps[0], max=steps[-1], step=gaps.pop(), name="Step ")
    return alt.binding_select(options=steps, name="Step ")


def _load_bars(rows: list[dict[str, Any]], n_experts: int, limit: float | None, step_param: Any = None) -> Any:
    colors = [theme.LIGHT[state] for state in STATES]
    top = max([OVERLOADED + 0.2, 1.1 * max(row["load"] for row in rows), *([1.1 * limit] if limit is not None else [])])
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
        *_level(1.0, "mean", theme.LIGHT["ink"]),
    ]
    if limit is not None:
        layers += _level(limit, "capacity", theme.LIGHT["label2"], above=limit >= 1.0)
    chart = alt.layer(*layers)
    return (chart if step_param is None else chart.add_params(step_param)).properties(width=WIDTH, height=220)


def _level(value: float, name: str, color: str, *, above: bool = False) -> list[Any]:
    """Draw a horizontal line with its name at the right end."""
    base = alt.Chart(data([{"load": value, "name": name}])).encode(y="load:Q")
    rule = base.mark_rule(color=color, strokeWidth=1.2, strokeDash=[6, 3] if above else [2, 2])
    text = base.mark_text(align="left", dx=5, dy=-8 if above and value < 1.15 else 0, color=color, fontSize=11)
    return [rule, text.encode(x=alt.value(WIDTH), text="name:N")]


def _history_strip(rows: list[dict[str, Any]], steps: list[Any], step_param: Any) -> Any:
    n_experts = len({row["expert"] for row in rows})
    labelled = [steps[0], steps[len(steps) // 2], steps[-1]]
    y = alt.Y("step:O", title="step", sort=steps, axis=alt.Axis(values=labelled))
    legend = gradient_legend("load / mean", values=[0, 1, 2])
    cells = alt.Chart(data(rows)).mark_rect().encode(
        x=expert_axis(range(n_experts), title=None, labels=False),
        y=y,
        color=alt.Color("load:Q", scale=theme.ramp((0, 2)), legend=legend),
        tooltip=["step:O", "expert:N", alt.Tooltip("load:Q", format=".3~g")],
    )  # fmt: skip
    chosen = alt.Chart(data({"step": step} for step in steps)).transform_filter(f"datum.step == {step_param.name}")
    frame = chosen.mark_rect(filled=False, stroke=theme.LIGHT["line2"], strokeWidth=2).encode(y=y)
    return alt.layer(cells, frame).properties(width=WIDTH, height=max(60, min(140, 6 * len(steps))))


def domain_heatmap(
    rows: Sequence[dict[str, Any]],
    *,
    null: Sequence[float],
    title: str = "Do experts specialise by domain?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.VConcatChart:
    """Draw the share of a domain's tokens that choose each expert, and below it the share of all tokens, the null.

    rows: {domain, expert, share}; null: E shares, every row if the domain did not matter. The tooltip shows the lift,
    share / null.
    """
    require_rows(rows, "domain", "expert", "share")
    baseline = [float(plain(share)) for share in null]
    domains = distinct(row["domain"] for row in rows)
    cells = []
    for row in rows:
        e, share = int(plain(row["expert"])), float(plain(row["share"]))
        if e >= len(baseline):
            raise InputError(f"expert = {e}: null has {len(baseline)} entries")
        lift = share / baseline[e] if baseline[e] else None
        cells.append({"domain": row["domain"], "expert": f"e{e}", "share": share, "lift": lift})
    null_cells = [
        {"domain": "all tokens", "expert": f"e{e}", "share": share, "lift": 1.0} for e, share in enumerate(baseline)
    ]
    highest = max(cell["share"] for cell in cells + null_cells) or 1.0
    strongest = max((cell for cell in cells if cell["lift"] is not None), key=lambda cell: cell["lift"], default=None)
    if not description:
        peak = "{expert} for {domain}, {lift:.1f} times".format(**strongest) if strongest else "none,"
        description = (
            f"Heat map of {len(domains)} domains by {len(baseline)} experts: share of tokens choosing each expert, "
            f"with the share of all tokens below. Highest lift: {peak} the share of all tokens."
        )
    subtitle = subtitle or [
        "Share of a domain's tokens that choose the expert.",
        "Bottom row: all tokens. Without specialisation every row would look like it.",
    ]
    width = min(WIDTH - 40, 60 * len(baseline))
    row_height = 30 if len(domains) <= 8 else 20
    domain_rows = _heat_map(cells, domains, len(baseline), highest, width, row_height, axis=False)
    null_row = _heat_map(null_cells, ["all tokens"], len(baseline), highest, width, row_height, axis=True)
    both = alt.vconcat(domain_rows, null_row, spacing=8).resolve_scale(color="shared")
    return theme.finish(both, title, subtitle, description)


def _heat_map(
    cells: list[dict[str, Any]],
    domains: list[str],
    n_experts: int,
    highest: float,
    width: int,
    row_height: int,
    *,
    axis: bool,
) -> Any:
    x = expert_axis(range(n_experts), title="expert" if axis else None, labels=axis)
    y = alt.Y("domain:N", sort=domains, title=None,
              axis=alt.Axis(labelColor=theme.LIGHT["ink"], minExtent=90, maxExtent=90, labelLimit=90))  # fmt: skip
    legend = gradient_legend("share of tokens", format="%")
    base = alt.Chart(data(cells)).encode(x=x, y=y)
    rects = base.mark_rect(stroke=theme.LIGHT["card"], strokeWidth=1).encode(
        color=alt.Color("share:Q", scale=theme.ramp((0.0, highest)), legend=legend),
        tooltip=["domain:N", "expert:N", alt.Tooltip("share:Q", format=".1%"),
                 alt.Tooltip("lift:Q", title="share / all tokens", format=".2f")],
    )  # fmt: skip
    layers: list[Any] = [rects]
    if width / n_experts >= 30:
        color = alt.condition(f"datum.share > {theme.DEEP_FROM * highest:.4g}", alt.value(theme.LIGHT["on_deep"]),
                              alt.value(theme.LIGHT["on_pale"]))  # fmt: skip
        layers.append(
            base.mark_text(style="in_cell", fontSize=11).encode(text=alt.Text("share:Q", format=".0%"), color=color)
        )
    return alt.layer(*layers).properties(width=width, height=row_height * len(domains))


def router_probabilities(
    scores: Sequence[float],
    chosen: Sequence[int],
    *,
    token: str,
    title: str = "",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Draw one token's router score for each expert; the chosen experts are outlined and labelled with their score.

    scores: E numbers in [0, 1]; chosen: expert ids, highest gate first.
    """
    chosen_ids = [int(plain(e)) for e in chosen if int(plain(e)) >= 0]
    values = [float(plain(score)) for score in scores]
    if not values or any(e >= len(values) for e in chosen_ids):
        raise InputError(f"chosen = {chosen_ids!r}: scores has {len(values)} entries")
    rows = [
        {"expert": f"e{e}", "score": value, "chosen": e in chosen_ids,
         "text": f"e{e} {value:.2f}" if e in chosen_ids else ""}
        for e, value in enumerate(values)
    ]  # fmt: skip
    scored = ", ".join(f"e{e} {values[e]:.2f}" for e in chosen_ids)
    description = (
        description or f"Bar chart of the router's score for {len(values)} experts on {token!r}; chosen: {scored}."
    )
    subtitle = subtitle or "Outlined: the chosen experts. Dotted: equal scores, a router without preferences."
    top = max(*values, 1.5 / len(values)) * 1.15
    y = alt.Y("score:Q", title="router score", scale=alt.Scale(domain=[0, top], nice=False), axis=alt.Axis(tickCount=4))
    base = alt.Chart(data(rows)).encode(x=expert_axis(range(len(values))), y=y)
    blue, pale, ink = theme.LIGHT["line1"], theme.LIGHT["fair"], theme.LIGHT["ink"]
    bars = base.mark_bar(strokeWidth=1.5).encode(
        color=alt.condition("datum.chosen", alt.value(blue), alt.value(pale)),
        stroke=alt.condition("datum.chosen", alt.value(ink), alt.value(pale)),
        tooltip=["expert:N", alt.Tooltip("score:Q", format=".3f"), "chosen:N"],
    )
    names = base.mark_text(dy=-8, fontSize=11, fontWeight=600).encode(text="text:N")
    even = alt.Chart(data([{"score": 1 / len(values)}])).mark_rule(strokeDash=[2, 2], color=ink).encode(y="score:Q")
    chart = alt.layer(bars, even, names).properties(width=WIDTH, height=170)
    return theme.finish(chart, title or f"Where does the router send {token!r}?", subtitle, description)
