"""Chart of what is counted about an expert beside what it turns out to be worth."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.parts import data, in_order, listed, need_rows, nice_range, plain, short

NAMED = 3  # experts of a panel, those that are worth most
PANELS = 4
WIDTH, HEIGHT = 470, 240  # px, of all panels of a row, and of one


def worth_scatter(
    rows: Sequence[dict[str, Any]],
    *,
    x_title: str = "load (tokens over the mean)",
    y_title: str = "rise in loss without the expert (nats)",
    title: str = "Is a busy expert a needed one?",
    subtitle: str | Sequence[str] = "Dot: one expert, switched off alone. Line: no change. Named: the most needed.",
    description: str = "",
) -> alt.HConcatChart:
    """One panel a model: a dot for each expert, what is counted across and what it is worth upwards.

    rows: {model, expert, counted, worth}, one an expert of at most four models; axes are the same in all panels.
    """
    need_rows(rows, "model", "expert", "counted", "worth")
    models = in_order(row["model"] for row in rows)
    if len(models) > PANELS:
        raise InputError(f"models = {len(models)}: at most {PANELS} panels fit in a row")
    points = [{"model": row["model"], "expert": f"e{int(plain(row['expert']))}",
               **{field: float(plain(row[field])) for field in ("counted", "worth")}} for row in rows]  # fmt: skip
    of = {model: sorted((p for p in points if p["model"] == model), key=lambda p: -p["worth"]) for model in models}
    if not description:
        said = [f"{model}: most needed {own[0]['expert']}, {short(own[0]['worth'])} at {short(own[0]['counted'])}"
                for model, own in of.items()]  # fmt: skip
        description = f"Scatter of {y_title} against {x_title}, a dot an expert. {listed(said)}."
    across = alt.X("counted:Q", title=x_title, scale=_scale([p["counted"] for p in points]))
    domain = _scale([0.0, *(p["worth"] for p in points)])
    panels = [
        _panel(of[model], across, alt.Y("worth:Q", title=y_title, scale=domain))
        .properties(width=WIDTH // len(models), height=HEIGHT,
                    title=alt.TitleParams(model, fontSize=12, offset=6, frame="group"))
        for model in models
    ]  # fmt: skip
    return theme.finish(alt.hconcat(*panels, spacing=24), title, subtitle, description)


def _panel(points: list[dict[str, Any]], across: Any, upwards: Any) -> Any:
    base = alt.Chart(data(points)).encode(x=across, y=upwards)
    named = alt.Chart(data(points[:NAMED])).encode(x=across, y=upwards)
    none = alt.Chart(data([{"worth": 0.0}])).mark_rule(color=theme.LIGHT["ink"], strokeWidth=1).encode(y=upwards)
    dots = base.mark_circle(size=45, opacity=0.75, color=theme.LIGHT["line1"]).encode(
        tooltip=["expert:N", alt.Tooltip("counted:Q", format=".3~g"), alt.Tooltip("worth:Q", format=".3~g")]
    )
    names = named.mark_text(dx=6, align="left", fontSize=11, color=theme.LIGHT["ink"]).encode(text="expert:N")
    return alt.layer(none, dots, names)


def _scale(values: list[float]) -> alt.Scale:
    return alt.Scale(domain=list(nice_range(values)), nice=False, zero=False)
