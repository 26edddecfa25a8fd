"""Charts of interventions: the loss without some of the experts, and with fewer of them active."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.curves import PER_PANEL, Lines, line_panel, over_seeds, width_beside
from dsmoe_lite.viz.parts import in_order, listed, need_rows, plain, short

Rows = Sequence[dict[str, Any]]
MOST_TICKS = 12
HEIGHT = 280  # px


def loss_against_disabled(
    rows: Rows,
    *,
    relative: bool = False,
    title: str = "Are experts replaceable?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Loss against the share of each token's top routed experts that are disabled, one line a model.

    rows: {model, share, loss, seed (optional)}; share in [0, 1]; at most four models, a band from lowest to highest
    seed. relative: the loss of each seed minus its own at share 0, which must then be among the rows.
    """
    need_rows(rows, "model", "share", "loss")
    for row in rows:
        if not 0 <= plain(row["share"]) <= 1:
            raise InputError(f"share = {row['share']!r}: must be 0 to 1")
    lines = _lines(_above_intact(rows) if relative else rows, "share")
    value = "rise in loss (nats per token)" if relative else "loss (nats per token)"
    said = _said(lines, ".1%")
    description = description or f"Line chart of {value} against the share of top routed experts disabled. {said}"
    ticks = {**_ticks(lines), "format": ".3~%"}
    x_title = "share of a token's top routed experts disabled"
    panel = line_panel(lines, "share", x_title, value, width_beside(list(lines)), HEIGHT, dots=True, ticks=ticks)
    return theme.finish(panel, title, subtitle or _seeds(rows), description)


def loss_against_active(
    rows: Rows,
    *,
    reference: Mapping[str, float] | None = None,
    title: str = "How many active experts are enough?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Loss against the number of routed experts active a token, one line a model, beside the loss of other models.

    rows: {model, active, loss, seed (optional)}; at most four models, a band from lowest to highest seed. reference:
    the loss of each model that has no such number, a dashed horizontal line with its name.
    """
    need_rows(rows, "model", "active", "loss")
    levels = {f"{name} {short(float(plain(loss)))}": float(plain(loss)) for name, loss in (reference or {}).items()}
    lines = _lines(rows, "active")
    value = "loss (nats per token)"
    description = description or (
        f"Line chart of {value} against the number of active experts. {_said(lines, 'g')}"
        + (f" For comparison: {listed(list(levels))}." if levels else "")
    )
    panel = line_panel(
        lines, "active experts", "active routed experts a token", value, width_beside([*lines, *levels]), HEIGHT,
        dots=True, ticks={**_ticks(lines), "format": "d"}, levels=levels,
    )  # fmt: skip
    return theme.finish(panel, title, subtitle or _seeds(rows), description)


def _lines(rows: Rows, x: str) -> Lines:
    lines = over_seeds(rows, "loss", x=x)
    if len(lines) > PER_PANEL:
        raise InputError(f"models = {len(lines)}: at most {PER_PANEL} lines can be told apart in one panel")
    return lines


def _above_intact(rows: Rows) -> list[dict[str, Any]]:
    intact = {(row["model"], row.get("seed")): plain(row["loss"]) for row in rows if plain(row["share"]) == 0}
    for row in rows:
        if (row["model"], row.get("seed")) not in intact:
            raise InputError(f"rows: {row['model']}, seed {row.get('seed')}, has no loss at share 0 to subtract")
    return [{**row, "loss": plain(row["loss"]) - intact[row["model"], row.get("seed")]} for row in rows]


def _ticks(lines: Lines) -> dict[str, Any]:
    """Ticks at the measured places, where there are few of them."""
    places = sorted({point["x"] for points in lines.values() for point in points})
    return {"values": places} if len(places) <= MOST_TICKS else {"tickCount": MOST_TICKS // 2}


def _said(lines: Lines, place: str) -> str:
    """First and last point of each line; `place` is the format of where they lie."""
    ends = {model: " to ".join(f"{short(p['mean'])} at {p['x']:{place}}" for p in points[:: max(1, len(points) - 1)])
            for model, points in lines.items()}  # fmt: skip
    return "; ".join(f"{model}: {said}" for model, said in ends.items()) + "."


def _seeds(rows: Rows) -> str:
    seeds = in_order(row.get("seed") for row in rows)
    return f"Line: mean over {len(seeds)} seeds. Band: lowest to highest seed." if len(seeds) > 1 else ""
