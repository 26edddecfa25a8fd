"""Chart of one number of every expert, beside what chance would give."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.viz import theme
from dsmoe_lite.viz.parts import CHARACTER, data, in_order, listed, need_rows, nice_range, plain, short

KINDS = {"as it is": "line1", "by chance": "muted"}  # upper and lower half of a model's row
OFFSET = 11  # px from the middle of the row
WIDTH = 540


def expert_spread(
    rows: Sequence[dict[str, Any]],
    *,
    x_title: str = "value of an expert",
    title: str = "How do the experts differ?",
    subtitle: str | Sequence[str] = "Tick: one expert. Dot: mean over experts. Grey: the same by chance.",
    description: str = "",
) -> alt.LayerChart:
    """One row a model: a tick for each expert, the mean a dot with its value, and chance beneath in grey.

    rows: {model, value, null}, one an expert; null is the expert's value by chance.
    """
    need_rows(rows, "model", "value", "null")
    models = in_order(row["model"] for row in rows)
    fields = dict(zip(KINDS, ("value", "null"), strict=True))
    values = {(model, kind): [float(plain(row[field])) for row in rows if row["model"] == model]
              for model in models for kind, field in fields.items()}  # fmt: skip
    means = {key: sum(seen) / len(seen) for key, seen in values.items()}
    if not description:
        said = listed([f"{model} {short(means[model, 'as it is'])}, by chance {short(means[model, 'by chance'])}"
                       for model in models])  # fmt: skip
        description = f"Strip chart of {x_title}, one tick an expert. Means: {said}."
    low, high = nice_range([value for seen in values.values() for value in seen])
    width = WIDTH - int(min(max(len(model) for model in models) * 12 * CHARACTER, 150))
    x = alt.Scale(domain=[low, high], nice=False, zero=False)
    layers: list[Any] = []
    for kind, role in KINDS.items():
        offset, color = (-OFFSET if kind == "as it is" else OFFSET), theme.LIGHT[role]
        ticks = [{"model": model, "x": value} for model in models for value in values[model, kind]]
        dots = [{"model": model, "x": means[model, kind], "text": short(means[model, kind])} for model in models]
        y = alt.Y("model:N", sort=models, title=None, axis=alt.Axis(labelColor=theme.LIGHT["ink"], labelLimit=150))
        across = alt.X("x:Q", title=x_title, scale=x)
        drawn, centre = alt.Chart(data(ticks)).encode(x=across, y=y), alt.Chart(data(dots)).encode(x=across, y=y)
        layers += [
            drawn.mark_tick(yOffset=offset, size=14, thickness=1, opacity=0.55, color=color),
            centre.mark_circle(yOffset=offset, size=70, opacity=1, color=color).encode(tooltip=["model:N", "text:N"]),
            centre.mark_text(dy=2.3 * offset, fontSize=11).encode(text="text:N"),
        ]
    chart = alt.layer(*layers).properties(width=width, height=72 * len(models))
    return theme.finish(chart, title, subtitle, description)
