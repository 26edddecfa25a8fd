"""Charts of many devices: who sends to whom, what waits for what, and what is left of them at scale."""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.curves import line_panel, width_beside
from dsmoe_lite.viz.parts import CHARACTER, data, in_order, listed, need_rows, plain

Rows = Sequence[dict[str, Any]]
MOST_PROCESSES, MOST_LANES = 16, 8
CELL, WIDEST, LANE, SCALE_HEIGHT = 54, 480, 34, 300  # px
WORD = 10.5  # font size


def exchange_matrix(
    sent: Sequence[Sequence[float]],
    *,
    title: str = "Who sends to whom?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Rows that each process (down) sends to each (across); what stays at home, on the diagonal, is framed.

    sent: P lists of P counts, at most 16.
    """
    counts = [[float(plain(cell)) for cell in row] for row in sent]
    P = len(counts)
    if not 1 <= P <= MOST_PROCESSES or any(len(row) != P for row in counts):
        raise InputError(f"sent = {P} rows: must be as many rows as columns, 1 to {MOST_PROCESSES}")
    if not all(0 <= cell < math.inf for row in counts for cell in row):
        raise InputError("sent: counts must be 0 or above")
    high = max(max(map(max, counts)), 1.0)
    home, everything = sum(counts[p][p] for p in range(P)), sum(map(sum, counts)) or 1.0
    if not description:
        description = f"Table of rows sent between {P} processes; {home / everything:.0%} of them stay at home."
    subtitle = subtitle or "Rows of the all-to-all. Framed: what stays at home."
    cells = [{"from": p, "to": q, "rows": counts[p][q]} for p in range(P) for q in range(P)]
    base = alt.Chart(data(cells)).encode(
        x=alt.X("to:O", title="to process", axis=alt.Axis(orient="top", labelAngle=0)),
        y=alt.Y("from:O", title="from process"),
    )
    boxes = base.mark_rect(stroke=theme.LIGHT["card"], strokeWidth=2).encode(
        color=alt.Color("rows:Q", scale=theme.ramp((0.0, high)), legend=None), tooltip=["from:O", "to:O", "rows:Q"]
    )
    own = base.transform_filter("datum.from === datum.to")
    frames = own.mark_rect(filled=False, stroke=theme.LIGHT["line2"], strokeWidth=2)
    ink = alt.condition(f"datum.rows > {theme.DEEP_FROM * high:.4g}", alt.value(theme.LIGHT["on_deep"]),
                        alt.value(theme.LIGHT["on_pale"]))  # fmt: skip
    numbers = base.mark_text().encode(text=alt.Text("rows:Q", format=",.0f"), color=ink)
    step = min(CELL, WIDEST / P)
    chart = alt.layer(boxes, frames, numbers).properties(width=step * P, height=min(step, 40) * P)
    return theme.finish(chart, title, subtitle, description)


def link_timeline(
    rows: Rows,
    *,
    unit: str = "µs",
    title: str = "What waits for what?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Bars in time, one lane each of a device's parts; the colour says whose they are.

    rows: {lane, of, what, start, end}; at most eight lanes and four owners.
    """
    need_rows(rows, "lane", "of", "what", "start", "end")
    lanes, owners = in_order(row["lane"] for row in rows), in_order(row["of"] for row in rows)
    if len(lanes) > MOST_LANES or len(owners) > len(theme.FILLS) // 2:
        raise InputError(
            f"rows: {len(lanes)} lanes of {len(owners)} owners; at most {MOST_LANES} of 4 can be told apart"
        )
    ends = {lane: max(float(plain(row["end"])) for row in rows if row["lane"] == lane) for lane in lanes}
    last = max(ends.values())
    width = int(theme.MAX_WIDTH - 60 - max(map(len, lanes)) * 12 * CHARACTER)
    if not description:
        description = (
            f"Timeline of {len(lanes)} lanes: {listed([f'{lane} to {end:.0f} {unit}' for lane, end in ends.items()])}."
        )
    bars = [
        {**row, "middle": (plain(row["start"]) + plain(row["end"])) / 2,
         "text": row["what"] if _fits(row["what"], width * (plain(row["end"]) - plain(row["start"])) / last) else ""}
        for row in rows
    ]  # fmt: skip
    color = alt.Color("of:N", title=None, sort=owners, legend=alt.Legend(orient="top", offset=4),
                      scale=alt.Scale(domain=owners, range=theme.FILLS[: len(owners)]))  # fmt: skip
    y = alt.Y(
        "lane:N", sort=lanes, title=None, axis=alt.Axis(labelColor=theme.LIGHT["ink"], labelLimit=220, grid=False)
    )
    x = alt.X("start:Q", title=unit, scale=alt.Scale(domain=[0, last], nice=False), axis=alt.Axis(tickCount=6))
    base = alt.Chart(data(bars)).encode(y=y)
    drawn = base.mark_bar(size=22, stroke=theme.LIGHT["card"], strokeWidth=1).encode(
        x=x, x2="end:Q", color=color,
        tooltip=["lane:N", "of:N", "what:N", *(alt.Tooltip(f"{at}:Q", format=",.0f") for at in ("start", "end"))],
    )  # fmt: skip
    words = base.mark_text(fontSize=WORD, color=theme.LIGHT["on_fill"]).encode(x="middle:Q", text="text:N")
    chart = alt.layer(drawn, words).properties(width=width, height=LANE * len(lanes))
    return theme.finish(chart, title, subtitle, description)


def _fits(word: str, width: float) -> bool:
    return len(word) * WORD * CHARACTER + 3 <= width


def scaling_curve(
    rows: Rows,
    *,
    value_title: str = "share of its best speed",
    title: str = "What is left of a device's speed?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """A share against the number of devices, on a logarithmic axis; one line for each of at most four models.

    rows: {model, devices, value}, value in [0, 1].
    """
    need_rows(rows, "model", "devices", "value")
    models = in_order(row["model"] for row in rows)
    if len(models) > len(theme.LINES):
        raise InputError(f"models = {len(models)}: at most {len(theme.LINES)} lines can be told apart in one panel")
    if not all(0 <= plain(row["value"]) <= 1 for row in rows):
        raise InputError("rows: value must be a share, 0 to 1")
    lines: dict[str, list[dict[str, Any]]] = {}
    for model in models:
        own = sorted((plain(row["devices"]), float(plain(row["value"]))) for row in rows if row["model"] == model)
        lines[model] = [{"x": math.log2(n), "mean": share, "low": share, "high": share} for n, share in own]
    exponents = sorted({point["x"] for points in lines.values() for point in points})
    ticks = {"values": exponents[:: 2 if len(exponents) > 6 else 1], "labelExpr": "format(pow(2, datum.value), ',d')"}
    panel = line_panel(
        lines, "log2 of devices", "devices (log scale)", value_title, width_beside(models), SCALE_HEIGHT,
        y_range=(0.0, 1.0), percent=True, dots=True, ticks=ticks,
    )  # fmt: skip
    said = listed(
        [f"{model} {points[-1]['mean']:.0%} at {2 ** points[-1]['x']:.0f}" for model, points in lines.items()]
    )
    return theme.finish(panel, title, subtitle, description or f"Line chart of {value_title} against devices: {said}.")
