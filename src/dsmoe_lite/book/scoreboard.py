"""The claims of the DeepSeekMoE paper in one picture, for the README and the book: which of them hold here."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from dsmoe_lite.book import svg
from dsmoe_lite.book.svg import line, text
from dsmoe_lite.common.paths import NOTEBOOKS
from dsmoe_lite.study.grids import records
from dsmoe_lite.study.ledger import Claim
from dsmoe_lite.study.rows import trend_rows

PICTURE = NOTEBOOKS / "images" / "claims.svg"
GRID = "paper"
COLORS = {"holds": svg.INK, "leans": svg.GREEN, "inconclusive": svg.MUTED, "reversed": svg.MAGENTA}  # by verdict

WIDTH, LEFT, LABEL, PLOT, PLOT_WIDTH, VALUE = 820, 20, 108, 420, 216, 652  # px, x
TOP, ROW, GROUP = 108, 22, 7  # px, y
LOW, HIGH = -0.055, 0.115  # nats; an effect below is drawn as an arrow
TICKS = (-0.05, 0.0, 0.05, 0.1)


def picture(claims: Sequence[Claim]) -> str:
    """Return the SVG: a row per claim fixed before the runs, positive in the direction that the paper reports."""
    chosen = [claim for claim in claims if claim.trend and claim.trend.grid == GRID and not claim.trend.after_runs]
    rows = trend_rows(chosen, records(GRID))
    tally = Counter(row["verdict"] for row in rows)
    undecided = len(rows) - tally["holds"] - tally["reversed"]
    title = f"{len(rows)} claims of the DeepSeekMoE paper, tried again at toy size: {tally['holds']} hold"
    survivors = sum(row["survives"] for row in rows)
    outcome = f"{survivors} also if corrected over all; {tally['reversed']} is reversed, {undecided} stay undecided."
    drawn, y = [], TOP
    for place, group in groupby(rows, key=lambda row: row["place"]):
        drawn.append(text(LEFT, y + 15, place, color=svg.MUTED))
        for row in group:
            drawn += _row(row, y)
            y += ROW
        y += GROUP
    bottom, zero = y - GROUP + 6, _x(0)
    head = [
        text(LEFT, 34, title, size=17, weight=650),
        text(LEFT, 56, f"{outcome} Ten seeds per model; 1/20,000 of the paper's expert parameters.", color=svg.MUTED),
        text(zero - 8, 84, "← against the paper", color=svg.MUTED, anchor="end"),
        text(zero + 8, 84, "as the paper reports →", color=svg.MUTED),
    ]
    legend = ("difference in loss (nats) and its 95% interval; tick: margin", "filled dot: also if corrected over all")
    foot = [text(PLOT, bottom + 26 + 16 * i, line, color=svg.MUTED, size=11) for i, line in enumerate(legend)]
    axis = [part for value in TICKS for part in _tick(value, bottom)]
    sentences = "; ".join(f"{row['label']}: {row['verdict']}, {row['mean']:+.3f}" for row in rows)
    described = f"Effects in nats, positive in the direction that the paper reports. {sentences}."
    return svg.drawing(WIDTH, bottom + 52, title, described, [*head, *axis, *drawn, *foot])


def _row(row: dict[str, Any], y: float) -> list[str]:
    color, middle = COLORS[row["verdict"]], y + 11
    value = f"{row['mean']:+.3f}".replace("-", "\N{MINUS SIGN}")
    words = [
        text(LABEL, y + 15, row["label"]),
        text(VALUE, y + 15, value),
        text(VALUE + 56, y + 15, row["verdict"], color=color, weight=600),
    ]
    if row["high"] < LOW:
        head = f'<path d="M{PLOT + 9} {middle - 6} L{PLOT} {middle} L{PLOT + 9} {middle + 6} Z" fill="{color}"/>'
        return [head, line(PLOT + 8, middle, PLOT + 34, middle, color, 3), *words]
    fill = color if row["survives"] else svg.CARD
    margins = [line(_x(at), y + 4, _x(at), y + 18, svg.EDGE, 2) for at in row["margins"]]
    bar = line(_x(row["low"]), middle, _x(row["high"]), middle, color, 3)
    dot = f'<circle cx="{_x(row["mean"]):.5g}" cy="{middle:g}" r="5" fill="{fill}" stroke="{color}" stroke-width="2"/>'
    return [*margins, bar, dot, *words]


def _tick(value: float, bottom: float) -> list[str]:
    x, label = _x(value), f"{value:g}".replace("-", "\N{MINUS SIGN}")
    grid = line(x, TOP - 14, x, bottom, svg.IDLE if value else svg.MUTED)
    return [grid, text(x, bottom + 12, label, color=svg.MUTED, size=11, anchor="middle")]


def _x(value: float) -> float:
    return PLOT + PLOT_WIDTH * (value - LOW) / (HIGH - LOW)
