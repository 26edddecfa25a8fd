"""Charts that compare models, and the question that each answers.

- model_comparison: how do the models differ in each metric?
- parameter_split: which components have the parameters and FLOPs of each model?
"""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError, require
from dsmoe_lite.common.stats import mean_and_half_width
from dsmoe_lite.viz import identity, theme
from dsmoe_lite.viz.controls import Control
from dsmoe_lite.viz.helpers import (
    CHARACTER_WIDTH,
    data,
    distinct,
    nice_range,
    number_format,
    plain,
    require_rows,
    short_number,
    word_list,
)

Rows = Sequence[dict[str, Any]]
MEASURES = {"total": "parameters stored", "active": "parameters used per token", "flops": "FLOPs per token, forward"}


def model_comparison(
    rows: Rows,
    *,
    title: str = "How do the models compare?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.ConcatChart:
    """Draw one panel per metric: a small ring per seed, and the mean as a dot with its 95% t-interval and its value.

    rows: {model, metric, value, seed (optional)}. Panels and models keep the order of the rows. The values of a panel
    have as many decimals as its intervals justify.
    """
    require_rows(rows, "model", "metric", "value")
    models, metrics = distinct(row["model"] for row in rows), distinct(row["metric"] for row in rows)
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        values.setdefault((row["metric"], row["model"]), []).append(float(plain(row["value"])))
    repeated = any(len(seeds) > 1 for seeds in values.values())
    if not subtitle and repeated:
        subtitle = "Ring: one seed. Dot and bar: mean and its 95% interval."
    if not description:
        parts = [
            f"{metric}: " + word_list([f"{m} {text}" for m, text in _texts(_of_metric(values, metric)).items()])
            for metric in metrics
        ]
        description = f"Dot chart of {len(models)} models by {word_list(metrics)}. Means: {'; '.join(parts)}."
    columns = min(len(metrics), 3)
    names_width = min(max(len(model) for model in models) * 12 * CHARACTER_WIDTH, 150)
    width = int((theme.MAX_WIDTH - 50 - names_width) / columns - 36)
    panels = [
        _metric_panel(metric, _of_metric(values, metric), models, width, i % columns == 0)
        for i, metric in enumerate(metrics)
    ]
    return theme.finish(alt.concat(*panels, columns=columns, spacing=22), title, subtitle, description)


def _of_metric(values: dict[tuple[str, str], list[float]], metric: str) -> dict[str, list[float]]:
    return {model: of_seeds for (name, model), of_seeds in values.items() if name == metric}


def _texts(values: dict[str, list[float]]) -> dict[str, str]:
    """The mean of each model, with half its 95% interval if its seeds differ."""
    found = {model: mean_and_half_width(of_seeds) for model, of_seeds in values.items()}
    half_widths = [half_width for _, half_width in found.values() if half_width]
    if not half_widths:
        return {model: short_number(mean) for model, (mean, _) in found.items()}
    shape = f"z,.{_decimals(half_widths)}f"
    texts = {}
    for model, (mean, half_width) in found.items():
        margin = format(half_width or 0.0, shape)
        texts[model] = format(mean, shape) + (f" ± {margin}" if float(margin.replace(",", "")) else "")
    return texts


def _decimals(half_widths: list[float]) -> int:
    """Decimals that show a digit of each interval, two after a leading 1; at most one more than the widest needs."""
    narrowest, widest = (max(0, -math.floor(math.log10(w / 2))) for w in (min(half_widths), max(half_widths)))
    return min(narrowest, widest + 1)


def _metric_panel(metric: str, values: dict[str, list[float]], models: list[str], width: int, first: bool) -> Any:
    means: list[dict[str, Any]] = []
    for model, text in _texts(values).items():
        mean, half_width = mean_and_half_width(values[model])
        margin = half_width or 0
        means.append({"model": model, "mean": mean, "low": mean - margin, "high": mean + margin, "text": text})
    seeds = [{"model": model, "value": v} for model, of_seeds in values.items() for v in of_seeds if len(of_seeds) > 1]
    low, high = nice_range(
        [m["low"] for m in means] + [m["high"] for m in means] + [v for of_seeds in values.values() for v in of_seeds]
    )
    scale = alt.Scale(domain=[low, high], nice=False, zero=False)
    axis = alt.Axis(tickCount=3, format=number_format(high))
    y = alt.Y("model:N", sort=models, title=None, scale=alt.Scale(domain=models),
              axis=alt.Axis(labels=first, labelColor=theme.LIGHT["ink"], labelLimit=150, grid=True))  # fmt: skip
    for row in means:  # keep the text inside the panel
        half_text = len(row["text"]) * 11.5 * CHARACTER_WIDTH / 2 / width * (high - low)
        row["text_x"] = min(max(row["mean"], low + half_text), high - half_text)
    color = alt.Color("model:N", legend=None,
                      scale=alt.Scale(domain=models, range=identity.colors(models, alike=True)))  # fmt: skip
    dots = alt.Chart(data(means)).encode(y=y)
    layers: list[Any] = [
        dots.mark_rule(strokeWidth=2).encode(
            x=alt.X("low:Q", scale=scale, axis=axis, title=None), x2="high:Q", color=color
        ),
        alt.Chart(data(seeds)).mark_point(size=26, yOffset=9, stroke=theme.LIGHT["muted"], strokeWidth=1.2).encode(
            x="value:Q", y=y, tooltip=[alt.Tooltip("model:N"), alt.Tooltip("value:Q", title=metric, format=".4~g")]
        ),
        dots.mark_circle(size=80, opacity=1).encode(
            x="mean:Q", color=color, tooltip=["model:N", "text:N"]
        ),
        dots.mark_text(dy=-15, fontSize=11.5).encode(x="text_x:Q", text="text:N"),
    ]  # fmt: skip
    heading = alt.TitleParams(metric, fontSize=12.5, offset=10)
    return alt.layer(*layers).properties(width=width, height=48 * len(models), title=heading)


def parameter_split(
    rows: Rows,
    *,
    shares: bool = False,
    seq_len: int | None = None,
    title: str = "Where are the parameters and FLOPs?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.VConcatChart:
    """Draw one bar per model, split by component: parameters stored, parameters used per token, FLOPs per token.

    rows: {model, component, total, active, flops}; measures that no row has are left out. At most eight components.
    shares: make all bars equally long, for models of very different size. seq_len, with shares: rows may be for one
    sequence length each, a power of two in `seq_len`; a slider, which starts here and needs no kernel, moves the FLOPs.
    """
    require_rows(rows, "model", "component")
    models, components = distinct(row["model"] for row in rows), distinct(row["component"] for row in rows)
    if len(components) > len(identity.COMPONENTS):
        raise InputError(
            f"components = {len(components)}: at most {len(identity.COMPONENTS)} can be distinguished; join small ones"
        )
    measures = [measure for measure in MEASURES if any(row.get(measure) is not None for row in rows)]
    if not measures:
        raise InputError(f"rows: no row has any of {', '.join(MEASURES)}")
    width = int(theme.MAX_WIDTH - 130 - min(max(len(model) for model in models) * 12 * CHARACTER_WIDTH, 150))
    require(shares or seq_len is None, "seq_len", seq_len, "needs shares: bars would change their length")
    control = None if seq_len is None else Control("seq_len", "Sequence length S", seq_len, base=2)
    panels, totals = [], []
    for measure in measures:
        moves = control if measure == "flops" else None
        drawn: list[dict[str, Any]] = []
        ends: list[dict[str, Any]] = []
        for n in moves.values(rows) if moves else [seq_len]:
            of_n = [row for row in rows if row.get("seq_len", n) == n]
            segments, sums, lengths = _segments(of_n, measure, models, width, shares)
            chosen = {row["model"]: {"seq_len": n} for row in of_n if moves and "seq_len" in row}
            drawn += [{**segment, **chosen.get(segment["model"], {})} for segment in segments]
            ends += [
                {"model": m, "end": lengths[m], "text": short_number(sums[m]), **chosen.get(m, {})} for m in models
            ]
            if n == seq_len:
                summed = word_list([f"{model} {short_number(sums[model])}" for model in models])
                totals.append(f"{MEASURES[measure]}: {summed}")
        drawn, ends = ([row for i, row in enumerate(of) if row not in of[:i]] for of in (drawn, ends))
        panels.append(_bars(drawn, ends, models, components, width, MEASURES[measure], moves))
    description = (
        description or f"Stacked bars of {len(models)} models by {word_list(components)}. {'; '.join(totals)}."
    )
    chart = alt.vconcat(*panels, spacing=16)
    if control is not None:
        chart = chart.add_params(control.param(rows))
        description += f" FLOPs are for {seq_len:,} tokens; a slider changes this."
    return theme.finish(chart, title, subtitle, description)


def _sums(rows: Rows, measure: str, models: list[str]) -> dict[str, float]:
    return {m: float(sum(plain(row.get(measure) or 0) for row in rows if row["model"] == m)) for m in models}


def _segments(
    rows: Rows, measure: str, models: list[str], width: int, shares: bool
) -> tuple[list[dict[str, Any]], dict[str, float], dict[str, float]]:
    """Return the segments of all bars, labelled if the label fits; each bar's sum; its share of the longest bar."""
    sums = _sums(rows, measure, models)
    weights = ("total", "active")  # stored and used: one scale
    alike = weights if measure in weights else (measure,)
    largest = max(size for one in alike for size in _sums(rows, one, models).values()) or 1.0
    lengths = {m: 1.0 if shares and sums[m] else sums[m] / largest for m in models}
    segments = []
    for model in models:
        start = 0.0
        for row in rows:
            size = float(plain(row.get(measure) or 0)) if row["model"] == model else 0.0
            if size <= 0:
                continue
            share = size / sums[model]
            length = share * lengths[model]
            max_characters = (length * width - 8) / (10.5 * CHARACTER_WIDTH)
            text = next(
                (t for t in (f"{row['component']} {share:.0%}", f"{share:.0%}") if len(t) <= max_characters), ""
            )
            segments.append({"model": model, "component": row["component"], "x0": start, "x1": start + length,
                             "middle": start + length / 2, "value": size, "share": share, "text": text})  # fmt: skip
            start += length
    return segments, sums, lengths


def _bars(
    segments: list[dict[str, Any]],
    ends: list[dict[str, Any]],
    models: list[str],
    components: list[str],
    width: int,
    name: str,
    control: Control | None,
) -> Any:
    x = alt.X("x0:Q", title=None, axis=None, scale=alt.Scale(domain=[0, 1], nice=False))
    y = alt.Y("model:N", sort=models, title=None,
              axis=alt.Axis(labelColor=theme.LIGHT["ink"], labelLimit=150, grid=False))  # fmt: skip
    legend = alt.Legend(title=None, columns=min(len(components), 4), symbolType="square", orient="bottom")
    color = alt.Color("component:N", legend=legend,
                      scale=alt.Scale(domain=components, range=identity.component_colors(components)))  # fmt: skip
    tooltip = [alt.Tooltip("model:N"), alt.Tooltip("component:N"), alt.Tooltip("value:Q", format=".4~s"),
               alt.Tooltip("share:Q", format=".1%")]  # fmt: skip
    base, sums = alt.Chart(data(segments)), alt.Chart(data(ends))
    heading: Any = name
    if control is not None:
        base, sums = control.filter(base), control.filter(sums)
        heading = alt.ExprRef(f"'{name}: S = ' + format({control.reading}, ',.0f') + ' tokens'")
    base = base.encode(y=y)
    bars = base.mark_bar(stroke=theme.LIGHT["card"], strokeWidth=1).encode(x=x, x2="x1:Q", color=color, tooltip=tooltip)
    segment_texts = base.mark_text(style="in_segment", fontSize=10.5, color=theme.LIGHT["on_fill"]).encode(
        x="middle:Q", text="text:N"
    )
    total_texts = sums.mark_text(align="left", dx=6, fontWeight=600).encode(x="end:Q", y=y, text="text:N")
    panel_title = alt.TitleParams(heading, fontSize=12.5, offset=4)
    return alt.layer(bars, segment_texts, total_texts).properties(
        width=width, height=30 * len(models), title=panel_title
    )
