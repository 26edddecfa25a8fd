"""The chart `expert_mix`: what does each expert work on?"""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.helpers import data, distinct, expert_axis, plain, require_rows

WIDTH, HEIGHT = 600, 230  # px


def expert_mix(
    rows: Sequence[dict[str, Any]],
    *,
    title: str = "What does each expert work on?",
    subtitle: str | Sequence[str] = "Above each bar: the effective number of kinds. One would be a specialist.",
    description: str = "",
) -> alt.LayerChart:
    """Draw one bar per expert, split by kind of text; above it the effective number of kinds, exp of the entropy.

    rows: {expert, kind, share}, shares at least 0; those of an expert are divided by their sum. At most eight kinds.
    """
    require_rows(rows, "expert", "kind", "share")
    experts, kinds = sorted({int(plain(row["expert"])) for row in rows}), distinct(row["kind"] for row in rows)
    if len(kinds) > len(theme.FILLS):
        raise InputError(f"kinds = {len(kinds)}: at most {len(theme.FILLS)} can be distinguished; join small ones")
    shares = {expert: dict.fromkeys(kinds, 0.0) for expert in experts}
    for row in rows:
        shares[int(plain(row["expert"]))][row["kind"]] += float(plain(row["share"]))
    segments, numbers = [], {}
    for expert, by_kind in shares.items():
        whole, start = sum(by_kind.values()) or 1.0, 0.0
        parts = {kind: share / whole for kind, share in by_kind.items()}
        numbers[expert] = math.exp(-sum(part * math.log(part) for part in parts.values() if part > 0))
        for kind, part in parts.items():
            segments.append({"expert": f"e{expert}", "kind": kind, "y0": start, "y1": start + part, "share": part})
            start += part
    if not description:
        least, most = min(numbers, key=lambda e: numbers[e]), max(numbers, key=lambda e: numbers[e])
        description = (
            f"Stacked bars of {len(experts)} experts by {len(kinds)} kinds of text. Effective number of kinds: "
            f"mean {sum(numbers.values()) / len(numbers):.1f}, from {numbers[least]:.1f} for e{least} to "
            f"{numbers[most]:.1f} for e{most}."
        )
    axis = alt.Axis(format=".0%", values=[0, 0.25, 0.5, 0.75, 1])
    y = alt.Y("y0:Q", title="share of the expert's tokens", scale=alt.Scale(domain=[0, 1], nice=False), axis=axis)
    legend = alt.Legend(title=None, columns=min(len(kinds), 5), symbolType="square", orient="bottom")
    color = alt.Color("kind:N", legend=legend, scale=alt.Scale(domain=kinds, range=theme.FILLS[: len(kinds)]))
    bars = alt.Chart(data(segments)).mark_bar(stroke=theme.LIGHT["card"], strokeWidth=1)
    above = alt.Chart(data([{"expert": f"e{e}", "y0": 1.0, "text": f"{n:.1f}"} for e, n in numbers.items()]))
    tooltip = ["expert:N", "kind:N", alt.Tooltip("share:Q", format=".1%")]
    layers = [
        bars.encode(x=expert_axis(experts), y=y, y2="y1:Q", color=color, tooltip=tooltip),
        above.mark_text(style="in_cell", dy=-8, fontSize=11).encode(x=expert_axis(experts), y=y, text="text:N"),
    ]
    return theme.finish(alt.layer(*layers).properties(width=WIDTH, height=HEIGHT), title, subtitle, description)
