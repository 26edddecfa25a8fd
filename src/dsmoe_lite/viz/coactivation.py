"""The chart `coactivation`, a heat map of pairs of experts: which experts does the same token use together?"""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.helpers import data, expert_axis, flatten_packed, gradient_legend, plain

MAX_EXPERTS = 64
SIDE, MAX_CELL = 400, 40  # px
MIN_NUMBER_CELL = 30  # px of a cell from which its number fits
MAX_LIFT = 3.0  # end of the colour scale
UNIT = 10_000  # shares are packed as whole multiples of 1 / UNIT


def coactivation(
    matrix: Sequence[Sequence[float | None]],
    *,
    null: float | Sequence[Sequence[float]] | None = None,
    order: Sequence[int] | None = None,
    marked: Sequence[tuple[int, int]] = (),
    title: str = "Which experts fire together?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart | alt.Chart:
    """Draw a heat map of C(i -> j), the share of expert i's tokens that also use j; with `null`, of its lift C / null.

    matrix: E x E shares in [0, 1], None or NaN for an expert without tokens; the diagonal is blank. null: the shares by
    chance, one number or E x E; the colours then run from 0 to 3 times chance. order: every expert once, the order of
    rows and columns. marked: pairs to ring, numbered from 1. At most 64 experts.
    """
    shares = _table(matrix, "matrix", len(matrix))
    n_experts = len(shares)
    order = list(range(n_experts)) if order is None else [int(plain(e)) for e in order]
    if sorted(order) != list(range(n_experts)):
        raise InputError(f"order has {len(order)} entries: must list each of the {n_experts} experts once")
    chance = _chance(null, n_experts)
    strongest, highest = _strongest(shares, chance)
    if not description:
        i, j = strongest
        pair = f"{shares[i][j]:.1%} of the tokens of e{i} also use e{j}"
        pair += f", {highest:.2f} times chance" if chance else ""
        quantity = "share of tokens in common" + (" over chance" if chance else "")
        description = f"Heat map of {n_experts} by {n_experts} experts: {quantity}. Highest: {pair}."
    subtitle = subtitle or ["Colour: share of the row expert's tokens that also use the column expert"
                            + (", over chance." if chance else "."),
                            "Blank: the same expert, or an expert without tokens."]  # fmt: skip
    rows = [{"i": f"e{i}", "j": " ".join(map(str, order)), "share": _packed(shares, i, order)}
            | ({"chance": _packed(chance, i, order)} if chance else {}) for i in order]  # fmt: skip
    high = MAX_LIFT if chance else highest
    rings = [{"i": f"e{i}", "expert": f"e{j}", "number": str(n)} for n, (i, j) in enumerate(marked, 1)]
    return theme.finish(_heat_map(rows, order, high, rings, lift=bool(chance)), title, subtitle, description)


def _table(table: Sequence[Sequence[Any]], name: str, n_experts: int) -> list[list[float]]:
    """Return the table as floats, NaN for missing shares. Raises InputError unless it is E x E shares."""
    if not 2 <= n_experts <= MAX_EXPERTS:
        raise InputError(f"{name} has {n_experts} rows: must be 2 to {MAX_EXPERTS}")
    if len(table) != n_experts or any(len(row) != n_experts for row in table):
        raise InputError(f"{name}: must have {n_experts} rows of {n_experts} shares")
    shares = [[math.nan if plain(cell) is None else float(plain(cell)) for cell in row] for row in table]
    for row in shares:
        for share in row:
            if not (math.isnan(share) or 0 <= share <= 1):
                raise InputError(f"{name}: {share:g} is not a share: must be 0 to 1")
    return shares


def _chance(null: Any, n_experts: int) -> list[list[float]] | None:
    if null is None:
        return None
    number = plain(null)
    if isinstance(number, int | float):
        return _table([[number] * n_experts] * n_experts, "null", n_experts)
    return _table(null, "null", n_experts)


def _strongest(shares: list[list[float]], chance: list[list[float]] | None) -> tuple[tuple[int, int], float]:
    """Return the pair with the highest share, or with the highest share over chance, and that value."""
    pairs = {}
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            divisor = chance[i][j] if chance else 1.0
            if i != j and not math.isnan(share) and divisor > 0:
                pairs[i, j] = share / divisor
    if not pairs:
        raise InputError("matrix: no pair of experts has a share")
    best = max(pairs, key=lambda pair: pairs[pair])
    return best, pairs[best] or 1.0


def _packed(table: list[list[float]], i: int, order: list[int]) -> str:
    """Pack row i as whole numbers joined by spaces; the diagonal and NaN are empty."""
    cells = ["" if j == i or math.isnan(table[i][j]) else str(round(UNIT * table[i][j])) for j in order]
    return " ".join(cells)


def _heat_map(
    rows: list[dict[str, Any]], order: list[int], high: float, rings: list[dict[str, Any]], *, lift: bool
) -> Any:
    fields = ["j", "share", "chance"] if lift else ["j", "share"]
    computed = {
        "expert": "'e' + datum.j",
        "value": "datum.chance > 0 ? datum.share / datum.chance : null" if lift else f"datum.share / {UNIT}",
        "percent": f"format(datum.share / {UNIT}, '.1%')",
        "null": f"format(datum.chance / {UNIT}, '.1%')" if lift else "''",
    }
    size = min(MAX_CELL, SIDE // len(order))
    legend = gradient_legend(
        "times chance" if lift else "share", **({"values": [0, 1, 2, 3]} if lift else {"format": "%"})
    )
    tooltip = [alt.Tooltip("i:N", title="tokens of"), alt.Tooltip("expert:N", title="also use"),
               alt.Tooltip("percent:N", title="share")]  # fmt: skip
    if lift:
        tooltip += [alt.Tooltip("null:N", title="by chance"), alt.Tooltip("value:Q", title="times", format=".2f")]
    x = expert_axis(order, title="also use")
    y = expert_axis(order, field="i:N", channel=alt.Y, title="tokens of")
    base = alt.Chart().encode(x=x, y=y)
    boxes = base.mark_rect().encode(
        color=alt.Color("value:Q", scale=theme.ramp((0.0, high)), legend=legend), tooltip=tooltip
    )
    layers = [boxes]
    if size >= MIN_NUMBER_CELL:
        color = alt.condition(f"datum.value > {theme.DEEP_FROM * high:.4g}", alt.value(theme.LIGHT["on_deep"]),
                              alt.value(theme.LIGHT["on_pale"]))  # fmt: skip
        text = alt.Text("value:Q", format=".1f" if lift else ".0%")
        layers.append(base.mark_text(style="in_cell", fontSize=11).encode(text=text, color=color))
    side = size * len(order)
    cells = flatten_packed(alt.layer(*layers, data=data(rows)), fields).transform_filter("isValid(datum.share)")
    cells = cells.transform_calculate(**computed).transform_filter("isValid(datum.value)")
    if rings:
        at = alt.Chart(data(rings)).encode(x=x, y=y)
        ring = at.mark_point(size=120, stroke=theme.LIGHT["frame"], strokeWidth=2.2)
        badge = at.mark_point(
            size=190, xOffset=14, yOffset=-10, opacity=1, fill=theme.LIGHT["card"], stroke=theme.LIGHT["frame"]
        )
        number = at.mark_text(dx=14, dy=-10, fontSize=11.5, fontWeight=600, color=theme.LIGHT["ink"])
        cells = alt.layer(cells, ring, badge, number.encode(text="number:N"))
    return cells.properties(width=side, height=side)
