"""The chart `finer_experts`: if experts are split into smaller ones, how many more combinations are there to choose?"""

import math
import random
from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import require_int
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.helpers import data, plain, require_rows, word_list

LAYER_WIDTH, BARS_WIDTH, ROW_HEIGHT = 330, 230, 46  # px
STATES = {"used by one token": "line1", "not used": "fair"}
ROUNDED_FROM = 10**12  # counts


def finer_experts(
    rows: Sequence[dict[str, Any]],
    *,
    title: str = "Same weights stored, same weights used: how many more choices?",
    subtitle: str | Sequence[str] = "Left: the experts of a layer, each as wide as its FFN. Right: C(experts, used).",
    description: str = "",
) -> alt.HConcatChart:
    """Draw one row per layer: its experts, those of one token filled, and the number of combinations, log scale.

    rows: {layer, n_experts, top_k}. All layers are drawn equally long; the filled experts are random.
    """
    require_rows(rows, "layer", "n_experts", "top_k")
    layers = [str(row["layer"]) for row in rows]
    sizes = [(int(plain(row["n_experts"])), int(plain(row["top_k"]))) for row in rows]
    for n_experts, top_k in sizes:
        require_int("top_k", top_k, 1, n_experts)
    combinations = [math.comb(*size) for size in sizes]
    if not description:
        texts = word_list([f"{layer}: C({n}, {k}) = {_count_text(count)}"
                       for layer, (n, k), count in zip(layers, sizes, combinations, strict=True)])  # fmt: skip
        description = (
            f"Layers of finer and finer experts, and the number of combinations that a token can choose. {texts}."
        )
    y = alt.Y("layer:N", sort=layers, title=None, axis=alt.Axis(labelColor=theme.LIGHT["ink"], grid=False))
    cells = [cell for layer, size in zip(layers, sizes, strict=True) for cell in _cells(layer, *size)]
    bars = [
        {"layer": layer, "power": math.log10(count), "text": f"C({n}, {k}) = {_count_text(count)}"}
        for layer, (n, k), count in zip(layers, sizes, combinations, strict=True)
    ]
    chart = alt.hconcat(_layer_bars(cells, y, len(layers)), _combination_bars(bars, len(layers)), spacing=18)
    return theme.finish(chart, title, subtitle, description)


def _cells(layer: str, n_experts: int, top_k: int) -> list[dict[str, Any]]:
    used = set(random.Random(n_experts).sample(range(n_experts), top_k))
    width = LAYER_WIDTH / n_experts
    gap = min(1.5, width / 6)
    return [
        {"layer": layer, "from": i * width, "to": (i + 1) * width - gap, "state": list(STATES)[i not in used]}
        for i in range(n_experts)
    ]


def _layer_bars(cells: list[dict[str, Any]], y: alt.Y, n_layers: int) -> Any:
    color = alt.Color("state:N", scale=alt.Scale(domain=list(STATES), range=[theme.LIGHT[c] for c in STATES.values()]),
                      legend=alt.Legend(title=None, orient="bottom", symbolType="square"))  # fmt: skip
    x = alt.X("from:Q", axis=None, scale=alt.Scale(domain=[0, LAYER_WIDTH], nice=False))
    bars = alt.Chart(data(cells)).mark_bar(size=22).encode(x=x, x2="to:Q", y=y, color=color, tooltip=["state:N"])
    return bars.properties(width=LAYER_WIDTH, height=ROW_HEIGHT * n_layers)


def _combination_bars(bars: list[dict[str, Any]], n_layers: int) -> Any:
    top = max(bar["power"] for bar in bars) * 1.02 or 1.0
    powers = list(range(0, math.ceil(top), -(-math.ceil(top) // 4)))
    labels = "datum.value == 0 ? '1' : '1e' + datum.value"
    axis = alt.Axis(title="combinations, log scale", values=powers, labelExpr=labels, labelOverlap=False)
    x = alt.X("power:Q", axis=axis, scale=alt.Scale(domain=[0, top], nice=False))
    y = alt.Y("layer:N", sort=[bar["layer"] for bar in bars], title=None, axis=None)
    base = alt.Chart(data(bars)).encode(y=y)
    marks = base.mark_bar(size=10, color=theme.LIGHT["line1"], yOffset=7).encode(x=x, tooltip=["text:N"])
    text = base.mark_text(align="left", dy=-8, fontSize=11.5).encode(x=alt.value(2), text="text:N")
    return alt.layer(marks, text).properties(width=BARS_WIDTH, height=ROW_HEIGHT * n_layers)


def _count_text(count: int) -> str:
    return f"{count:,}" if count < ROUNDED_FROM else f"{count:.2e}".replace("+", "")
