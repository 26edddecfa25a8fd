"""Charts of balance: what each loss sees, what each remedy costs, how far tokens must travel."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.common.stats import mean_and_half_width
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.parts import (
    data,
    in_order,
    listed,
    need_rows,
    nice_range,
    plain,
    short,
    spread,
)

Rows = Sequence[dict[str, Any]]
SHAPES = ("circle", "square", "triangle-up", "diamond")
LINE_HEIGHT = 17  # px between two names


def loss_table(
    rows: Rows,
    *,
    balanced: str,
    title: str = "What does each loss see?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """A table of losses by made-up routings; the darker a cell, the further above its value in column `balanced`.

    rows: {loss, routing, value}; a loss's darkest cell is its own highest value. A routing's name breaks at "|".
    """
    need_rows(rows, "loss", "routing", "value")
    losses, routings = in_order(row["loss"] for row in rows), in_order(row["routing"] for row in rows)
    values = {(row["loss"], row["routing"]): float(plain(row["value"])) for row in rows}
    if balanced not in routings:
        raise InputError(f"balanced = {balanced!r}: must be one of {', '.join(routings)}")
    deepest = max(name.count("|") for name in routings)
    shown = {name: " |" * (deepest - name.count("|")) + name for name in routings}  # the last lines stand level
    cells = []
    for (loss, routing), value in values.items():
        even = values[loss, balanced]
        most = max(values[loss, other] for other in routings if (loss, other) in values) - even
        rise = max(0.0, value - even) / most if most > 1e-9 else 0.0
        cells.append({"loss": loss, "routing": shown[routing], "value": value, "rise": rise, "text": f"{value:.4g}"})
    seen = {loss: [c["routing"].replace("|", " ").strip() for c in cells if c["loss"] == loss and c["rise"] > 0.01]
            for loss in losses}  # fmt: skip
    description = description or (
        f"Table of {len(losses)} losses by {len(routings)} made-up routings. Above its value at balance: "
        + "; ".join(f"{loss}: {listed(names) if names else 'none'}" for loss, names in seen.items())
    )
    subtitle = subtitle or "Number: the loss. Darker: further above its value at balance; pale: the loss sees nothing."
    x = alt.X("routing:N", sort=list(shown.values()), title=None,
              axis=alt.Axis(orient="top", labelAngle=0, labelExpr="split(datum.label, '|')", labelLineHeight=14,
            labelPadding=6 + 14 * deepest,
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
    texts = base.mark_text(fontSize=12).encode(text="text:N", color=color)
    width = min(88 * len(routings), theme.MAX_WIDTH - 190)
    chart = alt.layer(boxes, texts).properties(width=width, height=28 * len(losses))
    return theme.finish(chart, title, subtitle, description)


def balance_scatter(
    rows: Rows,
    *,
    title: str = "What does balance cost?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Loss above a baseline's against MaxVio: a ring for each seed, a mark for each method's mean, named at the right.

    rows: {method, family, max_vio, gap, overflow}; gap is a seed's loss minus the baseline's. At most four families,
    told apart by shape and colour. The name carries the mean overflow, a share in [0, 1].
    """
    need_rows(rows, "method", "family", "max_vio", "gap", "overflow")
    families = in_order(row["family"] for row in rows)
    if len(families) > len(SHAPES):
        raise InputError(f"families = {len(families)}: at most {len(SHAPES)} can be told apart")
    points = [{key: plain(value) for key, value in row.items()} for row in rows]
    means: list[dict[str, Any]] = []
    for method in in_order(row["method"] for row in points):
        own = [row for row in points if row["method"] == method]
        middle = {key: mean_and_half_width([row[key] for row in own])[0] for key in ("max_vio", "gap", "overflow")}
        text = f"{method} · {middle['overflow']:.0%} over"
        means.append({"method": method, "family": own[0]["family"], "text": text, **middle})
    low, high = nice_range([row["gap"] for row in points])
    left, right = min(row["max_vio"] for row in points) / 1.2, max(row["max_vio"] for row in points) * 1.2
    height = max(300, LINE_HEIGHT * (len(means) + 1))
    ends = spread([row["gap"] for row in means], LINE_HEIGHT * (high - low) / height, low, high)
    for row, end in zip(means, ends, strict=True):
        row |= {"end": end, "right": right}
    if not description:
        said = [f"{m['method']} {short(m['max_vio'])} and {m['gap']:+.2g}" for m in means]
        description = f"Scatter of the loss gap to a baseline against MaxVio for {len(means)} methods. Means: "
        description += listed(said, most=len(said)) + "."
    lines = ["Mark: mean. Ring: one seed. Right: share of choices over a capacity factor of 1.25."]
    x_scale = alt.Scale(type="log", domain=[left, right], nice=False)
    y_scale = alt.Scale(domain=[low, high], nice=False, zero=False)
    ticks = [tick for tick in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if left <= tick <= right]
    x = alt.X("max_vio:Q", title="MaxVio (log scale)", scale=x_scale, axis=alt.Axis(values=ticks, format="~g"))
    y = alt.Y("gap:Q", title="held-out loss minus none's (nats per token)", scale=y_scale, axis=alt.Axis(tickCount=5))
    color = alt.Color("family:N", legend=None, scale=alt.Scale(domain=families, range=theme.LINES[: len(families)]))
    label = alt.Color("family:N", legend=None,
                      scale=alt.Scale(domain=families, range=theme.LINE_LABELS[: len(families)]))  # fmt: skip
    shape = alt.Shape(
        "family:N",
        scale=alt.Scale(domain=families, range=list(SHAPES[: len(families)])),
        legend=alt.Legend(title=None, orient="top", symbolFillColor=theme.LIGHT["muted"], symbolStrokeWidth=0),
    )
    tooltip = [alt.Tooltip("method:N"), alt.Tooltip("max_vio:Q", title="MaxVio", format=".3~g"),
               alt.Tooltip("gap:Q", format=".4~g"), alt.Tooltip("overflow:Q", format=".1%")]  # fmt: skip
    rings = alt.Chart(data(points)).mark_point(size=22, strokeWidth=1, opacity=0.7).encode(
        x=x, y=y, color=color, tooltip=tooltip)  # fmt: skip
    named = alt.Chart(data(means))
    leaders = named.mark_rule(color=theme.LIGHT["fair"], strokeWidth=0.8).encode(x=x, y=y, x2="right:Q", y2="end:Q")
    marks = named.mark_point(filled=True, size=95, opacity=1).encode(x=x, y=y, color=color, shape=shape,
                                                                     tooltip=tooltip)  # fmt: skip
    names = named.mark_text(align="left", dx=6, fontSize=11.5).encode(
        x=alt.X("right:Q"), y=alt.Y("end:Q"), text="text:N", color=label
    )
    chart = alt.layer(leaders, rings, marks, names).resolve_scale(color="independent")
    return theme.finish(chart.properties(width=390, height=height), title, subtitle or lines, description)


def reach_curve(
    rows: Rows,
    *,
    title: str = "How far must a token travel?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.HConcatChart:
    """Devices that a token reaches, and affinity that it keeps, against the most devices it may reach.

    rows: {scores, limit, reached, kept}; kept is a share in [0, 1]; at most four kinds of scores.
    """
    need_rows(rows, "scores", "limit", "reached", "kept")
    kinds = in_order(row["scores"] for row in rows)
    if len(kinds) > len(theme.LINES):
        raise InputError(f"scores = {len(kinds)}: at most {len(theme.LINES)} lines can be told apart in one panel")
    first = min(plain(row["limit"]) for row in rows)
    if not description:
        said = [
            f"{kind} {float(row['reached']):.1f} devices, {float(row['kept']):.0%} kept"
            for kind in kinds
            for row in rows
            if row["scores"] == kind and row["limit"] == first
        ]
        description = "Two line charts against the device limit M: devices a token reaches and share of affinity "
        description += f"it keeps. At M = {first}: {listed(said)}."
    panels = [
        _against_limit(rows, kinds, "reached", "devices a token reaches", "~g", named=False),
        _against_limit(rows, kinds, "kept", "share of affinity kept", "%", named=True),
    ]
    return theme.finish(alt.hconcat(*panels, spacing=26), title, subtitle, description)


def _against_limit(rows: Rows, kinds: list[str], field: str, y_title: str, number: str, *, named: bool) -> Any:
    low, high = nice_range([float(plain(row[field])) for row in rows], zero=True)
    high = max(1.0, high) if number == "%" else high
    width, height = 250, 220
    limits = sorted({plain(row["limit"]) for row in rows})
    x = alt.X("limit:Q", title="device limit M", scale=alt.Scale(domain=[limits[0], limits[-1]], nice=False),
              axis=alt.Axis(values=limits, grid=False, format="d", labelOverlap=False))  # fmt: skip
    y = alt.Y(f"{field}:Q", title=y_title, scale=alt.Scale(domain=[low, high], nice=False),
              axis=alt.Axis(tickCount=5, format=number))  # fmt: skip
    color = alt.Color("scores:N", legend=None, scale=alt.Scale(domain=kinds, range=theme.LINES[: len(kinds)]))
    dash = alt.StrokeDash("scores:N", legend=None, scale=alt.Scale(domain=kinds, range=theme.DASHES[: len(kinds)]))
    tooltip = [alt.Tooltip("scores:N"), alt.Tooltip("limit:Q"), alt.Tooltip(f"{field}:Q", format=".3~g")]
    base = alt.Chart(data(rows)).encode(x=x, y=y, color=color, tooltip=tooltip)
    layers: list[Any] = [base.mark_line(strokeWidth=2).encode(strokeDash=dash), base.mark_circle(size=40, opacity=1)]
    if named:
        last = [next(row for row in rows if row["scores"] == kind and row["limit"] == limits[len(limits) // 3])
                for kind in kinds]  # fmt: skip
        places = spread([float(plain(row[field])) for row in last], 18 * (high - low) / height, low, high)
        spots = [{"scores": kind, "limit": limits[-1], field: place - 0.12 * (high - low)}
                 for kind, place in zip(kinds, places, strict=True)]  # fmt: skip
        label = alt.Color("scores:N", legend=None,
                          scale=alt.Scale(domain=kinds, range=theme.LINE_LABELS[: len(kinds)]))  # fmt: skip
        text = alt.Chart(data(spots)).mark_text(align="right", fontWeight=600)
        layers.append(text.encode(x=x, y=y, text="scores:N", color=label))
    return alt.layer(*layers).resolve_scale(color="independent").properties(width=width, height=height)
