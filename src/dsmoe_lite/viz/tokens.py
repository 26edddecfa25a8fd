"""The sentence itself, each token coloured by how much of it one expert gets."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.parts import data, plain

MOST_TOKENS = 80
SHOWN = 2  # experts named under a token; the tooltip names all
LINE = 630  # px
ROW = 50
CELL = 26
WORD_WIDTH, LABEL_WIDTH = 7.9, 6.0  # px of one character at 13 and 10 px


def token_routing(
    tokens: Sequence[str],
    layers: Sequence[Mapping[str, Any]],
    *,
    focus: int | None = None,
    layer: int = 0,
    title: str = "Which expert handles each token?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """A sentence as words: fill is the gate of the expert in focus, the token's top experts stand beneath.

    layers: one mapping a MoE layer with topk_ids [T][K] (-1: none), gates [T][K] and kept [T][K] (optional; False where
    capacity dropped the choice: marked × and, for the expert in focus, a dashed outline and a strike). Two menus choose
    layer and expert. focus: the expert shown first; by default the busiest of `layer`. At most 80 tokens.
    """
    _check(tokens, layers, layer)
    cells = _layout(tokens)
    choices = [_choices(one) for one in layers]
    busiest = Counter(e for token in choices[layer] for e, _, _ in token)
    n_experts = max((e for one in choices for token in one for e, _, _ in token), default=0) + 1
    first = focus if focus is not None else min(busiest, key=lambda e: (-busiest[e], e), default=0)
    for t, cell in enumerate(cells):
        cell["experts"] = "|".join(" ".join(f"{'' if kept else '×'}e{e}" for e, _, kept in one[t]) for one in choices)
        cell["gates"] = "|".join(" ".join(f"{gate:.3g}" for _, gate, _ in one[t]) for one in choices)
    got = sum(any(e == first for e, _, _ in token) for token in choices[layer])
    dropped = sum(not kept for token in choices[layer] for _, _, kept in token)
    description = description or (
        f"The {len(tokens)} tokens of a text, each with its top experts beneath. In MoE layer {layer}, expert e{first} "
        f"is chosen by {got} tokens; {dropped} choices are dropped. Menus select layer and expert."
    )
    subtitle = subtitle or ["Fill: gate of the expert in focus. Beneath: the token's top experts.",
                            "× and a dashed, struck-out box: dropped, the expert was full."]  # fmt: skip
    menus = _menus(len(layers), n_experts, layer, first)
    chart = alt.layer(*_marks(cells)).add_params(*menus)
    height = ROW * (1 + max(cell["row"] for cell in cells))
    return theme.finish(chart.properties(width=LINE, height=height), title, subtitle, description)


def _check(tokens: Sequence[str], layers: Sequence[Mapping[str, Any]], layer: int) -> None:
    if not 1 <= len(tokens) <= MOST_TOKENS:
        raise InputError(f"tokens = {len(tokens)} of them: must be 1 to {MOST_TOKENS}")
    if not 0 <= layer < len(layers):
        raise InputError(f"layer = {layer}: must be 0 to {len(layers) - 1}")
    for i, one in enumerate(layers):
        for name in ("topk_ids", "gates", "kept"):
            if name in one and len(one[name]) != len(tokens):
                raise InputError(f"layers[{i}][{name!r}] has {len(one[name])} rows: must be {len(tokens)}, one a token")


def _choices(layer: Mapping[str, Any]) -> list[list[tuple[int, float, bool]]]:
    """(expert, gate, kept) of each token's choices, highest gate first."""
    kept_rows = layer.get("kept")
    result = []
    for t, (ids, gates) in enumerate(zip(layer["topk_ids"], layer["gates"], strict=True)):
        kept = kept_rows[t] if kept_rows is not None else [True] * len(ids)
        row = [(int(plain(e)), float(plain(g)), bool(plain(k))) for e, g, k in zip(ids, gates, kept, strict=True)]
        result.append(sorted((choice for choice in row if choice[0] >= 0), key=lambda choice: -choice[1]))
    return result


def _layout(tokens: Sequence[str]) -> list[dict[str, Any]]:
    """Place tokens on lines as text would wrap; a line break in a token ends its line, a space before it is a gap."""
    cells: list[dict[str, Any]] = []
    x, row = 0.0, 0
    for token in tokens:
        shown = visible(token, 24)
        if token.startswith(" ") and token.strip(" ") and x:
            x += 5
        width = max(len(shown) * WORD_WIDTH + 10, 7 * LABEL_WIDTH + 4)
        if x + width > LINE and shown != "↵":
            x, row = 0.0, row + 1
        cells.append({"token": shown, "x": x, "x2": x + width, "mid": x + width / 2, "row": row})
        x += width + 3
        if token.endswith("\n"):
            x, row = 0.0, row + 1
    return cells


def visible(token: str, longest: int) -> str:
    """A token as one word, cut to `longest`: line breaks, tabs and spaces as signs, but for the space before a word."""
    shown = token.replace("\n", "↵").replace("\t", "⇥")
    shown = (shown[1:] if shown.startswith(" ") and shown.strip(" ") else shown).replace(" ", "␣")
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def _menus(n_layers: int, n_experts: int, layer: int, focus: int) -> list[Any]:
    layers, experts = list(range(n_layers)), list(range(n_experts))
    return [
        alt.param(name="layer", value=layer, bind=alt.binding_select(options=layers, name="MoE layer ")),
        alt.param(
            name="focus",
            value=focus,
            bind=alt.binding_select(options=experts, labels=[f"e{e}" for e in experts], name="Expert "),
        ),
    ]


def _marks(cells: list[dict[str, Any]]) -> list[alt.Chart]:
    base = (
        alt.Chart(data(cells))
        .transform_calculate(all="split(datum.experts, '|')[layer]", weights="split(datum.gates, '|')[layer]")
        .transform_calculate(slot="indexof(split(replace(datum.all, /×/g, ''), ' '), 'e' + focus)")
        .transform_calculate(
            lost="indexof(split(datum.all, ' '), '×e' + focus) >= 0",
            weight="datum.slot < 0 ? 0 : toNumber(split(datum.weights, ' ')[datum.slot])",
            label=f"join(slice(split(datum.all, ' '), 0, {SHOWN}), ' ')",
            top=f"datum.row * {ROW}",
        )
        .transform_calculate(
            gate="datum.lost ? 0 : datum.weight",
            bottom=f"datum.top + {CELL}",
            middle=f"datum.top + {CELL / 2:g}",
            under=f"datum.top + {CELL + 9}",
        )
    )
    x = alt.X("x:Q", axis=None, scale=alt.Scale(domain=[0, LINE], nice=False))
    across = alt.Scale(domain=[0, ROW * (1 + max(cell["row"] for cell in cells))], nice=False, reverse=True)
    legend = alt.Legend(
        title="gate", orient="bottom", gradientLength=160, gradientThickness=10, values=[0, 0.5, 1], format="~g"
    )
    ink, grid, muted = theme.LIGHT["ink"], theme.LIGHT["grid"], theme.LIGHT["muted"]
    tooltip = [alt.Tooltip("token:N"), alt.Tooltip("all:N", title="experts"), alt.Tooltip("weights:N", title="gates")]
    lost, y = base.transform_filter("datum.lost"), alt.Y("middle:Q", axis=None, scale=across)
    boxes = base.mark_rect(cornerRadius=4, strokeWidth=1).encode(
        x=x, x2="x2:Q", y=alt.Y("top:Q", axis=None, scale=across), y2="bottom:Q", tooltip=tooltip,
        color=alt.Color("gate:Q", scale=theme.ramp((0, 1)), legend=legend),
        stroke=alt.condition("datum.slot >= 0", alt.value(ink), alt.value(grid)),
    )  # fmt: skip
    outline = lost.mark_rect(cornerRadius=4, filled=False, stroke=ink, strokeDash=[3, 2], strokeWidth=2).encode(
        x=x, x2="x2:Q", y=alt.Y("top:Q", axis=None, scale=across), y2="bottom:Q"
    )
    color = alt.condition(
        f"datum.gate > {theme.DEEP_FROM}", alt.value(theme.LIGHT["on_deep"]), alt.value(theme.LIGHT["on_pale"])
    )
    words = base.mark_text(font=theme.MONO, fontSize=13).encode(x="mid:Q", y=y, text="token:N", color=color)
    strike = lost.mark_rule(strokeWidth=1.5).encode(x="x:Q", x2="x2:Q", y=y, color=color)
    under = alt.Y("under:Q", axis=None, scale=across)
    labels = base.mark_text(font=theme.MONO, fontSize=10, color=muted).encode(x="mid:Q", y=under, text="label:N")
    return [boxes, outline, strike, words, labels]
