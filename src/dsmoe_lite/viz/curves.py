"""Line charts, and the question that each answers; `line_panel` draws the lines of other charts too.

- training_curves: how fast does each model learn?
- capacity_curve: how much capacity does it take to drop no token?
"""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import identity, theme
from dsmoe_lite.viz.helpers import (
    data,
    distinct,
    nice_range,
    number_format,
    plain,
    require_rows,
    separate_labels,
    short_number,
    word_list,
)

MAX_LINES = 4  # in one panel
BOLD_CHARACTER_WIDTH = 0.66  # mean width of a character of a name, in font sizes
MAX_NAME_WIDTH = 130  # px
MAX_POINTS, MAX_POINTS_SMALL = 100, 60  # of a line, and of one in a small panel: longer runs are averaged into bins

Rows = Sequence[dict[str, Any]]
Lines = dict[str, list[dict[str, float]]]  # points {x, mean, low, high} by model


def training_curves(
    rows: Rows,
    *,
    y: str = "loss",
    y_title: str = "training loss (nats per token)",
    title: str = "How fast does each model learn?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
    levels: Mapping[str, float] | None = None,
) -> alt.LayerChart | alt.ConcatChart:
    """Draw loss against step, one line per model; with several seeds, a band from the lowest to the highest.

    rows: {model, step, loss, seed (optional)}. Up to four models share a panel; more get one panel each. levels: named
    horizontal lines of a shared panel.
    """
    require_rows(rows, "model", "step", y)
    models = distinct(row["model"] for row in rows)
    lines = over_seeds(rows, y, MAX_POINTS if len(models) <= MAX_LINES else MAX_POINTS_SMALL)
    seeds = max(len({row.get("seed") for row in rows if row["model"] == model}) for model in models)
    if not description:
        ends = word_list([f"{model} {short_number(points[-1]['mean'])}" for model, points in lines.items()])
        description = f"Line chart of {y_title} against training step. Last values: {ends}."
    if not subtitle and seeds > 1:
        subtitle = f"Line: mean over {seeds} seeds. Band: lowest to highest seed."
    if len(models) <= MAX_LINES:
        width = width_beside([*models, *(levels or {})])
        panel = line_panel(lines, "step", "step", y_title, width, 280, levels=levels)
        return theme.finish(panel, title, subtitle, description)
    subtitle_lines = [subtitle] if isinstance(subtitle, str) else list(subtitle)
    subtitle = [f"Vertical axis: {y_title}", *(line for line in subtitle_lines if line)]
    x_range = (min(p["x"] for ps in lines.values() for p in ps), max(p["x"] for ps in lines.values() for p in ps))
    y_range = nice_range([p[k] for ps in lines.values() for p in ps for k in ("low", "high")])
    panels = [
        line_panel({m: lines[m]}, "step", "step", None, 190, 120, x_range, y_range, named=False)
        .properties(title=alt.TitleParams(m, fontSize=12, offset=4))
        for m in models
    ]  # fmt: skip
    grid = alt.concat(*panels, columns=3, spacing=18).resolve_scale(color="independent", strokeDash="independent")
    return theme.finish(grid, title, subtitle, description)


def capacity_curve(
    rows: Rows,
    *,
    title: str = "How much capacity does it take to drop no token?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart | alt.VConcatChart:
    """Draw the share of dropped choices against the capacity factor and, if all rows have it, the loss below.

    rows: {model, capacity_factor, drop_rate, loss (optional)}; drop_rate is a share in [0, 1]; at most four models.
    """
    require_rows(rows, "model", "capacity_factor", "drop_rate")
    drops = _by_model(rows, "drop_rate")
    if len(drops) > MAX_LINES:
        raise InputError(f"models = {len(drops)}: at most {MAX_LINES} lines can be distinguished in one panel")
    if not description:
        lowest = min(plain(row["capacity_factor"]) for row in rows)
        at_lowest = word_list([f"{model} {points[0]['mean']:.1%}" for model, points in drops.items()])
        description = f"Line chart of the share of dropped choices against capacity factor; at {lowest:g}: {at_lowest}."
    x_title = "capacity factor (slots of an expert / its fair share)"
    with_loss = all(row.get("loss") is not None for row in rows)
    drops_x_title = None if with_loss else x_title
    drops_panel = line_panel(
        drops, "capacity factor", drops_x_title, "share of choices dropped", 500, 200, percent=True, dots=True
    )
    if not with_loss:
        return theme.finish(drops_panel, title, subtitle, description)
    loss_panel = line_panel(
        _by_model(rows, "loss"), "capacity factor", x_title, "loss (nats per token)", 500, 150, named=False, dots=True
    )
    return theme.finish(
        alt.vconcat(drops_panel, loss_panel).resolve_scale(color="independent", strokeDash="independent"),
        title,
        subtitle,
        description,
    )


def _by_model(rows: Rows, field: str) -> Lines:
    """Return the points {x, mean, low, high} of each model by capacity factor."""
    lines: Lines = {}
    for row in sorted(rows, key=lambda row: float(plain(row["capacity_factor"]))):
        value = plain(row[field])
        point = {"x": plain(row["capacity_factor"]), "mean": value, "low": value, "high": value}
        lines.setdefault(row["model"], []).append(point)
    return {model: lines[model] for model in distinct(row["model"] for row in rows)}


def over_seeds(rows: Rows, y: str, max_points: int = MAX_POINTS, *, x: str = "step") -> Lines:
    """Return the points {x, mean, low, high} of each model: average each seed in the same bins, then compare seeds."""
    lines = {}
    for model in distinct(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        steps = sorted({plain(row[x]) for row in of_model})
        bin_size = -(-len(steps) // max_points)
        bin_of = {step: i // bin_size for i, step in enumerate(steps)}
        values: dict[tuple[int, Any], list[float]] = {}
        for row in of_model:
            values.setdefault((bin_of[plain(row[x])], row.get("seed")), []).append(plain(row[y]))
        means: dict[int, list[float]] = {}
        for (number, _), of_bin in values.items():
            means.setdefault(number, []).append(sum(of_bin) / len(of_bin))
        lines[model] = [
            {"x": steps[min(number * bin_size + bin_size // 2, len(steps) - 1)], "mean": sum(seeds) / len(seeds),
             "low": min(seeds), "high": max(seeds)}
            for number, seeds in sorted(means.items())
        ]  # fmt: skip
    return lines


def line_panel(
    lines: Lines,
    x_name: str,
    x_title: str | None,
    y_title: str | None,
    width: int,
    height: int,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    *,
    named: bool = True,
    percent: bool = False,
    dots: bool = False,
    ticks: dict[str, Any] | None = None,
    levels: Mapping[str, float] | None = None,
) -> Any:
    """Draw lines with their bands, and each model's name at the end of its line.

    ticks: options of the x axis that replace the default ticks; levels: named horizontal lines.
    """
    levels = levels or {}
    y_values = [p[k] for ps in lines.values() for p in ps for k in ("low", "high")] + list(levels.values())
    models = list(lines)
    points: list[dict[str, Any]] = [{"model": model, **point} for model in models for point in lines[model]]
    x_low, x_high = x_range or (min(p["x"] for p in points), max(p["x"] for p in points))
    y_low, y_high = y_range or nice_range(y_values, zero=percent)
    y_format = ("%" if y_high > 0.05 else ".1%") if percent else number_format(y_high)
    ticks = ticks or {"tickCount": max(3, width // 80), "format": number_format(x_high)}
    x = alt.X("x:Q", title=x_title, scale=alt.Scale(domain=[x_low, x_high], nice=False),
              axis=alt.Axis(grid=False, **ticks))  # fmt: skip
    y_axis = alt.Axis(tickCount=max(3, height // 50), format=y_format)
    y_scale = alt.Scale(domain=[y_low, y_high], nice=False, zero=False)
    color = alt.Color("model:N", legend=None, scale=alt.Scale(domain=models, range=identity.colors(models)))
    dash = alt.StrokeDash("model:N", legend=None, scale=alt.Scale(domain=models, range=theme.DASHES[: len(models)]))
    tooltip = [alt.Tooltip("model:N"), alt.Tooltip("x:Q", title=x_name), alt.Tooltip("mean:Q", title=y_title or "mean",
               format=".2%" if percent else ".4~g")]  # fmt: skip
    y = alt.Y("mean:Q", title=y_title, scale=y_scale, axis=y_axis)
    base = alt.Chart(data(points)).encode(x=x, y=y)
    level_charts = [alt.Chart(data([{"mean": value}])).encode(y=y) for value in levels.values()]
    layers: list[Any] = [chart.mark_rule(strokeDash=[4, 3], color=theme.LIGHT["muted"]) for chart in level_charts]
    if any(p["low"] != p["high"] for p in points):
        layers.append(base.mark_area(opacity=0.18).encode(y=alt.Y("low:Q", title=y_title), y2="high:Q", color=color))
    layers.append(base.mark_line(strokeWidth=2, clip=True).encode(color=color, strokeDash=dash, tooltip=tooltip))
    if dots:
        layers.append(base.mark_circle(size=36, opacity=1).encode(color=color, tooltip=tooltip))
    if named:
        layers.append(_line_labels(lines, levels, x_high, (y_low, y_high), height))
    return alt.layer(*layers).resolve_scale(color="independent").properties(width=width, height=height)


def width_beside(names: Sequence[str]) -> int:
    """Return the width of a panel that leaves room for its axis and for the longest name at the end of a line."""
    name_width = min(max(map(len, names)) * 12 * BOLD_CHARACTER_WIDTH, MAX_NAME_WIDTH)
    return min(520, int(theme.MAX_WIDTH - 120 - name_width))


def _line_labels(
    lines: Lines, levels: Mapping[str, float], right: float, y_range: tuple[float, float], height: int
) -> alt.Chart:
    gap = 16 * (y_range[1] - y_range[0]) / height
    labels: list[dict[str, Any]] = [
        {"model": model, "x": points[-1]["x"], "y": points[-1]["mean"]} for model, points in lines.items()
    ] + [{"model": name, "x": right, "y": value} for name, value in levels.items()]
    for label, y in zip(labels, separate_labels([label["y"] for label in labels], gap, *y_range), strict=True):
        label["y"] = y
    of_levels = [theme.LIGHT[f"{role}_label" if (role := identity.model(name)) else "muted"] for name in levels]
    colors = identity.label_colors(list(lines)) + of_levels
    color = alt.Color("model:N", legend=None, scale=alt.Scale(domain=[*lines, *levels], range=colors))
    text = alt.Chart(data(labels)).mark_text(
        style="line_name", align="left", dx=8, fontWeight=600, limit=MAX_NAME_WIDTH
    )
    return text.encode(x="x:Q", y="y:Q", text="model:N", color=color)
