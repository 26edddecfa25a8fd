"""Charts of ablations at inference, and the question that each answers.

- loss_against_disabled: how fast does the loss rise if each token's top experts are disabled?
- loss_against_active: how many active experts are enough?
"""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.curves import MAX_LINES, Lines, line_panel, over_seeds, width_beside
from dsmoe_lite.viz.helpers import distinct, plain, require_rows, short_number, word_list

Rows = Sequence[dict[str, Any]]
MAX_TICKS = 12
HEIGHT = 280  # px


def loss_against_disabled(
    rows: Rows,
    *,
    relative: bool = False,
    title: str = "Are experts replaceable?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Draw loss against the share of routed experts, each token's best, that are disabled; one line per model.

    rows: {model, share, loss, seed (optional)}; share in [0, 1]; at most four models, a band from lowest to highest
    seed. relative: subtract the loss of the same seed at share 0, which must then be among the rows.
    """
    require_rows(rows, "model", "share", "loss")
    for row in rows:
        if not 0 <= plain(row["share"]) <= 1:
            raise InputError(f"share = {row['share']!r}: must be 0 to 1")
    lines = _lines(_above_intact(rows) if relative else rows, "share")
    value = "rise in loss (nats per token)" if relative else "loss (nats per token)"
    ends = _end_texts(lines, ".1%")
    description = description or f"Line chart of {value} against the share of top routed experts disabled. {ends}"
    ticks = {**_ticks(lines), "format": ".3~%"}
    x_title = "share of a token's top routed experts disabled"
    panel = line_panel(lines, "share", x_title, value, width_beside(list(lines)), HEIGHT, dots=True, ticks=ticks)
    return theme.finish(panel, title, subtitle or _seeds_subtitle(rows), description)


def loss_against_active(
    rows: Rows,
    *,
    reference: Mapping[str, float] | None = None,
    title: str = "How many active experts are enough?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Draw loss against the number of active routed experts per token, one line per model, beside other models.

    rows: {model, active, loss, seed (optional)}; at most four models, a band from lowest to highest seed. reference:
    the loss of models for comparison, each a dashed horizontal line with its name.
    """
    require_rows(rows, "model", "active", "loss")
    levels = {
        f"{name} {short_number(float(plain(loss)))}": float(plain(loss)) for name, loss in (reference or {}).items()
    }
    lines = _lines(rows, "active")
    value = "loss (nats per token)"
    description = description or (
        f"Line chart of {value} against the number of active experts. {_end_texts(lines, 'g')}"
        + (f" For comparison: {word_list(list(levels))}." if levels else "")
    )
    panel = line_panel(
        lines, "active experts", "active routed experts per token", value, width_beside([*lines, *levels]), HEIGHT,
        dots=True, ticks={**_ticks(lines), "format": "d"}, levels=levels,
    )  # fmt: skip
    return theme.finish(panel, title, subtitle or _seeds_subtitle(rows), description)


def _lines(rows: Rows, x: str) -> Lines:
    lines = over_seeds(rows, "loss", x=x)
    if len(lines) > MAX_LINES:
        raise InputError(f"models = {len(lines)}: at most {MAX_LINES} lines can be distinguished in one panel")
    return lines


def _above_intact(rows: Rows) -> list[dict[str, Any]]:
    intact = {(row["model"], row.get("seed")): plain(row["loss"]) for row in rows if plain(row["share"]) == 0}
    for row in rows:
        if (row["model"], row.get("seed")) not in intact:
            raise InputError(f"rows: {row['model']}, seed {row.get('seed')}, has no loss at share 0 to subtract")
    return [{**row, "loss": plain(row["loss"]) - intact[row["model"], row.get("seed")]} for row in rows]


def _ticks(lines: Lines) -> dict[str, Any]:
    """Put a tick at each measured value, unless there are many."""
    x_values = sorted({point["x"] for points in lines.values() for point in points})
    return {"values": x_values} if len(x_values) <= MAX_TICKS else {"tickCount": MAX_TICKS // 2}


def _end_texts(lines: Lines, x_format: str) -> str:
    """Write the first and last point of each line; `x_format` is the format of their x values."""
    ends = {model: points[:: max(1, len(points) - 1)] for model, points in lines.items()}
    texts = {
        model: " to ".join(f"{short_number(p['mean'])} at {p['x']:{x_format}}" for p in points)
        for model, points in ends.items()
    }
    return "; ".join(f"{model}: {text}" for model, text in texts.items()) + "."


def _seeds_subtitle(rows: Rows) -> str:
    seeds = distinct(row.get("seed") for row in rows)
    return f"Line: mean over {len(seeds)} seeds. Band: lowest to highest seed." if len(seeds) > 1 else ""
