"""Charts of training on many devices, and the question that each answers.

- exchange_matrix: how many rows does each process send to each other process?
- link_timeline: which operations wait for which?
- scaling_curve: what share of its best speed does a device reach at scale?
"""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import identity, theme
from dsmoe_lite.viz.controls import Control
from dsmoe_lite.viz.curves import width_beside
from dsmoe_lite.viz.helpers import (
    CHARACTER_WIDTH,
    data,
    distinct,
    flatten_packed,
    plain,
    require_rows,
    separate_labels,
    word_list,
)

Rows = Sequence[dict[str, Any]]
MAX_PROCESSES, MAX_LANES, MAX_GROUPS = 16, 8, 4
MAX_CELL, MAX_WIDTH, LANE_HEIGHT, SCALING_HEIGHT = 54, 480, 34, 300  # px
TEXT_SIZE = 10.5  # font size


def exchange_matrix(
    sent: Sequence[Sequence[float]],
    *,
    title: str = "Who sends to whom?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Draw the rows that each process (down) sends to each (across); rows that stay local, the diagonal, are framed.

    sent: P lists of P counts, at most 16.
    """
    counts = [[float(plain(cell)) for cell in row] for row in sent]
    P = len(counts)
    if not 1 <= P <= MAX_PROCESSES or any(len(row) != P for row in counts):
        raise InputError(f"sent = {P} rows: must be as many rows as columns, 1 to {MAX_PROCESSES}")
    if not all(0 <= cell < math.inf for row in counts for cell in row):
        raise InputError("sent: counts must be 0 or above")
    high = max(max(map(max, counts)), 1.0)
    local, total = sum(counts[p][p] for p in range(P)), sum(map(sum, counts)) or 1.0
    if not description:
        description = f"Table of rows sent between {P} processes; {local / total:.0%} of them stay local."
    subtitle = subtitle or "Rows of the all-to-all. Framed: rows that stay local."
    cells = [{"from": p, "to": q, "rows": counts[p][q]} for p in range(P) for q in range(P)]
    base = alt.Chart(data(cells)).encode(
        x=alt.X("to:O", title="to process", axis=alt.Axis(orient="top", labelAngle=0)),
        y=alt.Y("from:O", title="from process"),
    )
    boxes = base.mark_rect(stroke=theme.LIGHT["card"], strokeWidth=2).encode(
        color=alt.Color("rows:Q", scale=theme.ramp((0.0, high)), legend=None), tooltip=["from:O", "to:O", "rows:Q"]
    )
    diagonal = base.transform_filter("datum.from === datum.to")
    frames = diagonal.mark_rect(filled=False, stroke=theme.LIGHT["frame"], strokeWidth=2)
    text_color = alt.condition(f"datum.rows > {theme.DEEP_FROM * high:.4g}", alt.value(theme.LIGHT["on_deep"]),
                        alt.value(theme.LIGHT["on_pale"]))  # fmt: skip
    numbers = base.mark_text(style="in_cell").encode(text=alt.Text("rows:Q", format=",.0f"), color=text_color)
    step = min(MAX_CELL, MAX_WIDTH / P)
    chart = alt.layer(boxes, frames, numbers).properties(width=step * P, height=min(step, 40) * P)
    return theme.finish(chart, title, subtitle, description)


def link_timeline(
    rows: Rows,
    *,
    spans: Rows = (),
    unit: str = "µs",
    bandwidth: float | None = None,
    title: str = "What waits for what?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Draw bars on a time axis, one lane per part of a device; the colour is the group, such as half of a batch.

    rows: {lane, group, what, start, end}: `what` is written on the bar. At most eight lanes and four groups. The axis
    begins with the first bar. spans: {start, end, text}: stretches of time between dashed lines, named in their middle.
    bandwidth: rows have a bandwidth across nodes, in GB/s, under this name; a menu chooses it without a kernel.
    """
    require_rows(rows, "lane", "group", "what", "start", "end")
    if spans:
        require_rows(spans, "start", "end", "text")
    lanes, groups = distinct(row["lane"] for row in rows), distinct(row["group"] for row in rows)
    if len(lanes) > MAX_LANES or len(groups) > MAX_GROUPS:
        raise InputError(
            f"rows: {len(lanes)} lanes of {len(groups)} groups: at most {MAX_LANES} of {MAX_GROUPS} can be shown"
        )
    control = None if bandwidth is None else Control("bandwidth", "Bandwidth across nodes, GB/s", bandwidth)
    at_start = [row for row in rows if control is None or row["bandwidth"] == bandwidth]
    ends = {lane: max(float(plain(row["end"])) for row in at_start if row["lane"] == lane) for lane in lanes}
    first, last = min(float(plain(row["start"])) for row in rows), max(float(plain(row["end"])) for row in rows)
    width = int(theme.MAX_WIDTH - 60 - max(map(len, lanes)) * 12 * CHARACTER_WIDTH)
    if not description:
        last_times = word_list([f"{lane} to {end:.3g} {unit}" for lane, end in ends.items()])
        moved = "" if control is None else f" with {bandwidth:g} GB/s across nodes, which a menu changes"
        description = f"Timeline of {len(lanes)} lanes{moved}: {last_times}."
    color = alt.Color("group:N", title=None, sort=groups, legend=alt.Legend(orient="top", offset=4),
                      scale=alt.Scale(domain=groups, range=theme.GROUPS[: len(groups)]))  # fmt: skip
    y = alt.Y(
        "lane:N", sort=lanes, title=None, axis=alt.Axis(labelColor=theme.LIGHT["ink"], labelLimit=220, grid=False)
    )
    x = alt.X("start:Q", title=unit, scale=alt.Scale(domain=[first, last], nice=False), axis=alt.Axis(tickCount=6))
    base = alt.Chart(data(rows))
    base = (base if control is None else control.filter(base)).encode(y=y)
    bar_marks = base.mark_bar(size=22, stroke=theme.LIGHT["card"], strokeWidth=1).encode(
        x=x, x2="end:Q", color=color,
        tooltip=["lane:N", "group:N", "what:N", *(alt.Tooltip(f"{end}:Q", format=",.3~r") for end in ("start", "end"))],
    )  # fmt: skip
    per_unit = width / (last - first)  # px
    fitting = base.transform_calculate(middle="(datum.start + datum.end) / 2").transform_filter(
        f"length(datum.what) * {TEXT_SIZE * CHARACTER_WIDTH:.4g} + 1 <= {per_unit:.6g} * (datum.end - datum.start)"
    )
    texts = fitting.mark_text(style="in_segment", fontSize=TEXT_SIZE, color=theme.LIGHT["on_fill"]).encode(
        x="middle:Q", text="what:N"
    )
    layers = [bar_marks, texts]
    if spans:
        layers += _named_spans(spans, x)
    chart = alt.layer(*layers).properties(width=width, height=LANE_HEIGHT * len(lanes))
    chart = chart if control is None else chart.add_params(control.param(rows))
    return theme.finish(chart, title, subtitle, description)


def _named_spans(spans: Rows, x: alt.X) -> list[Any]:
    middles = [{**span, "middle": (plain(span["start"]) + plain(span["end"])) / 2} for span in spans]
    edges = [{"start": plain(span[edge])} for span in spans for edge in ("start", "end")]
    return [
        alt.Chart(data(edges)).mark_rule(strokeDash=[4, 3], color=theme.LIGHT["ink"]).encode(x=x),
        alt.Chart(data(middles))
        .mark_text(fontWeight=600, color=theme.LIGHT["ink"])
        .encode(x="middle:Q", text="text:N"),
    ]


def scaling_curve(
    rows: Rows,
    *,
    tokens: int,
    bandwidth: float,
    schedule: str,
    value_title: str = "share of its best speed",
    title: str = "How much of its speed does a device keep?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Draw a share against the number of devices, on a log axis; one line per model.

    rows: {model, devices, value, tokens, bandwidth, schedule}: value in [0, 1], tokens on each device, GB/s across
    nodes, and a word for the schedule; at most four models. Three menus choose the last three without a kernel; they
    start at the arguments of these names.
    """
    require_rows(rows, "model", "devices", "value", "tokens", "bandwidth", "schedule")
    models = distinct(row["model"] for row in rows)
    if len(models) > theme.N_LINES:
        raise InputError(f"models = {len(models)}: at most {theme.N_LINES} lines can be distinguished in one panel")
    if not all(0 <= plain(row["value"]) <= 1 for row in rows):
        raise InputError("rows: value must be a share, 0 to 1")
    controls = [
        Control("tokens", "Tokens on a device", tokens),
        Control("bandwidth", "Bandwidth across nodes, GB/s", bandwidth),
        Control("schedule", "Links and products", schedule),
    ]
    params = [control.param(rows) for control in controls]
    lines = _lines(rows)
    if not description:
        at_start = [line for line in lines if all(line[control.field] == control.value for control in controls)]
        ends = word_list([f"{line['model']} {line['end']:.0%} at {2 ** line['last']:.0f}" for line in at_start])
        description = f"Line chart of {value_title} against devices, for {tokens:,} tokens on a device, {bandwidth:g} "
        description += f"GB/s across nodes and links {schedule}: {ends}. Three menus change these."
    return theme.finish(
        _scaling(lines, models, controls, value_title).add_params(*params), title, subtitle, description
    )


def _lines(rows: Rows) -> list[dict[str, Any]]:
    """One row per line and setting: its points, packed, and the height of its name."""
    points: dict[tuple[Any, ...], dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        setting = tuple(plain(row[field]) for field in ("tokens", "bandwidth", "schedule"))
        of_model = points.setdefault(setting, {}).setdefault(row["model"], [])
        of_model.append((int(plain(row["devices"])), float(plain(row["value"]))))
    lines = []
    for (tokens, bandwidth, schedule), of_setting in points.items():
        of_setting = {model: sorted(of_model) for model, of_model in of_setting.items()}
        heights = separate_labels([pairs[-1][1] for pairs in of_setting.values()], 16 / SCALING_HEIGHT, 0.0, 1.0)
        for (model, pairs), height in zip(of_setting.items(), heights, strict=True):
            lines.append({
                "model": model, "tokens": tokens, "bandwidth": bandwidth, "schedule": schedule,
                "log2": " ".join(f"{math.log2(n):g}" for n, _ in pairs),
                "value": " ".join(f"{value:.4g}" for _, value in pairs),
                "last": math.log2(pairs[-1][0]), "end": pairs[-1][1], "height": height,
            })  # fmt: skip
    return lines


def _scaling(lines: list[dict[str, Any]], models: list[str], controls: list[Control], value_title: str) -> Any:
    exponents = sorted({float(power) for line in lines for power in line["log2"].split()})
    axis = alt.Axis(grid=False, values=exponents[:: 2 if len(exponents) > 6 else 1],
                    labelExpr="format(pow(2, datum.value), ',d')")  # fmt: skip
    x_scale = alt.Scale(domain=[exponents[0], exponents[-1]], nice=False)
    y_scale = alt.Scale(domain=[0, 1], nice=False)
    x = alt.X("log2:Q", title="devices (log scale)", axis=axis, scale=x_scale)
    y = alt.Y("value:Q", title=value_title, axis=alt.Axis(tickCount=6, format="%"), scale=y_scale)
    color = alt.Color("model:N", legend=None, scale=alt.Scale(domain=models, range=identity.colors(models)))
    dash = alt.StrokeDash("model:N", legend=None, scale=alt.Scale(domain=models, range=theme.DASHES[: len(models)]))
    name_color = alt.Color("model:N", legend=None,
                           scale=alt.Scale(domain=models, range=identity.label_colors(models)))  # fmt: skip
    base = alt.Chart(data(lines))
    for control in controls:
        base = control.filter(base)
    unpacked = flatten_packed(base, ["log2", "value"]).transform_calculate(devices="pow(2, datum.log2)")
    tooltip = [alt.Tooltip("model:N"), alt.Tooltip("devices:Q", format=",d"),
               alt.Tooltip("value:Q", title=value_title, format=".1%")]  # fmt: skip
    points = unpacked.encode(x=x, y=y, color=color, tooltip=tooltip)
    names = base.mark_text(style="line_name", align="left", dx=8, fontWeight=600, limit=130)
    layers = [
        points.mark_line(strokeWidth=2).encode(strokeDash=dash),
        points.mark_circle(size=36, opacity=1),
        names.encode(x="last:Q", y="height:Q", text="model:N", color=name_color),
    ]
    chart = alt.layer(*layers).resolve_scale(color="independent")
    return chart.properties(width=width_beside(models), height=SCALING_HEIGHT)
