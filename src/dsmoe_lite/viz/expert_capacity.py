"""The chart `expert_capacity`: which experts are full, and how much is dropped, at a chosen capacity factor?"""

from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.controls import Control
from dsmoe_lite.viz.helpers import data, expert_axis, plain, require_rows

WIDTH, HEIGHT = 560, 230  # px


def expert_capacity(
    loads: Sequence[float],
    rows: Sequence[dict[str, Any]],
    *,
    factor: float,
    title: str = "Who is full, and what is dropped?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Draw the choices of each expert: filled up to its slots, hollow above, where they are dropped.

    loads: E counts of choices. rows: {capacity_factor, slots, drop_rate}, slots per expert and the share of all choices
    that is dropped; a slider over them works without a kernel and starts at `factor`.
    """
    if len(loads) == 0:
        raise InputError("loads = []: a chart needs at least one expert")
    require_rows(rows, "capacity_factor", "slots", "drop_rate")
    counts = [float(plain(load)) for load in loads]
    control = Control("capacity_factor", "Capacity factor c", factor)
    param, slots = control.param(rows), [_slots(row) for row in rows]
    at_start = next(row for row in slots if abs(row["capacity_factor"] - factor) < 1e-9)
    if not description:
        full = sum(count > at_start["slots"] for count in counts)
        description = f"Bar chart of the choices of {len(counts)} experts and of their slots, which a slider changes. "
        description += f"{at_start['text']}; {full} experts are full."
    subtitle = subtitle or "Filled: choices that have a slot. Hollow: choices that are dropped."
    return theme.finish(_bars(counts, slots, control).add_params(param), title, subtitle, description)


def _slots(row: dict[str, Any]) -> dict[str, Any]:
    factor, slots, lost = (plain(row[field]) for field in ("capacity_factor", "slots", "drop_rate"))
    text = f"c = {factor:.3g}: {slots:,} slots each, {lost:.1%} dropped"
    return {"capacity_factor": factor, "slots": slots, "drop_rate": lost, "text": text}


def _bars(counts: list[float], slots: list[dict[str, Any]], control: Control) -> Any:
    top = 1.04 * max(*counts, *(row["slots"] for row in slots))
    bars = alt.Chart(data({"expert": f"e{e}", "choices": count} for e, count in enumerate(counts)))
    # every bar beside the slots of every factor, of which the chosen one is kept
    table = {name: [row[name] for row in slots] for name in ("capacity_factor", "slots")}
    bars = bars.transform_calculate(**{name: str(values) for name, values in table.items()})
    bars = control.filter(bars.transform_flatten(list(table)))
    bars = bars.transform_calculate(kept="min(datum.choices, datum.slots)", dropped="datum.choices - datum.kept")
    axis, scale = alt.Axis(tickCount=5, format=",d"), alt.Scale(domain=[0, top], nice=False)
    y = alt.Y("kept:Q", title="choices of an expert", axis=axis, scale=scale)
    tooltip = ["expert:N", *(alt.Tooltip(f"{name}:Q", format=",d") for name in ("choices", "slots", "dropped"))]
    base = bars.encode(x=expert_axis(range(len(counts))), tooltip=tooltip)
    above = base.transform_filter("datum.dropped > 0")
    ink = theme.LIGHT["ink"]
    hollow: dict[str, Any] = {"fill": theme.LIGHT["card"], "stroke": ink, "strokeWidth": 1.2, "strokeDash": [3, 2]}
    chosen = control.filter(alt.Chart(data(slots))).encode(y="slots:Q")
    text: dict[str, Any] = {"align": "left", "fontWeight": 600, "color": ink}
    layers = [
        base.mark_bar(color=theme.LIGHT["line1"]).encode(y=y),
        above.mark_bar(**hollow).encode(y="kept:Q", y2="choices:Q"),
        chosen.mark_rule(color=ink, strokeWidth=1.6),
        chosen.mark_text(align="left", dx=5, color=ink, fontSize=11).encode(
            x=alt.value(WIDTH), text=alt.value("slots")
        ),
        chosen.mark_text(**text, baseline="bottom", dy=-6).encode(x=alt.value(0), y=alt.value(0), text="text:N"),
    ]
    return alt.layer(*layers).properties(width=WIDTH, height=HEIGHT)
