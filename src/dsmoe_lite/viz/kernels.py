"""Charts of kernels: what is launched, in which banks numbers lie, and how fast a grouped product is."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError, require_whole
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.curves import line_panel, width_beside
from dsmoe_lite.viz.parts import CHARACTER, data, in_order, listed, need_rows, plain

Rows = Sequence[dict[str, Any]]
PASSES = ("forward", "backward")
GROUPS = 8  # of four banks each: what 8 pieces of 16 bytes fill
CELL, BAR, SPEED_HEIGHT = 34, 34, 300  # px


def launch_counts(
    rows: Rows,
    *,
    title: str = "How often is the device asked to start something?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """One bar a way, forward and backward behind each other, with the numbers beside it.

    rows: {way, forward, backward}, launches of one step each.
    """
    need_rows(rows, "way", *PASSES)
    ways = [str(row["way"]) for row in rows]
    bars, numbers = [], []
    for row in rows:
        counts = [int(plain(row[name])) for name in PASSES]
        bars += [
            {"way": row["way"], "pass": name, "launches": count} for name, count in zip(PASSES, counts, strict=True)
        ]
        numbers.append({"way": row["way"], "launches": sum(counts), "text": f"{counts[0]} + {counts[1]}"})
    said = listed([f"{one['way']} {one['text']}" for one in numbers])
    description = description or f"Bar chart of launches forward and backward: {said}."
    high = max(one["launches"] for one in numbers)
    left = max(map(len, ways)) * 12 * CHARACTER + 20
    width = int(min(460, theme.MAX_WIDTH - 130 - left))
    y = alt.Y("way:N", sort=ways, title=None, axis=alt.Axis(labelColor=theme.LIGHT["ink"], labelLimit=260, grid=False))
    x = alt.X("launches:Q", title="launches of one step", scale=alt.Scale(domain=[0, high], nice=False),
              axis=alt.Axis(tickCount=5, format=",d"))  # fmt: skip
    color = alt.Color("pass:N", sort=list(PASSES), title=None, legend=alt.Legend(orient="top", offset=4),
                      scale=alt.Scale(domain=list(PASSES), range=theme.LINES[:2]))  # fmt: skip
    order = alt.Order("pass:N", sort="descending")  # forward first
    drawn = alt.Chart(data(bars)).mark_bar(size=16).encode(
        x=x, y=y, color=color, order=order, tooltip=["way:N", "pass:N", "launches:Q"]
    )  # fmt: skip
    texts = alt.Chart(data(numbers)).mark_text(align="left", dx=6).encode(x="launches:Q", y=y, text="text:N")
    chart = alt.layer(drawn, texts).properties(width=width, height=BAR * len(ways))
    return theme.finish(chart, title, subtitle or "Numbers: forward + backward.", description)


def bank_groups(
    layouts: dict[str, list[list[int]]],
    piece: int,
    *,
    title: str = "How many turns does it take to read one column?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.HConcatChart:
    """One panel a layout: in which group of banks each 16-byte piece of 8 rows lies; the pieces of a column are marked.

    layouts: name -> places[row][piece], the group (0 to 7) of that piece. Pieces of one column that share a group are
    read one after the other. InputError where a row puts two pieces into one group.
    """
    require_whole("piece", piece, 0, GROUPS - 1)
    panels, turns = [], {}
    for name, places in layouts.items():
        for row, groups in enumerate(places):
            if sorted(groups) != list(range(GROUPS)):
                raise InputError(f"layouts: {name}, row {row}: {groups} must put 8 pieces into 8 groups")
        column = [groups[piece] for groups in places]
        turns[name] = max(column.count(group) for group in column)
        cells = [{"row": r, "group": group, "piece": p, "read": p == piece}
                 for r, groups in enumerate(places) for p, group in enumerate(groups)]  # fmt: skip
        panels.append(_banks(cells, len(places), f"{name}: {turns[name]} {'turn' if turns[name] == 1 else 'turns'}"))
    said = listed([f"{name} {n}" for name, n in turns.items()])
    description = description or f"Tables of bank groups; reading piece {piece} of 8 rows takes turns: {said}."
    subtitle = subtitle or f"Rows of a tile by bank group; the number is the piece. Marked: piece {piece} of each row."
    return theme.finish(alt.hconcat(*panels, spacing=40), title, subtitle, description)


def _banks(cells: list[dict[str, Any]], n_rows: int, name: str) -> Any:
    x = alt.X("group:O", title="group of four banks", axis=alt.Axis(labelAngle=0, orient="bottom"))
    y = alt.Y("row:O", title="row", axis=alt.Axis())
    base = alt.Chart(data(cells)).encode(x=x, y=y)
    fill = alt.Color("read:N", legend=None, scale=alt.Scale(domain=[False, True], range=[theme.RAMP[0], theme.RAMP[3]]))
    inks = [theme.LIGHT["on_pale"], theme.LIGHT["on_deep"]]
    text = alt.Color("read:N", legend=None, scale=alt.Scale(domain=[False, True], range=inks))
    squares = base.mark_rect(stroke=theme.LIGHT["card"], strokeWidth=2).encode(color=fill)
    numbers = base.mark_text().encode(text="piece:Q", color=text)
    both = alt.layer(squares, numbers).resolve_scale(color="independent")
    heading = alt.TitleParams(name, fontSize=12.5, offset=6, frame="group")
    return both.properties(width=CELL * GROUPS, height=CELL * n_rows, title=heading)


def product_speed(
    rows: Rows,
    *,
    dense: Rows = (),
    title: str = "How fast is the grouped product?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """TFLOP/s against the rows of an expert, one line for each way to multiply.

    rows: {by, rows, TFLOP/s}; at most four ways; `dense`: rows of the same kind of the dense product, whose median is a
    level.
    """
    need_rows(rows, "by", "rows", "TFLOP/s")
    ways = in_order(row["by"] for row in rows)
    if len(ways) > len(theme.LINES):
        raise InputError(f"ways = {len(ways)}: at most {len(theme.LINES)} lines can be told apart in one panel")
    lines = {}
    for way in ways:
        own = sorted((plain(row["rows"]), plain(row["TFLOP/s"])) for row in rows if row["by"] == way)
        lines[way] = [{"x": math.log2(n), "mean": speed, "low": speed, "high": speed} for n, speed in own]
    exponents = sorted({point["x"] for points in lines.values() for point in points})
    levels = {"dense": median(plain(row["TFLOP/s"]) for row in dense)} if dense else None
    ticks = {"values": exponents, "labelExpr": "format(pow(2, datum.value), ',d')"}
    highest = max([p["mean"] for ps in lines.values() for p in ps] + list((levels or {}).values()))
    width = width_beside([*ways, "dense"])
    panel = line_panel(
        lines, "log2 of rows", "rows of an expert (log scale)", "TFLOP/s", width, SPEED_HEIGHT,
        y_range=(0.0, 1.05 * highest), dots=True, ticks=ticks, levels=levels,
    )  # fmt: skip
    said = listed(
        [f"{way} {points[-1]['mean']:.3g} TFLOP/s at {2 ** points[-1]['x']:.0f}" for way, points in lines.items()]
    )
    return theme.finish(
        panel, title, subtitle, description or f"Line chart of TFLOP/s against rows of an expert: {said}."
    )
