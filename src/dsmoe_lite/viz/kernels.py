"""Charts of GPU kernels, and the question that each answers.

- launch_counts: how many kernels does one step launch?
- bank_groups: how many turns does it take to read one column from shared memory?
- product_speed: how fast is the grouped product?
"""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError, require_int
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.curves import line_panel, width_beside
from dsmoe_lite.viz.helpers import CHARACTER_WIDTH, data, distinct, plain, require_rows, word_list

Rows = Sequence[dict[str, Any]]
PASSES = ("forward", "backward")
N_GROUPS = 8  # of four banks each: filled by 8 pieces of 16 bytes
CELL, ROW_HEIGHT, SPEED_HEIGHT = 34, 34, 300  # px


def launch_counts(
    rows: Rows,
    *,
    title: str = "How many kernels does one step launch?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Draw one bar per backend, stacked of forward and backward launches, with the numbers beside it.

    rows: {backend, forward, backward}, launches of one step.
    """
    require_rows(rows, "backend", *PASSES)
    backends = [str(row["backend"]) for row in rows]
    bars, numbers = [], []
    for row in rows:
        counts = [int(plain(row[name])) for name in PASSES]
        bars += [
            {"backend": row["backend"], "pass": name, "launches": count}
            for name, count in zip(PASSES, counts, strict=True)
        ]
        numbers.append({"backend": row["backend"], "launches": sum(counts), "text": f"{counts[0]} + {counts[1]}"})
    counted = word_list([f"{row['backend']} {row['text']}" for row in numbers])
    description = description or f"Bar chart of kernel launches, forward + backward: {counted}."
    high = max(row["launches"] for row in numbers)
    names_width = max(map(len, backends)) * 12 * CHARACTER_WIDTH + 20
    width = int(min(460, theme.MAX_WIDTH - 130 - names_width))
    y = alt.Y(
        "backend:N", sort=backends, title=None, axis=alt.Axis(labelColor=theme.LIGHT["ink"], labelLimit=260, grid=False)
    )
    x = alt.X("launches:Q", title="kernel launches per step", scale=alt.Scale(domain=[0, high], nice=False),
              axis=alt.Axis(tickCount=5, format=",d"))  # fmt: skip
    color = alt.Color("pass:N", sort=list(PASSES), title=None, legend=alt.Legend(orient="top", offset=4),
                      scale=alt.Scale(domain=list(PASSES), range=theme.GROUPS))  # fmt: skip
    order = alt.Order("pass:N", sort="descending")  # forward first
    bar_marks = alt.Chart(data(bars)).mark_bar(size=16).encode(
        x=x, y=y, color=color, order=order, tooltip=["backend:N", "pass:N", "launches:Q"]
    )  # fmt: skip
    texts = alt.Chart(data(numbers)).mark_text(align="left", dx=6).encode(x="launches:Q", y=y, text="text:N")
    chart = alt.layer(bar_marks, texts).properties(width=width, height=ROW_HEIGHT * len(backends))
    return theme.finish(chart, title, subtitle or "Numbers: forward + backward.", description)


def bank_groups(
    layouts: dict[str, list[list[int]]],
    piece: int,
    *,
    title: str = "How many turns does it take to read one column?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.HConcatChart:
    """Draw one panel per layout: the bank group of each 16-byte piece of 8 rows, with the pieces of one column marked.

    layouts: name -> groups[row][piece], the group (0 to 7) of that piece. Pieces of one column that share a group are
    read one after the other. A slider over the column works without a kernel and starts at `piece`. Raises InputError
    if a row has two pieces in one group.
    """
    require_int("piece", piece, 0, N_GROUPS - 1)
    panels, counted = [], []
    for name, layout in layouts.items():
        for row, groups in enumerate(layout):
            if sorted(groups) != list(range(N_GROUPS)):
                raise InputError(f"layouts: {name}, row {row}: {groups} must have 8 pieces in 8 groups")
        columns = [[groups[p] for groups in layout] for p in range(N_GROUPS)]
        turns = [max(column.count(group) for group in column) for column in columns]
        texts = [f"{name}: {n} {'turn' if n == 1 else 'turns'}" for n in turns]
        cells = [
            {"row": r, "group": group, "piece": p} for r, groups in enumerate(layout) for p, group in enumerate(groups)
        ]
        panels.append(_banks(cells, [{"piece": p, "text": text} for p, text in enumerate(texts)], len(layout)))
        counted.append(f"{name} {turns[piece]}")
    chosen = f"piece {piece} of 8 rows, which a slider changes"
    description = description or f"Tables of bank groups. Turns to read {chosen}: {word_list(counted)}."
    subtitle = subtitle or "Rows of a tile by bank group. Number: the piece. Marked: the piece that is read."
    chart = alt.hconcat(*panels, spacing=40)
    slider = alt.binding_range(min=0, max=N_GROUPS - 1, step=1, name="Piece that is read ")
    return theme.finish(
        chart.add_params(alt.param(name="read", value=piece, bind=slider)), title, subtitle, description
    )


def _banks(cells: list[dict[str, Any]], headings: list[dict[str, Any]], n_rows: int) -> Any:
    x = alt.X("group:O", title="group of four banks", axis=alt.Axis(labelAngle=0, orient="bottom"))
    y = alt.Y("row:O", title="row", axis=alt.Axis())
    base = alt.Chart(data(cells)).encode(x=x, y=y)
    fill = alt.condition("datum.piece == read", alt.value(theme.RAMP[3]), alt.value(theme.RAMP[0]))
    text = alt.condition("datum.piece == read", alt.value(theme.LIGHT["on_deep"]), alt.value(theme.LIGHT["on_pale"]))
    squares = base.mark_rect(stroke=theme.LIGHT["card"], strokeWidth=2).encode(
        color=fill, tooltip=["row:O", alt.Tooltip("group:O", title="banks"), "piece:Q"]
    )
    numbers = base.mark_text(style="in_cell").encode(text="piece:Q", color=text)
    turns = alt.Chart(data(headings)).transform_filter("datum.piece == read")
    bold: dict[str, Any] = {"align": "left", "baseline": "bottom", "dy": -6, "fontSize": 12.5, "fontWeight": 600}
    heading = turns.mark_text(**bold).encode(x=alt.value(0), y=alt.value(0), text="text:N")
    return alt.layer(squares, numbers, heading).properties(width=CELL * N_GROUPS, height=CELL * n_rows)


def product_speed(
    rows: Rows,
    *,
    dense: Rows = (),
    title: str = "How fast is the grouped product?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Draw TFLOP/s against the rows of an expert, one line per implementation.

    rows: {by, rows, TFLOP/s}; at most four implementations. dense: rows of the dense product in the same form; a
    horizontal line marks their median.
    """
    require_rows(rows, "by", "rows", "TFLOP/s")
    names = distinct(row["by"] for row in rows)
    if len(names) > theme.N_LINES:
        raise InputError(f"by = {len(names)}: at most {theme.N_LINES} lines can be distinguished in one panel")
    lines = {}
    for name in names:
        speeds = sorted((plain(row["rows"]), plain(row["TFLOP/s"])) for row in rows if row["by"] == name)
        lines[name] = [{"x": math.log2(n), "mean": speed, "low": speed, "high": speed} for n, speed in speeds]
    exponents = sorted({point["x"] for points in lines.values() for point in points})
    levels = {"dense": median(plain(row["TFLOP/s"]) for row in dense)} if dense else None
    ticks = {"values": exponents, "labelExpr": "format(pow(2, datum.value), ',d')"}
    highest = max([p["mean"] for ps in lines.values() for p in ps] + list((levels or {}).values()))
    width = width_beside([*names, "dense"])
    panel = line_panel(
        lines, "log2 of rows", "rows per expert (log scale)", "TFLOP/s", width, SPEED_HEIGHT,
        y_range=(0.0, 1.05 * highest), dots=True, ticks=ticks, levels=levels,
    )  # fmt: skip
    ends = word_list(
        [f"{name} {points[-1]['mean']:.3g} TFLOP/s at {2 ** points[-1]['x']:.0f}" for name, points in lines.items()]
    )
    return theme.finish(
        panel, title, subtitle, description or f"Line chart of TFLOP/s against rows per expert: {ends}."
    )
