"""Chart of who suffers when whose experts are gone."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.parts import CHARACTER, data, gradient, in_order, listed, need_rows, plain

PANELS = 2
CELL, ROW, GAP = 58, 36, 24  # px: a cell at most, a row, and between two panels


def effect_matrix(
    rows: Sequence[dict[str, Any]],
    *,
    value_title: str = "rise in loss (nats)",
    title: str = "Who suffers without whose experts?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.HConcatChart:
    """One panel a model: a row for each group whose experts are gone, a column for each group that may suffer.

    rows: {model, without, on, value}; several of one cell, as of several seeds, are averaged. Where a group meets the
    loss of its own experts the cell is framed. Values at or below 0 have the palest colour. At most two models.
    """
    need_rows(rows, "model", "without", "on", "value")
    models = in_order(row["model"] for row in rows)
    if len(models) > PANELS:
        raise InputError(f"models = {len(models)}: at most {PANELS} panels fit side by side")
    gone, hit = in_order(row["without"] for row in rows), in_order(row["on"] for row in rows)
    cells = {model: _cells([row for row in rows if row["model"] == model]) for model in models}
    high = max(0.001, *(cell["value"] for own in cells.values() for cell in own))
    if not description:
        peaks = {model: max(own, key=lambda cell: cell["value"]) for model, own in cells.items()}
        said = [f"{m}: most for {p['on']} without {p['without']}, {p['value']:+.3f}" for m, p in peaks.items()]
        description = (
            f"Heat map of {value_title}, {len(gone)} groups of experts gone by {len(hit)} hit. {listed(said)}."
        )
    subtitle = subtitle or "Row: whose experts are gone. Column: on whose tokens. Framed: their own."
    labels = int(max(map(len, gone)) * 12 * CHARACTER) + 8
    room = theme.MAX_WIDTH - 80 - labels - GAP * (len(models) - 1)
    cell = min(CELL, room // (len(models) * len(hit)))
    panels = [
        _panel(cells[model], gone, hit, high, value_title, labels if model == models[0] else 0).properties(
            width=cell * len(hit), height=ROW * len(gone),
            title=alt.TitleParams(model, fontSize=12.5, offset=6, frame="group"),
        )
        for model in models
    ]  # fmt: skip
    both = alt.hconcat(*panels, spacing=GAP).resolve_scale(color="shared")
    return theme.finish(both, title, subtitle, description)


def _cells(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["without"], row["on"]), []).append(float(plain(row["value"])))
    return [{"without": without, "on": on, "value": fmean(values)} for (without, on), values in found.items()]


def _panel(
    cells: list[dict[str, Any]], gone: list[str], hit: list[str], high: float, value_title: str, labels: int
) -> Any:
    """`labels`: px for the names of the rows, 0 without them."""
    x = alt.X("on:N", sort=hit, title="loss on", axis=alt.Axis(orient="top", labelAngle=0, labelFontSize=11))
    y = alt.Y("without:N", sort=gone, title="without the experts of" if labels else None,
              axis=alt.Axis(labels=labels > 0, minExtent=labels, labelColor=theme.LIGHT["ink"]))  # fmt: skip
    color = alt.Color("value:Q", scale=theme.ramp((0.0, high)), legend=gradient(value_title))
    on_cell = alt.condition(f"datum.value > {theme.DEEP_FROM * high:.4g}", alt.value(theme.LIGHT["on_deep"]),
                            alt.value(theme.LIGHT["on_pale"]))  # fmt: skip
    base = alt.Chart(data(cells)).encode(x=x, y=y)
    boxes = base.mark_rect(stroke=theme.LIGHT["card"], strokeWidth=2).encode(
        color=color, tooltip=["without:N", "on:N", alt.Tooltip("value:Q", title=value_title, format="+.3f")]
    )
    own = base.transform_filter("datum.without === datum.on").mark_rect(
        filled=False, stroke=theme.LIGHT["line2"], strokeWidth=2
    )
    numbers = base.mark_text(fontSize=11.5).encode(text=alt.Text("value:Q", format="+.2f"), color=on_cell)
    return alt.layer(boxes, own, numbers)
