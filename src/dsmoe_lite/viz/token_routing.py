"""The chart `token_routing`: which expert handles each token of a text, and with which gate?"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError, require_int
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.helpers import data, plain

MAX_TOKENS = 80
N_NAMED = 2  # experts named below a token; the tooltip names all
ROW_HEIGHT, CELL_HEIGHT = 50, 26  # px
MONO_WIDTH, LABEL_WIDTH = 7.9, 6.0  # px per character at 13 and 10 px


def token_routing(
    tokens: Sequence[str],
    layers: Sequence[Mapping[str, Any]],
    *,
    focus: int | None = None,
    layer: int = 0,
    line_width: int = 630,
    title: str = "Which expert handles each token?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Draw the text token by token: the fill is the gate of the expert in focus, the top experts are named below.

    layers: one mapping per MoE layer with topk_ids [T][K] (-1 for no expert), gates [T][K] and, optionally, kept
    [T][K]. A choice dropped by capacity, kept = False, is marked ×; for the expert in focus the token has a dashed
    outline and a strike. Two menus choose layer and expert. focus: the expert shown first; by default the busiest of
    `layer`. line_width: of the text, in px; 330 or less can be read on a phone. At most 80 tokens.
    """
    _check(tokens, layers, layer)
    require_int("line_width", line_width, 200)
    cells = _layout(tokens, line_width)
    choices = [_choices(given) for given in layers]
    busiest = Counter(e for token in choices[layer] for e, _, _ in token)
    n_experts = max((e for of_layer in choices for token in of_layer for e, _, _ in token), default=0) + 1
    first = focus if focus is not None else min(busiest, key=lambda e: (-busiest[e], e), default=0)
    for t, cell in enumerate(cells):
        cell["experts"] = "|".join(
            " ".join(f"{'' if kept else '×'}e{e}" for e, _, kept in of_layer[t]) for of_layer in choices
        )
        cell["gates"] = "|".join(" ".join(f"{gate:.3g}" for _, gate, _ in of_layer[t]) for of_layer in choices)
    n_tokens = sum(any(e == first for e, _, _ in token) for token in choices[layer])
    n_dropped = sum(not kept for token in choices[layer] for _, _, kept in token)
    description = description or (
        f"The {len(tokens)} tokens of a text, each with its top experts below. In MoE layer {layer}, expert e{first} "
        f"is chosen by {n_tokens} tokens; {n_dropped} choices are dropped. Menus select layer and expert."
    )
    subtitle = subtitle or ["Fill: gate of the expert in focus. Below: the token's top experts.",
                            "× and a dashed, struck-out box: dropped, as the expert was full."]  # fmt: skip
    menus = _menus(len(layers), n_experts, layer, first)
    chart = alt.layer(*_marks(cells, line_width)).add_params(*menus)
    height = ROW_HEIGHT * (1 + max(cell["row"] for cell in cells))
    return theme.finish(chart.properties(width=line_width, height=height), title, subtitle, description)


def _check(tokens: Sequence[str], layers: Sequence[Mapping[str, Any]], layer: int) -> None:
    if not 1 <= len(tokens) <= MAX_TOKENS:
        raise InputError(f"tokens = {len(tokens)} of them: must be 1 to {MAX_TOKENS}")
    if not 0 <= layer < len(layers):
        raise InputError(f"layer = {layer}: must be 0 to {len(layers) - 1}")
    for i, given in enumerate(layers):
        for name in ("topk_ids", "gates", "kept"):
            if name in given and len(given[name]) != len(tokens):
                raise InputError(
                    f"layers[{i}][{name!r}] has {len(given[name])} rows: must be {len(tokens)}, one per token"
                )


def _choices(layer: Mapping[str, Any]) -> list[list[tuple[int, float, bool]]]:
    """Return (expert, gate, kept) of each token's choices, highest gate first."""
    kept_rows = layer.get("kept")
    result = []
    for t, (ids, gates) in enumerate(zip(layer["topk_ids"], layer["gates"], strict=True)):
        kept = kept_rows[t] if kept_rows is not None else [True] * len(ids)
        row = [(int(plain(e)), float(plain(g)), bool(plain(k))) for e, g, k in zip(ids, gates, kept, strict=True)]
        result.append(sorted((choice for choice in row if choice[0] >= 0), key=lambda choice: -choice[1]))
    return result


def _layout(tokens: Sequence[str], line_width: int) -> list[dict[str, Any]]:
    """Place tokens on wrapped lines of text; a line break in a token ends its line, a leading space adds a gap."""
    cells: list[dict[str, Any]] = []
    x, row = 0.0, 0
    for token in tokens:
        text = visible(token, 24)
        if token.startswith(" ") and token.strip(" ") and x:
            x += 5
        width = max(len(text) * MONO_WIDTH + 10, 7 * LABEL_WIDTH + 4)
        if x + width > line_width and text != "↵":
            x, row = 0.0, row + 1
        cells.append({"token": text, "x": x, "x2": x + width, "mid": x + width / 2, "row": row})
        x += width + 3
        if token.endswith("\n"):
            x, row = 0.0, row + 1
    return cells


def visible(token: str, max_length: int) -> str:
    """Write a token in at most `max_length` characters: without a leading space, with signs for other whitespace."""
    text = token.replace("\n", "↵").replace("\t", "⇥")
    text = (text[1:] if text.startswith(" ") and text.strip(" ") else text).replace(" ", "␣")
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


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


def _marks(cells: list[dict[str, Any]], line_width: int) -> list[alt.Chart]:
    base = (
        alt.Chart(data(cells))
        .transform_calculate(all="split(datum.experts, '|')[layer]", weights="split(datum.gates, '|')[layer]")
        .transform_calculate(slot="indexof(split(replace(datum.all, /×/g, ''), ' '), 'e' + focus)")
        .transform_calculate(
            dropped="indexof(split(datum.all, ' '), '×e' + focus) >= 0",
            weight="datum.slot < 0 ? 0 : toNumber(split(datum.weights, ' ')[datum.slot])",
            label=f"join(slice(split(datum.all, ' '), 0, {N_NAMED}), ' ')",
            top=f"datum.row * {ROW_HEIGHT}",
        )
        .transform_calculate(
            gate="datum.dropped ? 0 : datum.weight",
            bottom=f"datum.top + {CELL_HEIGHT}",
            middle=f"datum.top + {CELL_HEIGHT / 2:g}",
            label_y=f"datum.top + {CELL_HEIGHT + 9}",
        )
    )
    x = alt.X("x:Q", axis=None, scale=alt.Scale(domain=[0, line_width], nice=False))
    y_scale = alt.Scale(domain=[0, ROW_HEIGHT * (1 + max(cell["row"] for cell in cells))], nice=False, reverse=True)
    legend = alt.Legend(
        title="gate", orient="bottom", gradientLength=160, gradientThickness=10, values=[0, 0.5, 1], format="~g"
    )
    ink, grid, muted = theme.LIGHT["ink"], theme.LIGHT["grid"], theme.LIGHT["muted"]
    tooltip = [alt.Tooltip("token:N"), alt.Tooltip("all:N", title="experts"), alt.Tooltip("weights:N", title="gates")]
    dropped, y = base.transform_filter("datum.dropped"), alt.Y("middle:Q", axis=None, scale=y_scale)
    boxes = base.mark_rect(cornerRadius=4, strokeWidth=1).encode(
        x=x, x2="x2:Q", y=alt.Y("top:Q", axis=None, scale=y_scale), y2="bottom:Q", tooltip=tooltip,
        color=alt.Color("gate:Q", scale=theme.ramp((0, 1)), legend=legend),
        stroke=alt.condition("datum.slot >= 0", alt.value(ink), alt.value(grid)),
    )  # fmt: skip
    outline = dropped.mark_rect(cornerRadius=4, filled=False, stroke=ink, strokeDash=[3, 2], strokeWidth=2).encode(
        x=x, x2="x2:Q", y=alt.Y("top:Q", axis=None, scale=y_scale), y2="bottom:Q"
    )
    color = alt.condition(
        f"datum.gate > {theme.DEEP_FROM}", alt.value(theme.LIGHT["on_deep"]), alt.value(theme.LIGHT["on_pale"])
    )
    words = base.mark_text(font=theme.MONO, fontSize=13).encode(x="mid:Q", y=y, text="token:N", color=color)
    strike = dropped.mark_rule(strokeWidth=1.5).encode(x="x:Q", x2="x2:Q", y=y, color=color)
    label_y = alt.Y("label_y:Q", axis=None, scale=y_scale)
    labels = base.mark_text(font=theme.MONO, fontSize=10, color=muted).encode(x="mid:Q", y=label_y, text="label:N")
    return [boxes, outline, strike, words, labels]
