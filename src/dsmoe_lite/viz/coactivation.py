"""Chart of pairs of experts: how often the same token uses both."""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.parts import data, expert_axis, flattened, gradient, plain

MOST_EXPERTS = 64
SIDE, LARGEST_CELL = 512, 40  # px
WITH_NUMBER = 30  # px of a cell from which its number fits
HIGHEST_LIFT = 3.0
UNIT = 10_000  # shares travel as whole numbers of it


def coactivation(
    matrix: Sequence[Sequence[float | None]],
    *,
    null: float | Sequence[Sequence[float]] | None = None,
    order: Sequence[int] | None = None,
    title: str = "Which experts fire together?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart | alt.Chart:
    """A heat map of C(i -> j), the share of the tokens of expert i that also use j; with `null`, of C over it.

    matrix: E x E shares in [0, 1], None or NaN for an expert without tokens; the diagonal is left blank. null: what
    chance would give, one share or E x E; the colours then run from 0 to 3 times it. order: every expert once, as rows
    and columns shall stand. At most 64 experts.
    """
    shares = _table(matrix, "matrix", len(matrix))
    n_experts = len(shares)
    order = list(range(n_experts)) if order is None else [int(plain(e)) for e in order]
    if sorted(order) != list(range(n_experts)):
        raise InputError(f"order has {len(order)} entries: must hold each of the {n_experts} experts once")
    chance = _chance(null, n_experts)
    strongest, times = _strongest(shares, chance)
    if not description:
        i, j = strongest
        said = f"{shares[i][j]:.1%} of the tokens of e{i} also use e{j}"
        said += f", {times:.2f} times chance" if chance else ""
        of = "share of common tokens" + (" over chance" if chance else "")
        description = f"Heat map of {n_experts} by {n_experts} experts: {of}. Highest: {said}."
    subtitle = subtitle or ["Colour: share of the row expert's tokens that also use the column's"
                            + (", over chance." if chance else "."),
                            "Blank: the expert itself, or no tokens."]  # fmt: skip
    rows = [{"i": f"e{i}", "j": " ".join(map(str, order)), "share": _packed(shares, i, order)}
            | ({"chance": _packed(chance, i, order)} if chance else {}) for i in order]  # fmt: skip
    high = HIGHEST_LIFT if chance else times
    return theme.finish(_heat(rows, order, high, over=bool(chance)), title, subtitle, description)


def _table(table: Sequence[Sequence[Any]], name: str, n_experts: int) -> list[list[float]]:
    """The table as floats, NaN where nothing is known; raises InputError unless it is E x E shares."""
    if not 2 <= n_experts <= MOST_EXPERTS:
        raise InputError(f"{name} has {n_experts} rows: must be 2 to {MOST_EXPERTS}")
    if len(table) != n_experts or any(len(row) != n_experts for row in table):
        raise InputError(f"{name}: must have {n_experts} rows of {n_experts} shares")
    shares = [[math.nan if plain(cell) is None else float(plain(cell)) for cell in row] for row in table]
    for row in shares:
        for share in row:
            if not (math.isnan(share) or 0 <= share <= 1):
                raise InputError(f"{name}: {share:g} is not a share, must be 0 to 1")
    return shares


def _chance(null: Any, n_experts: int) -> list[list[float]] | None:
    if null is None:
        return None
    number = plain(null)
    if isinstance(number, int | float):
        return _table([[number] * n_experts] * n_experts, "null", n_experts)
    return _table(null, "null", n_experts)


def _strongest(shares: list[list[float]], chance: list[list[float]] | None) -> tuple[tuple[int, int], float]:
    """The pair of the highest share, or of the highest share over chance, and that number."""
    pairs = {}
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            below = chance[i][j] if chance else 1.0
            if i != j and not math.isnan(share) and below > 0:
                pairs[i, j] = share / below
    if not pairs:
        raise InputError("matrix: no pair of experts has a share")
    best = max(pairs, key=lambda pair: pairs[pair])
    return best, pairs[best] or 1.0


def _packed(table: list[list[float]], i: int, order: list[int]) -> str:
    """Row i as whole numbers joined by spaces; nothing stands for the diagonal and for NaN."""
    cells = ["" if j == i or math.isnan(table[i][j]) else str(round(UNIT * table[i][j])) for j in order]
    return " ".join(cells)


def _heat(rows: list[dict[str, Any]], order: list[int], high: float, *, over: bool) -> Any:
    fields = ["j", "share", "chance"] if over else ["j", "share"]
    computed = {
        "expert": "'e' + datum.j",
        "value": "datum.chance > 0 ? datum.share / datum.chance : null" if over else f"datum.share / {UNIT}",
        "percent": f"format(datum.share / {UNIT}, '.1%')",
        "null": f"format(datum.chance / {UNIT}, '.1%')" if over else "''",
    }
    size = min(LARGEST_CELL, SIDE // len(order))
    legend = gradient("times chance" if over else "share", **({"values": [0, 1, 2, 3]} if over else {"format": "%"}))
    tooltip = [alt.Tooltip("i:N", title="of the tokens of"), alt.Tooltip("expert:N", title="also use"),
               alt.Tooltip("percent:N", title="share")]  # fmt: skip
    if over:
        tooltip += [alt.Tooltip("null:N", title="by chance"), alt.Tooltip("value:Q", title="times", format=".2f")]
    base = alt.Chart().encode(x=expert_axis(order, title="also uses"),
                        y=expert_axis(order, field="i:N", channel=alt.Y, title="a token of"))  # fmt: skip
    boxes = base.mark_rect().encode(
        color=alt.Color("value:Q", scale=theme.ramp((0.0, high)), legend=legend), tooltip=tooltip
    )
    layers = [boxes]
    if size >= WITH_NUMBER:
        color = alt.condition(f"datum.value > {theme.DEEP_FROM * high:.4g}", alt.value(theme.LIGHT["on_deep"]),
                              alt.value(theme.LIGHT["on_pale"]))  # fmt: skip
        text = alt.Text("value:Q", format=".1f" if over else ".0%")
        layers.append(base.mark_text(fontSize=11).encode(text=text, color=color))
    side = size * len(order)
    cells = flattened(alt.layer(*layers, data=data(rows)), fields).transform_filter("isValid(datum.share)")
    cells = cells.transform_calculate(**computed).transform_filter("isValid(datum.value)")
    return cells.properties(width=side, height=side)
