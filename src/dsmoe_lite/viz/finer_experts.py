"""Chart of experts cut into pieces: as many weights stored and used, and how many more choices."""

import math
import random
from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import require_whole
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.parts import data, listed, need_rows, plain

LAYER, CHOICES, ROW = 330, 230, 46  # px: width of a layer, of the bars, height of a row
STATES = {"used by one token": "line1", "the others": "fair"}
EXACT_UP_TO = 10**12  # larger counts are rounded


def finer_experts(
    rows: Sequence[dict[str, Any]],
    *,
    title: str = "Same weights stored, same weights used: how many more choices?",
    subtitle: str | Sequence[str] = "Left: the experts of a layer, each as wide as its FFN. Right: C(experts, used).",
    description: str = "",
) -> alt.HConcatChart:
    """One row a layer: its experts side by side, those of one token filled; beside it the ways to choose, log scale.

    rows: {layer, n_experts, top_k}. Every layer is drawn equally long; which experts are filled is made up.
    """
    need_rows(rows, "layer", "n_experts", "top_k")
    layers = [str(row["layer"]) for row in rows]
    sizes = [(int(plain(row["n_experts"])), int(plain(row["top_k"]))) for row in rows]
    for n_experts, top_k in sizes:
        require_whole("top_k", top_k, 1, n_experts)
    ways = [math.comb(*size) for size in sizes]
    if not description:
        said = listed([f"{layer}: C({n}, {k}) = {_count(way)}"
                       for layer, (n, k), way in zip(layers, sizes, ways, strict=True)])  # fmt: skip
        description = f"Layers of experts cut finer and finer, and the ways to choose among them. {said}."
    y = alt.Y("layer:N", sort=layers, title=None, axis=alt.Axis(labelColor=theme.LIGHT["ink"], grid=False))
    cells = [cell for layer, size in zip(layers, sizes, strict=True) for cell in _cells(layer, *size)]
    bars = [
        {"layer": layer, "power": math.log10(way), "text": f"C({n}, {k}) = {_count(way)}"}
        for layer, (n, k), way in zip(layers, sizes, ways, strict=True)
    ]
    chart = alt.hconcat(_layers(cells, y, len(layers)), _choices(bars, len(layers)), spacing=18)
    return theme.finish(chart, title, subtitle, description)


def _cells(layer: str, n_experts: int, top_k: int) -> list[dict[str, Any]]:
    used = set(random.Random(n_experts).sample(range(n_experts), top_k))
    one = LAYER / n_experts
    gap = min(1.5, one / 6)
    return [
        {"layer": layer, "from": i * one, "to": (i + 1) * one - gap, "state": list(STATES)[i not in used]}
        for i in range(n_experts)
    ]


def _layers(cells: list[dict[str, Any]], y: alt.Y, n_layers: int) -> Any:
    color = alt.Color("state:N", scale=alt.Scale(domain=list(STATES), range=[theme.LIGHT[c] for c in STATES.values()]),
                      legend=alt.Legend(title=None, orient="bottom", symbolType="square"))  # fmt: skip
    x = alt.X("from:Q", axis=None, scale=alt.Scale(domain=[0, LAYER], nice=False))
    bars = alt.Chart(data(cells)).mark_bar(size=22).encode(x=x, x2="to:Q", y=y, color=color, tooltip=["state:N"])
    return bars.properties(width=LAYER, height=ROW * n_layers)


def _choices(bars: list[dict[str, Any]], n_layers: int) -> Any:
    top = max(bar["power"] for bar in bars) * 1.02 or 1.0
    powers = list(range(0, math.ceil(top), -(-math.ceil(top) // 4)))
    labels = "datum.value == 0 ? '1' : '1e' + datum.value"
    axis = alt.Axis(title="ways to choose, log scale", values=powers, labelExpr=labels, labelOverlap=False)
    x = alt.X("power:Q", axis=axis, scale=alt.Scale(domain=[0, top], nice=False))
    y = alt.Y("layer:N", sort=[bar["layer"] for bar in bars], title=None, axis=None)
    base = alt.Chart(data(bars)).encode(y=y)
    drawn = base.mark_bar(size=10, color=theme.LIGHT["line2"], yOffset=7).encode(x=x, tooltip=["text:N"])
    text = base.mark_text(align="left", dy=-8, fontSize=11.5).encode(x=alt.value(2), text="text:N")
    return alt.layer(drawn, text).properties(width=CHOICES, height=ROW * n_layers)


def _count(ways: int) -> str:
    return f"{ways:,}" if ways < EXACT_UP_TO else f"{ways:.2e}".replace("+", "")
