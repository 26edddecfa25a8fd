"""The chart `trend_intervals`: which claimed trends appear, by the intervals of differences between models?"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError, require_choice
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.controls import Control
from dsmoe_lite.viz.helpers import CHARACTER_WIDTH, data, distinct, nice_range, plain, require_rows

VERDICTS = {  # verdict: role of its colour, shape
    "holds": ("line1", "circle"),
    "leans": ("line3", "circle"),
    "inconclusive": ("muted", "circle"),
    "reversed": ("line4", "triangle-left"),
}
FAR = 10.0  # an effect so many times the median of all is an arrow at the edge
NAME_SIZE, TEXT_SIZE = 12, 11.5  # font sizes
PLACE_WIDTH = 78  # px
ROW_HEIGHT = 27  # px


def trend_intervals(
    rows: Sequence[dict[str, Any]],
    *,
    seeds: int | None = None,
    x_title: str = "nats: against the paper ← 0 → as the paper reports",
    title: str = "Which trends appear?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Draw one row per claim: its words, a dot with its 95% interval beside a line at 0, and the verdict.

    rows: {label, place, mean, low, high, verdict, margins (optional)}, as study.rows.trend_rows returns them: effects
    are positive in the direction that the paper reports; ticks mark the margins. A dot is filled if the verdict is
    significant after correction. An effect far beyond all others is an arrow at the edge, with its number. seeds: rows
    have a number of seeds under this name; a slider over it works without a kernel and starts here.
    """
    require_rows(rows, "label", "place", "mean", "low", "high", "verdict")
    control = None if seeds is None else Control("seeds", "Seeds", seeds)
    marks = [_mark(row) | ({} if control is None else {"seeds": plain(row["seeds"])}) for row in rows]
    if len({(mark["name"], mark.get("seeds")) for mark in marks}) < len(marks):
        raise InputError("rows: two of them have the same 'label' and 'place'")
    for before, mark in zip([None, *marks], marks, strict=False):
        same = before and (before["place"], before.get("seeds")) == (mark["place"], mark.get("seeds"))
        mark["heading"] = "" if same else mark["place"]
    texts = "; ".join(f"{m['place']}, {m['label']}: {m['text']}" for m in marks if m.get("seeds") == seeds)
    moved = "" if control is None else f", with {seeds} seeds, a number that a slider changes"
    description = description or f"Dot chart of effects with 95% intervals, against 0{moved}: {texts}."
    margins = [margin for mark in marks for margin in mark["margins"]]
    far = _edge(marks)
    near = [value for mark in marks if abs(mark["mean"]) < far for value in (mark["low"], mark["high"])]
    domain = nice_range([0.0, *near, *margins])
    for mark in marks:
        mark["edge"] = domain[mark["mean"] > 0] if abs(mark["mean"]) >= far else None
    further = (["Tick: margin."] if margins else []) + (
        [f"Arrow: an effect beyond {far:.2g}."] if far < math.inf else []
    )
    subtitle = subtitle or [
        "Dot and bar: mean difference and its 95% interval. Filled: significant after correction.",
        *([" ".join(further)] if further else []),
    ]
    chart = _rows(marks, domain, x_title, control)
    chart = chart if control is None else chart.add_params(control.param(marks))
    return theme.finish(chart, title, subtitle, description)


def _rows(marks: list[dict[str, Any]], domain: tuple[float, float], x_title: str, control: Control | None) -> Any:
    names_width = max(len(mark["label"]) for mark in marks) * NAME_SIZE * CHARACTER_WIDTH + 14
    texts_width = max(len(mark["shown"]) for mark in marks) * TEXT_SIZE * CHARACTER_WIDTH
    width = int(max(theme.MAX_WIDTH - 44 - PLACE_WIDTH - names_width - texts_width, 140))
    scale = alt.Scale(domain=list(domain), nice=False, zero=False)
    x = alt.X("mean:Q", title=x_title, scale=scale, axis=alt.Axis(tickCount=5, grid=False))
    names = distinct(mark["name"] for mark in marks)
    y = alt.Y("name:N", sort=names, title=None, axis=None)
    verdicts = distinct(mark["verdict"] for mark in marks)
    colors = [theme.LIGHT[VERDICTS[verdict][0]] for verdict in verdicts]
    color = alt.Color("verdict:N", legend=None, scale=alt.Scale(domain=verdicts, range=colors))
    shape = alt.Shape("verdict:N", legend=None,
                      scale=alt.Scale(domain=verdicts, range=[VERDICTS[v][1] for v in verdicts]))  # fmt: skip
    rows = alt.Chart(data(marks))  # one copy of the data for all layers
    rows = rows if control is None else control.filter(rows)
    base = rows.encode(y=y)
    inside, beyond = base.transform_filter("datum.edge === null"), base.transform_filter("datum.edge !== null")
    dots = inside.encode(
        x=x, color=color, shape=shape, tooltip=["label:N", "place:N", alt.Tooltip("text:N", title="effect")]
    )
    ink, muted = theme.LIGHT["ink"], theme.LIGHT["muted"]
    layers: list[Any] = [
        rows.transform_aggregate(n="count()").transform_calculate(mean="0")
        .mark_rule(color=ink, strokeWidth=1.2).encode(x=x),
        inside.mark_rule(strokeWidth=3).encode(x=alt.X("low:Q"), x2="high:Q", color=color),
        dots.transform_filter("datum.filled").mark_point(size=80, filled=True, opacity=1),
        dots.transform_filter("!datum.filled").mark_point(size=70, fill=theme.LIGHT["card"], strokeWidth=2, opacity=1),
        beyond.mark_point(size=110, filled=True, opacity=1).encode(
            x=alt.X("edge:Q"), color=color, tooltip=["label:N", "place:N", alt.Tooltip("text:N", title="effect")],
            shape=alt.condition("datum.mean > 0", alt.value("triangle-right"), alt.value("triangle-left")),
        ),
        base.mark_text(style="row_place", align="left", fontSize=NAME_SIZE, color=muted).encode(
            x=alt.value(-int(names_width) - PLACE_WIDTH), text="heading:N"
        ),
        base.mark_text(style="row_name", align="left", fontSize=NAME_SIZE, color=ink).encode(
            x=alt.value(-int(names_width)), text="label:N"
        ),
        base.mark_text(style="row_text", align="left", dx=8, fontSize=TEXT_SIZE, color=ink).encode(
            x=alt.value(width), text="shown:N"
        ),
    ]  # fmt: skip
    if any(mark["margins"] for mark in marks):
        ticks = rows.transform_flatten(["margins"]).mark_tick(size=16, thickness=2, opacity=1, color=muted)
        layers.append(ticks.encode(y=y, x=alt.X("margins:Q")))
    return alt.layer(*layers).properties(width=width, height=ROW_HEIGHT * len(names))


def _mark(row: dict[str, Any]) -> dict[str, Any]:
    mean, low, high = (float(plain(row[field])) for field in ("mean", "low", "high"))
    require_choice("verdict", row["verdict"], VERDICTS)
    if not -math.inf < low <= mean <= high < math.inf:
        raise InputError(
            f"rows: {row['label']}: low = {low:g}, mean = {mean:g}, high = {high:g} must be in rising order"
        )
    shown = f"{row['verdict']}, {mean:+.3f}"
    text = f"{shown} ± {(high - low) / 2:.3f}"
    return {
        **{field: row[field] for field in ("label", "place", "verdict")},
        "name": f"{row['label']}|{row['place']}",
        "shown": shown,
        "text": text,
        "mean": mean,
        "low": low,
        "high": high,
        "filled": row["verdict"] in ("holds", "reversed"),
        "margins": [float(margin) for margin in row.get("margins", ())],
    }


def _edge(marks: list[dict[str, Any]]) -> float:
    """The effect from which a row is an arrow, or infinity if none is far from the others."""
    effects = [abs(mark["mean"]) for mark in marks]
    limit = FAR * statistics.median(effects)
    return limit if max(effects) > limit > 0 else math.inf
