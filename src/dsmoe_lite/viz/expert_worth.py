"""The chart `expert_worth`: does a count, such as an expert's load, predict the loss of switching the expert off?"""

from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import identity, theme
from dsmoe_lite.viz.helpers import data, distinct, nice_range, plain, require_rows, short_number, word_list

N_NAMED = 3  # experts with a name in each panel: those worth most, and the one furthest right
MAX_PANELS = 4
WIDTH, HEIGHT = 470, 240  # px: width of all panels together, height of each


def expert_worth(
    rows: Sequence[dict[str, Any]],
    *,
    x_title: str = "load / mean load",
    y_title: str = "rise in loss without the expert (nats)",
    title: str = "Is a busy expert an important one?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.HConcatChart:
    """Draw one panel per model: a dot per expert, its count on the x axis, its worth on the y axis.

    rows: {model, expert, counted, worth}, one per expert, of at most four models. All panels have the same axes.
    """
    require_rows(rows, "model", "expert", "counted", "worth")
    models = distinct(row["model"] for row in rows)
    if len(models) > MAX_PANELS:
        raise InputError(f"models = {len(models)}: at most {MAX_PANELS} panels fit in a row")
    points = [{"model": row["model"], "expert": f"e{int(plain(row['expert']))}",
               **{field: float(plain(row[field])) for field in ("counted", "worth")}} for row in rows]  # fmt: skip
    by_worth = {
        model: sorted((p for p in points if p["model"] == model), key=lambda p: -p["worth"]) for model in models
    }
    if not description:
        texts = [f"{model}: most important {best['expert']}, {short_number(best['worth'])} at "
                 f"{short_number(best['counted'])}" for model, (best, *_) in by_worth.items()]  # fmt: skip
        description = f"Scatter plot of {y_title} against {x_title}, one dot per expert. {word_list(texts)}."
    subtitle = subtitle or [
        "Dot: one expert, switched off alone. Line: no change.",
        "Named: the most important, and the one furthest right.",
    ]
    x = alt.X("counted:Q", title=x_title, scale=_scale([p["counted"] for p in points]))
    y = alt.Y("worth:Q", title=y_title, scale=_scale([0.0, *(p["worth"] for p in points)]))
    panels = [
        _panel(by_worth[model], x, y, color, {"counted": x_title, "worth": y_title})
        .properties(width=WIDTH // len(models), height=HEIGHT,
                    title=alt.TitleParams(model, fontSize=12, offset=6, frame="group"))
        for model, color in zip(models, identity.colors(models, alike=True), strict=True)
    ]  # fmt: skip
    return theme.finish(alt.hconcat(*panels, spacing=24), title, subtitle, description)


def _panel(points: list[dict[str, Any]], x: Any, y: Any, color: str, titles: dict[str, str]) -> Any:
    base = alt.Chart(data(points)).encode(x=x, y=y)
    furthest = max(points, key=lambda point: float(point["counted"]))
    named = [*points[:N_NAMED], *([furthest] if furthest not in points[:N_NAMED] else [])]
    no_change = alt.Chart(data([{"worth": 0.0}])).mark_rule(color=theme.LIGHT["ink"], strokeWidth=1).encode(y=y)
    dots = base.mark_circle(size=45, opacity=0.75, color=color).encode(
        tooltip=[
            "expert:N",
            *(alt.Tooltip(f"{field}:Q", title=title, format=".3~g") for field, title in titles.items()),
        ]
    )
    ink = theme.LIGHT["ink"]
    others = alt.Chart(data(point for point in named if point is not furthest)).encode(x=x, y=y, text="expert:N")
    last = alt.Chart(data([furthest])).encode(x=x, y=y, text="expert:N")  # above its dot: the frame is near
    texts = [
        others.mark_text(dx=6, align="left", fontSize=11, color=ink),
        last.mark_text(dy=-10, fontSize=11, color=ink),
    ]
    return alt.layer(no_change, dots, *texts)


def _scale(values: list[float]) -> alt.Scale:
    return alt.Scale(domain=list(nice_range(values)), nice=False, zero=False)
