"""The chart `finer_experts`: if experts are split into smaller ones, how many more combinations are there to choose?"""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import require_int
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.helpers import data, word_list

LAYER_WIDTH, BARS_WIDTH, ROW_HEIGHT = 330, 230, 46  # px
STATES = {"used by one token": "line1", "not used": "fair"}
ROUNDED_FROM = 10**12  # counts
EXPERTS, CHOSEN, PIECES = (16, 64), (1, 16), (3, 8)  # of the sliders: min, max


def finer_experts(
    *,
    n_experts: int = 16,
    top_k: int = 2,
    pieces: int = 4,
    title: str = "Same weights stored, same weights used: how many more choices?",
    subtitle: str | Sequence[str] = "Left: the experts of a layer, each as wide as its FFN. Right: C(experts, used).",
    description: str = "",
) -> alt.HConcatChart:
    """Draw a layer of whole experts, of halves, and of `pieces`: those of one token filled, and the combinations.

    Three sliders change E (16 to 64), K (1 to 16) and the pieces of an expert (3 to 8) without a kernel. All layers are
    drawn equally long; the filled experts are random; combinations are on a log scale.
    """
    require_int("n_experts", n_experts, *EXPERTS)
    require_int("top_k", top_k, *CHOSEN)
    require_int("pieces", pieces, *PIECES)
    if not description:
        sizes = [(m, m * n_experts, m * top_k) for m in (1, 2, pieces)]
        texts = word_list([f"m = {m}: C({n}, {k}) = {_count_text(math.comb(n, k))}" for m, n, k in sizes])
        description = (
            "Layers of finer and finer experts, and the number of combinations that a token can choose, which "
        )
        description += f"sliders for E, K and m change. {texts}."
    controls = [
        alt.param(name=name, value=value, bind=alt.binding_range(min=low, max=high, step=1, name=f"{label} "))
        for name, value, (low, high), label in (
            ("n_experts", n_experts, EXPERTS, "Experts E"),
            ("top_k", top_k, CHOSEN, "Top-k K"),
            ("pieces", pieces, PIECES, "Segmentation m"),
        )
    ]
    layers = alt.Chart(data({"layer": number} for number in range(3)))
    layers = layers.transform_calculate(m="datum.layer == 2 ? pieces : datum.layer + 1")
    layers = layers.transform_calculate(n="datum.m * n_experts", k="datum.m * top_k")
    chart = alt.hconcat(_layer_bars(layers), _combination_bars(layers), spacing=18).add_params(*controls)
    return theme.finish(chart, title, subtitle, description)


def _rows(*, labels: bool) -> alt.Y:
    names = "'m = ' + (datum.value == 2 ? pieces : datum.value + 1)"
    axis = alt.Axis(labels=labels, labelExpr=names, labelColor=theme.LIGHT["ink"], grid=False)
    return alt.Y("layer:O", title=None, axis=axis)


def _layer_bars(layers: Any) -> Any:
    cells = layers.transform_calculate(expert="sequence(datum.n)").transform_flatten(["expert"])
    # the same experts at every drawing, in no order that an eye sees
    cells = cells.transform_calculate(key="abs(43758.5453 * sin(12.9898 * (datum.expert + 1) + datum.n)) % 1")
    cells = cells.transform_window(place="row_number()", sort=[alt.SortField("key")], groupby=["layer"])
    used, unused = STATES
    cells = cells.transform_calculate(
        state=f"datum.place <= datum.k ? '{used}' : '{unused}'",
        start=f"datum.expert * {LAYER_WIDTH} / datum.n",
        end=f"(datum.expert + 1) * {LAYER_WIDTH} / datum.n - min(1.5, {LAYER_WIDTH} / datum.n / 6)",
    )
    color = alt.Color("state:N", scale=alt.Scale(domain=list(STATES), range=[theme.LIGHT[c] for c in STATES.values()]),
                      legend=alt.Legend(title=None, orient="bottom", symbolType="square"))  # fmt: skip
    x = alt.X("start:Q", axis=None, scale=alt.Scale(domain=[0, LAYER_WIDTH], nice=False))
    bars = cells.mark_bar(size=22).encode(x=x, x2="end:Q", y=_rows(labels=True), color=color, tooltip=["state:N"])
    return bars.properties(width=LAYER_WIDTH, height=ROW_HEIGHT * 3)


def _combination_bars(layers: Any) -> Any:
    factors = layers.transform_calculate(i="sequence(1, datum.k + 1)").transform_flatten(["i"])
    factors = factors.transform_calculate(factor="(datum.n - datum.k + datum.i) / datum.i")
    counts = factors.transform_aggregate(count="product(factor)", groupby=["layer", "n", "k"])
    number = (
        f"datum.count < {ROUNDED_FROM} ? format(round(datum.count), ',') : replace(format(datum.count, '.2e'), '+', '')"
    )
    counts = counts.transform_calculate(
        power="log(datum.count) / LN10", text=f"'C(' + datum.n + ', ' + datum.k + ') = ' + ({number})"
    )
    labels = "datum.value == 0 ? '1' : '1e' + datum.value"
    axis = alt.Axis(title="combinations, log scale", tickCount=4, tickMinStep=1, labelExpr=labels)
    x = alt.X("power:Q", axis=axis, scale=alt.Scale(zero=True, nice=False))
    base = counts.encode(y=_rows(labels=False))
    marks = base.mark_bar(size=10, color=theme.LIGHT["line1"], yOffset=7).encode(x=x, tooltip=["text:N"])
    text = base.mark_text(align="left", dy=-8, fontSize=11.5).encode(x=alt.value(2), text="text:N")
    return alt.layer(marks, text).properties(width=BARS_WIDTH, height=ROW_HEIGHT * 3)


def _count_text(count: int) -> str:
    return f"{count:,}" if count < ROUNDED_FROM else f"{count:.2e}".replace("+", "")
