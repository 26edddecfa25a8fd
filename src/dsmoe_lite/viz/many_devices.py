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
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.curves import line_panel, width_beside
from dsmoe_lite.viz.helpers import CHARACTER_WIDTH, data, distinct, plain, require_rows, word_list

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
    title: str = "What waits for what?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Draw bars on a time axis, one lane per part of a device; the colour is the group, such as half of a batch.

    rows: {lane, group, what, start, end}: `what` is written on the bar. At most eight lanes and four groups. The axis
    begins with the first bar. spans: {start, end, text}: stretches of time between dashed lines, named in their middle.
    """
    require_rows(rows, "lane", "group", "what", "start", "end")
    if spans:
        require_rows(spans, "start", "end", "text")
    lanes, groups = distinct(row["lane"] for row in rows), distinct(row["group"] for row in rows)
    if len(lanes) > MAX_LANES or len(groups) > MAX_GROUPS:
        raise InputError(
            f"rows: {len(lanes)} lanes of {len(groups)} groups: at most {MAX_LANES} of {MAX_GROUPS} can be shown"
        )
    ends = {lane: max(float(plain(row["end"])) for row in rows if row["lane"] == lane) for lane in lanes}
    first, last = min(float(plain(row["start"])) for row in rows), max(ends.values())
    width = int(theme.MAX_WIDTH - 60 - max(map(len, lanes)) * 12 * CHARACTER_WIDTH)
    if not description:
        last_times = word_list([f"{lane} to {end:.0f} {unit}" for lane, end in ends.items()])
        description = f"Timeline of {len(lanes)} lanes: {last_times}."
    bars = []
    for row in rows:
        start, end = float(plain(row["start"])), float(plain(row["end"]))
        fits = _fits(row["what"], width * (end - start) / (last - first))
        bars.append({**row, "middle": (start + end) / 2, "text": row["what"] if fits else ""})
    color = alt.Color("group:N", title=None, sort=groups, legend=alt.Legend(orient="top", offset=4),
                      scale=alt.Scale(domain=groups, range=theme.GROUPS[: len(groups)]))  # fmt: skip
    y = alt.Y(
        "lane:N", sort=lanes, title=None, axis=alt.Axis(labelColor=theme.LIGHT["ink"], labelLimit=220, grid=False)
    )
    x = alt.X("start:Q", title=unit, scale=alt.Scale(domain=[first, last], nice=False), axis=alt.Axis(tickCount=6))
    base = alt.Chart(data(bars)).encode(y=y)
    bar_marks = base.mark_bar(size=22, stroke=theme.LIGHT["card"], strokeWidth=1).encode(
        x=x, x2="end:Q", color=color,
        tooltip=["lane:N", "group:N", "what:N", *(alt.Tooltip(f"{end}:Q", format=",.3~r") for end in ("start", "end"))],
    )  # fmt: skip
    texts = base.mark_text(style="in_segment", fontSize=TEXT_SIZE, color=theme.LIGHT["on_fill"]).encode(
        x="middle:Q", text="text:N"
    )
    layers = [bar_marks, texts]
    if spans:
        layers += _named_spans(spans, x)
    chart = alt.layer(*layers).properties(width=width, height=LANE_HEIGHT * len(lanes))
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


def _fits(text: str, width: float) -> bool:
    return len(text) * TEXT_SIZE * CHARACTER_WIDTH + 3 <= width


def scaling_curve(
    rows: Rows,
    *,
    value_title: str = "share of its best speed",
    title: str = "How much of its speed does a device keep?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Draw a share against the number of devices, on a log axis; one line per model.

    rows: {model, devices, value}, value in [0, 1]; at most four models.
    """
    require_rows(rows, "model", "devices", "value")
    models = distinct(row["model"] for row in rows)
    if len(models) > theme.N_LINES:
        raise InputError(f"models = {len(models)}: at most {theme.N_LINES} lines can be distinguished in one panel")
    if not all(0 <= plain(row["value"]) <= 1 for row in rows):
        raise InputError("rows: value must be a share, 0 to 1")
    lines: dict[str, list[dict[str, Any]]] = {}
    for model in models:
        shares = sorted((plain(row["devices"]), float(plain(row["value"]))) for row in rows if row["model"] == model)
        lines[model] = [{"x": math.log2(n), "mean": share, "low": share, "high": share} for n, share in shares]
    exponents = sorted({point["x"] for points in lines.values() for point in points})
    ticks = {"values": exponents[:: 2 if len(exponents) > 6 else 1], "labelExpr": "format(pow(2, datum.value), ',d')"}
    panel = line_panel(
        lines, "log2 of devices", "devices (log scale)", value_title, width_beside(models), SCALING_HEIGHT,
        y_range=(0.0, 1.0), percent=True, dots=True, ticks=ticks,
    )  # fmt: skip
    ends = word_list(
        [f"{model} {points[-1]['mean']:.0%} at {2 ** points[-1]['x']:.0f}" for model, points in lines.items()]
    )
    return theme.finish(panel, title, subtitle, description or f"Line chart of {value_title} against devices: {ends}.")
