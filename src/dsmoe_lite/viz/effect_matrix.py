"""The chart `effect_matrix`: whose loss rises when the experts of which group are switched off?"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.helpers import CHARACTER_WIDTH, data, distinct, gradient_legend, plain, require_rows, word_list

MAX_PANELS = 2
MAX_CELL, ROW, GAP = 58, 36, 24  # px: width of a cell, height of a row, between two panels


def effect_matrix(
    rows: Sequence[dict[str, Any]],
    *,
    value_title: str = "rise in loss (nats)",
    title: str = "Whose loss rises without whose experts?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.HConcatChart:
    """Draw one panel per model: a row per group whose experts are disabled, a column per group whose loss is measured.

    rows: {model, without, on, value}; values of the same cell, such as seeds, are averaged. A frame marks the effect of
    a group's experts on the group itself. Values at or below 0 have the palest colour. At most two models.
    """
    require_rows(rows, "model", "without", "on", "value")
    models = distinct(row["model"] for row in rows)
    if len(models) > MAX_PANELS:
        raise InputError(f"models = {len(models)}: at most {MAX_PANELS} panels fit side by side")
    disabled, measured = distinct(row["without"] for row in rows), distinct(row["on"] for row in rows)
    cells = {model: _cells([row for row in rows if row["model"] == model]) for model in models}
    high = max(0.001, *(cell["value"] for of_model in cells.values() for cell in of_model))
    if not description:
        peaks = {model: max(of_model, key=lambda cell: cell["value"]) for model, of_model in cells.items()}
        texts = [f"{m}: most on {p['on']} without {p['without']}, {p['value']:+.3f}" for m, p in peaks.items()]
        groups = f"{len(disabled)} groups of disabled experts by {len(measured)} groups of tokens"
        description = f"Heat map of {value_title}, {groups}. {word_list(texts)}."
    subtitle = subtitle or "Row: whose experts are disabled. Column: on whose tokens. Framed: both the same."
    label_width = int(max(map(len, disabled)) * 12 * CHARACTER_WIDTH) + 8
    available = theme.MAX_WIDTH - 80 - label_width - GAP * (len(models) - 1)
    cell_width = min(MAX_CELL, available // (len(models) * len(measured)))
    panels = [
        _panel(cells[model], disabled, measured, high, value_title, 0 if i else label_width).properties(
            width=cell_width * len(measured), height=ROW * len(disabled),
            title=alt.TitleParams(model, fontSize=12.5, offset=6, frame="group"),
        )
        for i, model in enumerate(models)
    ]  # fmt: skip
    both = alt.hconcat(*panels, spacing=GAP).resolve_scale(color="shared")
    return theme.finish(both, title, subtitle, description)


def _cells(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        values.setdefault((row["without"], row["on"]), []).append(float(plain(row["value"])))
    return [{"without": without, "on": on, "value": fmean(runs)} for (without, on), runs in values.items()]


def _panel(
    cells: list[dict[str, Any]],
    disabled: list[str],
    measured: list[str],
    high: float,
    value_title: str,
    label_width: int,
) -> Any:
    """`label_width`: px for the names of the rows, 0 to leave them out."""
    x = alt.X("on:N", sort=measured, title="loss on", axis=alt.Axis(orient="top", labelAngle=0, labelFontSize=11))
    y = alt.Y("without:N", sort=disabled, title="without the experts of" if label_width else None,
              axis=alt.Axis(labels=label_width > 0, minExtent=label_width, labelColor=theme.LIGHT["ink"]))  # fmt: skip
    color = alt.Color("value:Q", scale=theme.ramp((0.0, high)), legend=gradient_legend(value_title))
    text_color = alt.condition(f"datum.value > {theme.DEEP_FROM * high:.4g}", alt.value(theme.LIGHT["on_deep"]),
                            alt.value(theme.LIGHT["on_pale"]))  # fmt: skip
    base = alt.Chart(data(cells)).encode(x=x, y=y)
    boxes = base.mark_rect(stroke=theme.LIGHT["card"], strokeWidth=2).encode(
        color=color, tooltip=["without:N", "on:N", alt.Tooltip("value:Q", title=value_title, format="+.3f")]
    )
    frames = base.transform_filter("datum.without === datum.on").mark_rect(
        filled=False, stroke=theme.LIGHT["frame"], strokeWidth=2
    )
    numbers = base.mark_text(style="in_cell", fontSize=11.5).encode(
        text=alt.Text("value:Q", format="+.2f"), color=text_color
    )
    return alt.layer(boxes, frames, numbers)
