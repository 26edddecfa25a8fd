"""Charts that set models side by side: results with intervals, where parameters and FLOPs sit."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.common.stats import mean_and_half_width
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.parts import (
    CHARACTER,
    data,
    in_order,
    listed,
    need_rows,
    nice_range,
    number_format,
    plain,
    short,
)

Rows = Sequence[dict[str, Any]]
MEASURES = {"total": "parameters stored", "active": "parameters used per token", "flops": "FLOPs per token, forward"}


def model_comparison(
    rows: Rows,
    *,
    number: str = "",
    title: str = "How do the models compare?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.ConcatChart:
    """One panel a metric: each seed a small ring, the mean a dot with its 95% t-interval and its value written out.

    rows: {model, metric, value, seed (optional)}. Panels and models keep the order of the rows. `number` is the format
    of what is written, for values that three digits do not tell apart.
    """
    need_rows(rows, "model", "metric", "value")
    models, metrics = in_order(row["model"] for row in rows), in_order(row["metric"] for row in rows)
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        values.setdefault((row["metric"], row["model"]), []).append(float(plain(row["value"])))
    repeated = any(len(seen) > 1 for seen in values.values())
    if not subtitle and repeated:
        subtitle = "Ring: one seed. Dot and bar: mean and its 95% interval."
    if not description:
        parts = [
            f"{metric}: " + listed([f"{m} {_written(mean_and_half_width(values[metric, m])[0], None, number)}"
                                    for m in models if (metric, m) in values])
            for metric in metrics
        ]  # fmt: skip
        description = f"Dot chart of {len(models)} models by {listed(metrics)}. Means: {'; '.join(parts)}."
    columns = min(len(metrics), 3)
    names = min(max(len(model) for model in models) * 12 * CHARACTER, 150)
    width = int((theme.MAX_WIDTH - 50 - names) / columns - 36)
    panels = [
        _metric(
            metric,
            {m: values[metric, m] for m in models if (metric, m) in values},
            models,
            number,
            width,
            i % columns == 0,
        )
        for i, metric in enumerate(metrics)
    ]
    return theme.finish(alt.concat(*panels, columns=columns, spacing=22), title, subtitle, description)


def _written(mean: float, half: float | None, number: str) -> str:
    text = format(mean, number) if number else short(mean)
    return text if half is None else f"{text} ± {float(f'{half:.2g}'):g}"


def _metric(
    metric: str, values: dict[str, list[float]], models: list[str], number: str, width: int, first: bool
) -> Any:
    means: list[dict[str, Any]] = []
    for model, seen in values.items():
        mean, half = mean_and_half_width(seen)
        text = _written(mean, half, number)
        means.append(
            {"model": model, "mean": mean, "low": mean - (half or 0), "high": mean + (half or 0), "text": text}
        )
    seeds = [{"model": model, "value": v} for model, seen in values.items() for v in seen if len(seen) > 1]
    low, high = nice_range(
        [m["low"] for m in means] + [m["high"] for m in means] + [v for seen in values.values() for v in seen]
    )
    scale = alt.Scale(domain=[low, high], nice=False, zero=False)
    axis = alt.Axis(tickCount=3, format=number_format(high))
    y = alt.Y("model:N", sort=models, title=None, scale=alt.Scale(domain=models),
              axis=alt.Axis(labels=first, labelColor=theme.LIGHT["ink"], labelLimit=150, grid=True))  # fmt: skip
    for row in means:  # keep the number inside the panel
        half_text = len(row["text"]) * 11.5 * CHARACTER / 2 / width * (high - low)
        row["at"] = min(max(row["mean"], low + half_text), high - half_text)
    dots = alt.Chart(data(means)).encode(y=y)
    layers: list[Any] = [
        dots.mark_rule(strokeWidth=2, color=theme.LIGHT["line1"]).encode(
            x=alt.X("low:Q", scale=scale, axis=axis, title=None), x2="high:Q"
        ),
        alt.Chart(data(seeds)).mark_point(size=26, yOffset=9, stroke=theme.LIGHT["muted"], strokeWidth=1.2).encode(
            x="value:Q", y=y, tooltip=[alt.Tooltip("model:N"), alt.Tooltip("value:Q", title=metric, format=".4~g")]
        ),
        dots.mark_circle(size=80, color=theme.LIGHT["line1"], opacity=1).encode(
            x="mean:Q", tooltip=["model:N", "text:N"]
        ),
        dots.mark_text(dy=-15, fontSize=11.5).encode(x="at:Q", text="text:N"),
    ]  # fmt: skip
    heading = alt.TitleParams(metric, fontSize=12.5, offset=10)
    return alt.layer(*layers).properties(width=width, height=48 * len(models), title=heading)


def parameter_split(
    rows: Rows,
    *,
    shares: bool = False,
    title: str = "Where do parameters and FLOPs sit?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.VConcatChart:
    """One bar a model, cut by component, for parameters stored, parameters used per token and FLOPs per token.

    rows: {model, component, total, active, flops}; measures that no row holds are left out. At most eight components.
    shares: every bar is as long, for models of very different size.
    """
    need_rows(rows, "model", "component")
    models, components = in_order(row["model"] for row in rows), in_order(row["component"] for row in rows)
    if len(components) > len(theme.FILLS):
        raise InputError(
            f"components = {len(components)}: at most {len(theme.FILLS)} can be told apart; join small ones"
        )
    measures = [measure for measure in MEASURES if any(row.get(measure) is not None for row in rows)]
    if not measures:
        raise InputError(f"rows: no row holds any of {', '.join(MEASURES)}")
    width = int(theme.MAX_WIDTH - 130 - min(max(len(model) for model in models) * 12 * CHARACTER, 150))
    panels, said = [], []
    for measure in measures:
        segments, sums, lengths = _segments(rows, measure, models, width, shares)
        said.append(f"{MEASURES[measure]}: " + listed([f"{model} {short(sums[model])}" for model in models]))
        panels.append(_bars(segments, sums, lengths, components, width, MEASURES[measure]))
    description = description or f"Stacked bars of {len(models)} models by {listed(components)}. {'; '.join(said)}."
    return theme.finish(alt.vconcat(*panels, spacing=16), title, subtitle, description)


def _segments(
    rows: Rows, measure: str, models: list[str], width: int, shares: bool
) -> tuple[list[dict[str, Any]], dict[str, float], dict[str, float]]:
    """Bars cut into segments, each labelled where the label fits; the sum of each bar; its length, 1 the longest."""
    sums = {m: float(sum(plain(row.get(measure) or 0) for row in rows if row["model"] == m)) for m in models}
    widest = max(sums.values()) or 1.0
    lengths = {m: 1.0 if shares and sums[m] else sums[m] / widest for m in models}
    segments = []
    for model in models:
        at = 0.0
        for row in rows:
            size = float(plain(row.get(measure) or 0)) if row["model"] == model else 0.0
            if size <= 0:
                continue
            share = size / sums[model]
            length = share * lengths[model]
            room = (length * width - 8) / (10.5 * CHARACTER)
            text = next((t for t in (f"{row['component']} {share:.0%}", f"{share:.0%}") if len(t) <= room), "")
            segments.append({"model": model, "component": row["component"], "x0": at, "x1": at + length,
                             "middle": at + length / 2, "value": size, "share": share, "text": text})  # fmt: skip
            at += length
    return segments, sums, lengths


def _bars(
    segments: list[dict[str, Any]],
    sums: dict[str, float],
    lengths: dict[str, float],
    components: list[str],
    width: int,
    name: str,
) -> Any:
    models = list(sums)
    x = alt.X("x0:Q", title=None, axis=None, scale=alt.Scale(domain=[0, 1], nice=False))
    y = alt.Y("model:N", sort=models, title=None,
              axis=alt.Axis(labelColor=theme.LIGHT["ink"], labelLimit=150, grid=False))  # fmt: skip
    legend = alt.Legend(title=None, columns=min(len(components), 4), symbolType="square", orient="bottom")
    color = alt.Color("component:N", legend=legend,
                      scale=alt.Scale(domain=components, range=theme.FILLS[: len(components)]))  # fmt: skip
    tooltip = [alt.Tooltip("model:N"), alt.Tooltip("component:N"), alt.Tooltip("value:Q", format=".4~s"),
               alt.Tooltip("share:Q", format=".1%")]  # fmt: skip
    base = alt.Chart(data(segments)).encode(y=y)
    bars = base.mark_bar(stroke=theme.LIGHT["card"], strokeWidth=1).encode(x=x, x2="x1:Q", color=color, tooltip=tooltip)
    inside = base.mark_text(fontSize=10.5, color=theme.LIGHT["on_fill"]).encode(x="middle:Q", text="text:N")
    whole = alt.Chart(data([{"model": m, "end": lengths[m], "text": short(sums[m])} for m in models]))
    beside = whole.mark_text(align="left", dx=6, fontWeight=600).encode(x="end:Q", y=y, text="text:N")
    heading = alt.TitleParams(name, fontSize=12.5, offset=4)
    return alt.layer(bars, inside, beside).properties(width=width, height=30 * len(models), title=heading)
