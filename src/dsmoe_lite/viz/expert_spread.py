"""The chart `expert_spread`: how do the experts differ in one number, and how would they differ by chance?"""

from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.viz import theme
from dsmoe_lite.viz.helpers import (
    CHARACTER_WIDTH,
    data,
    distinct,
    nice_range,
    plain,
    require_rows,
    short_number,
    word_list,
)

KINDS = {"observed": "line1", "by chance": "muted"}  # upper and lower half of a model's row, and their colours
OFFSET = 11  # px from the middle of the row
WIDTH = 540  # px


def expert_spread(
    rows: Sequence[dict[str, Any]],
    *,
    x_title: str = "value per expert",
    title: str = "How do the experts differ?",
    subtitle: str | Sequence[str] = "Tick: one expert. Dot: mean over experts. Grey: the same by chance.",
    description: str = "",
) -> alt.LayerChart:
    """Draw one row per model: a tick per expert, a dot with the mean, and below them, in grey, the same by chance.

    rows: {model, value, null}, one per expert; null is the expert's value by chance.
    """
    require_rows(rows, "model", "value", "null")
    models = distinct(row["model"] for row in rows)
    fields = dict(zip(KINDS, ("value", "null"), strict=True))
    values = {(model, kind): [float(plain(row[field])) for row in rows if row["model"] == model]
              for model in models for kind, field in fields.items()}  # fmt: skip
    means = {key: sum(experts) / len(experts) for key, experts in values.items()}
    if not description:
        texts = word_list([f"{model} {short_number(means[model, 'observed'])}, by chance "
                           f"{short_number(means[model, 'by chance'])}" for model in models])  # fmt: skip
        description = f"Strip chart of {x_title}, one tick per expert. Means: {texts}."
    low, high = nice_range([value for experts in values.values() for value in experts])
    width = WIDTH - int(min(max(len(model) for model in models) * 12 * CHARACTER_WIDTH, 150))
    scale = alt.Scale(domain=[low, high], nice=False, zero=False)
    layers: list[Any] = []
    for kind, role in KINDS.items():
        offset, color = (-OFFSET if kind == "observed" else OFFSET), theme.LIGHT[role]
        ticks = [{"model": model, "x": value} for model in models for value in values[model, kind]]
        dots = [{"model": model, "x": means[model, kind], "text": short_number(means[model, kind])} for model in models]
        y = alt.Y("model:N", sort=models, title=None, axis=alt.Axis(labelColor=theme.LIGHT["ink"], labelLimit=150))
        x = alt.X("x:Q", title=x_title, scale=scale)
        experts, mean = alt.Chart(data(ticks)).encode(x=x, y=y), alt.Chart(data(dots)).encode(x=x, y=y)
        layers += [
            experts.mark_tick(yOffset=offset, size=14, thickness=1, opacity=0.55, color=color),
            mean.mark_circle(yOffset=offset, size=70, opacity=1, color=color).encode(tooltip=["model:N", "text:N"]),
            mean.mark_text(dy=2.3 * offset, fontSize=11).encode(text="text:N"),
        ]
    chart = alt.layer(*layers).properties(width=width, height=72 * len(models))
    return theme.finish(chart, title, subtitle, description)
