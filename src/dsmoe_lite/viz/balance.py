"""Charts of load balance, and the question that each answers.

- loss_table: which kinds of imbalance does each balance loss see?
- reach_curve: how many devices must a token reach under a device limit?
"""

from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import identity, theme
from dsmoe_lite.viz.helpers import (
    data,
    distinct,
    nice_range,
    plain,
    require_rows,
    separate_labels,
    word_list,
)

Rows = Sequence[dict[str, Any]]
LABEL_GAP = 17  # px between two labels


def loss_table(
    rows: Rows,
    *,
    balanced: str,
    title: str = "What does each loss see?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Draw a table of losses by made-up routings; colour: how far above its value in column `balanced`.

    rows: {loss, routing, value}; the strongest colour of a loss is its highest value. A routing's name breaks at "|".
    """
    require_rows(rows, "loss", "routing", "value")
    losses, routings = distinct(row["loss"] for row in rows), distinct(row["routing"] for row in rows)
    values = {(row["loss"], row["routing"]): float(plain(row["value"])) for row in rows}
    if balanced not in routings:
        raise InputError(f"balanced = {balanced!r}: must be one of {', '.join(routings)}")
    breaks = max(name.count("|") for name in routings)
    labels = {name: " |" * (breaks - name.count("|")) + name for name in routings}  # aligned at the last line
    cells = []
    for (loss, routing), value in values.items():
        at_balance = values[loss, balanced]
        largest_rise = max(values[loss, other] for other in routings if (loss, other) in values) - at_balance
        rise = max(0.0, value - at_balance) / largest_rise if largest_rise > 1e-9 else 0.0
        cells.append({"loss": loss, "routing": labels[routing], "value": value, "rise": rise, "text": f"{value:.4g}"})
    above = {loss: [c["routing"].replace("|", " ").strip() for c in cells if c["loss"] == loss and c["rise"] > 0.01]
            for loss in losses}  # fmt: skip
    description = description or (
        f"Table of {len(losses)} losses by {len(routings)} made-up routings. Imbalance that each loss sees: "
        + "; ".join(f"{loss}: {word_list(names) if names else 'none'}" for loss, names in above.items())
    )
    subtitle = (
        subtitle or "Number: the loss. Darker: further above its value at balance. Pale: the loss sees no imbalance."
    )
    x = alt.X("routing:N", sort=list(labels.values()), title=None,
              axis=alt.Axis(orient="top", labelAngle=0, labelExpr="split(datum.label, '|')", labelLineHeight=14,
            labelPadding=6 + 14 * breaks,
                            labelColor=theme.LIGHT["ink"], labelFontSize=11.5, grid=False))  # fmt: skip
    y = alt.Y("loss:N", sort=losses, title=None, axis=alt.Axis(labelColor=theme.LIGHT["ink"], labelLimit=150))
    base = alt.Chart(data(cells)).encode(x=x, y=y)
    boxes = base.mark_rect(stroke=theme.LIGHT["card"], strokeWidth=2).encode(
        color=alt.Color("rise:Q", scale=theme.ramp((0.0, 1.0)), legend=None),
        tooltip=["loss:N", "routing:N", alt.Tooltip("value:Q", format=".4~g")],
    )
    color = alt.condition(
        f"datum.rise > {theme.DEEP_FROM}", alt.value(theme.LIGHT["on_deep"]), alt.value(theme.LIGHT["on_pale"])
    )
    texts = base.mark_text(style="in_cell", fontSize=12).encode(text="text:N", color=color)
    width = min(88 * len(routings), theme.MAX_WIDTH - 190)
    chart = alt.layer(boxes, texts).properties(width=width, height=28 * len(losses))
    return theme.finish(chart, title, subtitle, description)


def reach_curve(
    rows: Rows,
    *,
    title: str = "How far must a token travel?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.HConcatChart:
    """Draw the devices that a token reaches, and the share of its affinity kept, against the device limit M.

    rows: {scores, limit, reached, affinity}; affinity is the share kept, in [0, 1]. One line per kind of scores, at
    most four.
    """
    require_rows(rows, "scores", "limit", "reached", "affinity")
    kinds = distinct(row["scores"] for row in rows)
    if len(kinds) > theme.N_LINES:
        raise InputError(f"scores = {len(kinds)}: at most {theme.N_LINES} lines can be distinguished in one panel")
    first = min(plain(row["limit"]) for row in rows)
    if not description:
        at_first = [
            f"{kind} {float(row['reached']):.1f} devices, {float(row['affinity']):.0%} kept"
            for kind in kinds
            for row in rows
            if row["scores"] == kind and row["limit"] == first
        ]
        description = (
            "Two line charts against the device limit M: devices that a token reaches, and share of its affinity "
        )
        description += f"kept. At M = {first}: {word_list(at_first)}."
    panels = [
        _against_limit(rows, kinds, "reached", "devices reached per token", "~g", named=False),
        _against_limit(rows, kinds, "affinity", "share of affinity kept", "%", named=True),
    ]
    return theme.finish(alt.hconcat(*panels, spacing=26), title, subtitle, description)


def _against_limit(rows: Rows, kinds: list[str], field: str, y_title: str, number_format: str, *, named: bool) -> Any:
    low, high = nice_range([float(plain(row[field])) for row in rows], zero=True)
    high = max(1.0, high) if number_format == "%" else high
    width, height = 250, 220
    limits = sorted({plain(row["limit"]) for row in rows})
    x = alt.X("limit:Q", title="device limit M", scale=alt.Scale(domain=[limits[0], limits[-1]], nice=False),
              axis=alt.Axis(values=limits, grid=False, format="d", labelOverlap=False))  # fmt: skip
    y = alt.Y(f"{field}:Q", title=y_title, scale=alt.Scale(domain=[low, high], nice=False),
              axis=alt.Axis(tickCount=5, format=number_format))  # fmt: skip
    color = alt.Color("scores:N", legend=None, scale=alt.Scale(domain=kinds, range=identity.colors(kinds)))
    dash = alt.StrokeDash("scores:N", legend=None, scale=alt.Scale(domain=kinds, range=theme.DASHES[: len(kinds)]))
    tooltip = [alt.Tooltip("scores:N"), alt.Tooltip("limit:Q"), alt.Tooltip(f"{field}:Q", format=".3~g")]
    base = alt.Chart(data(rows)).encode(x=x, y=y, color=color, tooltip=tooltip)
    layers: list[Any] = [base.mark_line(strokeWidth=2).encode(strokeDash=dash), base.mark_circle(size=40, opacity=1)]
    if named:
        labelled = [next(row for row in rows if row["scores"] == kind and row["limit"] == limits[len(limits) // 3])
                    for kind in kinds]  # fmt: skip
        heights = separate_labels([float(plain(row[field])) for row in labelled], 18 * (high - low) / height, low, high)
        labels = [{"scores": kind, "limit": limits[-1], field: y_value - 0.12 * (high - low)}
                  for kind, y_value in zip(kinds, heights, strict=True)]  # fmt: skip
        label_color = alt.Color("scores:N", legend=None,
                                scale=alt.Scale(domain=kinds, range=identity.label_colors(kinds)))  # fmt: skip
        text = alt.Chart(data(labels)).mark_text(align="right", fontWeight=600)
        layers.append(text.encode(x=x, y=y, text="scores:N", color=label_color))
    return alt.layer(*layers).resolve_scale(color="independent").properties(width=width, height=height)
