"""Charts of lines: training curves, drop rate against capacity."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.parts import data, in_order, listed, need_rows, nice_range, number_format, plain, short, spread

PER_PANEL = 4
BOLD = 0.66  # mean width of a character of a name, in font sizes
LONGEST_NAME = 130  # px
POINTS, FEW_POINTS = 100, 60  # kept of one line, and in small panels; longer runs are averaged into so many bins

Rows = Sequence[dict[str, Any]]
Lines = dict[str, list[dict[str, float]]]  # the points {x, mean, low, high} of each model


def training_curves(
    rows: Rows,
    *,
    y: str = "loss",
    y_title: str = "training loss (nats per token)",
    title: str = "How fast does each model learn?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart | alt.ConcatChart:
    """Loss against step, one line a model, with a band from lowest to highest where a model has several seeds.

    rows: {model, step, loss, seed (optional)}. Up to four models share a panel; more get a panel each.
    """
    need_rows(rows, "model", "step", y)
    models = in_order(row["model"] for row in rows)
    lines = over_seeds(rows, y, POINTS if len(models) <= PER_PANEL else FEW_POINTS)
    seeds = max(len({row.get("seed") for row in rows if row["model"] == model}) for model in models)
    if not description:
        ends = listed([f"{model} {short(points[-1]['mean'])}" for model, points in lines.items()])
        description = f"Line chart of {y_title} against training step. Last values: {ends}."
    if not subtitle and seeds > 1:
        subtitle = f"Line: mean over {seeds} seeds. Band: lowest to highest seed."
    if len(models) <= PER_PANEL:
        panel = line_panel(lines, "step", "step", y_title, width_beside(models), 280)
        return theme.finish(panel, title, subtitle, description)
    lines_said = [subtitle] if isinstance(subtitle, str) else list(subtitle)
    subtitle = [f"Vertical axis: {y_title}", *(line for line in lines_said if line)]
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
    """Share of dropped choices against the capacity factor and, where rows hold it, loss beneath.

    rows: {model, capacity_factor, drop_rate, loss (optional)}; drop_rate is a share in [0, 1]; at most four models.
    """
    need_rows(rows, "model", "capacity_factor", "drop_rate")
    drops = _by_model(rows, "drop_rate")
    if len(drops) > PER_PANEL:
        raise InputError(f"models = {len(drops)}: at most {PER_PANEL} lines can be told apart in one panel")
    if not description:
        low = min(plain(row["capacity_factor"]) for row in rows)
        at_low = listed([f"{model} {points[0]['mean']:.1%}" for model, points in drops.items()])
        description = f"Line chart of the share of dropped choices against capacity factor; at {low:g}: {at_low}."
    x_title = "capacity factor (slots of an expert / its fair share)"
    with_loss = all(row.get("loss") is not None for row in rows)
    x_top = None if with_loss else x_title
    top = line_panel(drops, "capacity factor", x_top, "share of choices dropped", 500, 200, percent=True, dots=True)
    if not with_loss:
        return theme.finish(top, title, subtitle, description)
    below = line_panel(
        _by_model(rows, "loss"), "capacity factor", x_title, "loss (nats per token)", 500, 150, named=False, dots=True
    )
    return theme.finish(
        alt.vconcat(top, below).resolve_scale(color="independent", strokeDash="independent"),
        title,
        subtitle,
        description,
    )


def _by_model(rows: Rows, field: str) -> Lines:
    """Points {x, mean, low, high} of each model, by capacity factor."""
    lines: Lines = {}
    for row in sorted(rows, key=lambda row: float(plain(row["capacity_factor"]))):
        value = plain(row[field])
        point = {"x": plain(row["capacity_factor"]), "mean": value, "low": value, "high": value}
        lines.setdefault(row["model"], []).append(point)
    return {model: lines[model] for model in in_order(row["model"] for row in rows)}


def over_seeds(rows: Rows, y: str, points: int = POINTS, *, x: str = "step") -> Lines:
    """Points {x, mean, low, high} of each model: every seed thinned to the same bins, then compared bin by bin."""
    lines = {}
    for model in in_order(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        steps = sorted({plain(row[x]) for row in own})
        width = -(-len(steps) // points)
        bin_of = {step: i // width for i, step in enumerate(steps)}
        sums: dict[tuple[int, Any], list[float]] = {}
        for row in own:
            sums.setdefault((bin_of[plain(row[x])], row.get("seed")), []).append(plain(row[y]))
        means: dict[int, list[float]] = {}
        for (place, _), values in sums.items():
            means.setdefault(place, []).append(sum(values) / len(values))
        lines[model] = [
            {"x": steps[min(place * width + width // 2, len(steps) - 1)], "mean": sum(seen) / len(seen),
             "low": min(seen), "high": max(seen)}
            for place, seen in sorted(means.items())
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
    """Lines, their bands, and each name at the end of its line.

    ticks: options of the x axis in place of its own; levels: named horizontal lines.
    """
    levels = levels or {}
    heights = [p[k] for ps in lines.values() for p in ps for k in ("low", "high")] + list(levels.values())
    models = list(lines)
    points: list[dict[str, Any]] = [{"model": model, **point} for model in models for point in lines[model]]
    x_low, x_high = x_range or (min(p["x"] for p in points), max(p["x"] for p in points))
    y_low, y_high = y_range or nice_range(heights, zero=percent)
    y_format = ("%" if y_high > 0.05 else ".1%") if percent else number_format(y_high)
    ticks = ticks or {"tickCount": max(3, width // 80), "format": number_format(x_high)}
    x = alt.X("x:Q", title=x_title, scale=alt.Scale(domain=[x_low, x_high], nice=False),
              axis=alt.Axis(grid=False, **ticks))  # fmt: skip
    y_axis = alt.Axis(tickCount=max(3, height // 50), format=y_format)
    y_scale = alt.Scale(domain=[y_low, y_high], nice=False, zero=False)
    color = alt.Color("model:N", legend=None, scale=alt.Scale(domain=models, range=theme.LINES[: len(models)]))
    dash = alt.StrokeDash("model:N", legend=None, scale=alt.Scale(domain=models, range=theme.DASHES[: len(models)]))
    tooltip = [alt.Tooltip("model:N"), alt.Tooltip("x:Q", title=x_name), alt.Tooltip("mean:Q", title=y_title or "mean",
               format=".2%" if percent else ".4~g")]  # fmt: skip
    y = alt.Y("mean:Q", title=y_title, scale=y_scale, axis=y_axis)
    base = alt.Chart(data(points)).encode(x=x, y=y)
    across = [alt.Chart(data([{"mean": value}])).encode(y=y) for value in levels.values()]
    layers: list[Any] = [chart.mark_rule(strokeDash=[4, 3], color=theme.LIGHT["muted"]) for chart in across]
    if any(p["low"] != p["high"] for p in points):
        layers.append(base.mark_area(opacity=0.18).encode(y=alt.Y("low:Q", title=y_title), y2="high:Q", color=color))
    layers.append(base.mark_line(strokeWidth=2, clip=True).encode(color=color, strokeDash=dash, tooltip=tooltip))
    if dots:
        layers.append(base.mark_circle(size=36, opacity=1).encode(color=color, tooltip=tooltip))
    if named:
        layers.append(_names(lines, levels, x_high, (y_low, y_high), height))
    return alt.layer(*layers).resolve_scale(color="independent").properties(width=width, height=height)


def width_beside(names: Sequence[str]) -> int:
    """Width of a panel that leaves room for its axis, and for the longest name at the end of its line."""
    name = min(max(map(len, names)) * 12 * BOLD, LONGEST_NAME)
    return min(520, int(theme.MAX_WIDTH - 120 - name))


def _names(
    lines: Lines, levels: Mapping[str, float], right: float, y_range: tuple[float, float], height: int
) -> alt.Chart:
    gap = 16 * (y_range[1] - y_range[0]) / height
    ends: list[dict[str, Any]] = [
        {"model": model, "x": points[-1]["x"], "y": points[-1]["mean"]} for model, points in lines.items()
    ] + [{"model": name, "x": right, "y": value} for name, value in levels.items()]
    for end, y in zip(ends, spread([end["y"] for end in ends], gap, *y_range), strict=True):
        end["y"] = y
    colors = theme.LINE_LABELS[: len(lines)] + [theme.LIGHT["muted"]] * len(levels)
    color = alt.Color("model:N", legend=None, scale=alt.Scale(domain=[*lines, *levels], range=colors))
    text = alt.Chart(data(ends)).mark_text(align="left", dx=8, fontWeight=600, limit=LONGEST_NAME)
    return text.encode(x="x:Q", y="y:Q", text="model:N", color=color)
