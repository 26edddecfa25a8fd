"""The chart `ablation_matrix`: which part of a model matters for which kind of token, all on one scale?"""

import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.common.stats import mean_and_half_width
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.helpers import CHARACTER_WIDTH, data, distinct, gradient_legend, plain, require_rows, word_list

MAX_CELL, ROW, GAP = 56, 30, 12  # px: width of a cell, height of a row, between the two panels
LINE = 13  # px: height of a line of a column name
MIN_CELL = 44  # px that a number such as -0.012 needs
PAD = 42  # px: padding of the card at both sides, and space that Vega adds to the labels
DEEP_FROM = theme.DEEP_FROM**2  # share of the highest value; colours follow the square root


def ablation_matrix(
    rows: Sequence[dict[str, Any]],
    *,
    overall: Mapping[str, float],
    apart: str = "",
    overall_is: str = "all tokens",
    value_title: str = "rise in loss (nats)",
    title: str = "Which part matters for which tokens?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.HConcatChart:
    """Draw one row per ablation, one column per kind of token, and at the left the effect on all tokens.

    rows: {kind, effect, value, part (optional)}, values of one cell are averaged over parts of the text; overall: each
    effect on all tokens, the column named `overall_is`. Every cell has the same colour scale, which follows the square
    root, so that small effects show beside large ones; values at or below 0 have the palest colour. A frame marks the
    largest effect of each column, the effect named `apart` left out, if it is larger than the next one beyond the
    spread over parts.
    """
    require_rows(rows, "kind", "effect", "value")
    kinds, effects = distinct(row["kind"] for row in rows), distinct(row["effect"] for row in rows)
    missing = [effect for effect in effects if effect not in overall]
    if missing:
        raise InputError(f"overall = {dict(overall)!r}: has no value for {missing[0]!r}")
    if apart and apart not in effects:
        raise InputError(f"apart = {apart!r}: must be one of {', '.join(map(str, effects))}")
    label_width = int(max(map(len, effects)) * 12 * CHARACTER_WIDTH) + 8
    cell_width = min(MAX_CELL, (theme.MAX_WIDTH - PAD - label_width - GAP) // (len(kinds) + 1))
    if cell_width < MIN_CELL:
        raise InputError(f"kinds = {len(kinds)}: their columns would be too narrow for numbers")
    at_left = _cells([{"kind": overall_is, "effect": effect, "value": overall[effect]} for effect in effects], apart)
    cells = _cells(rows, apart)
    high = max(0.001, *(cell["value"] for cell in at_left + cells))
    if not description:
        largest = [f"{cell['kind']} {cell['effect']} {cell['text']}" for cell in at_left + cells if cell["framed"]]
        left_out = f" apart from {apart}" if apart else ""
        description = (f"Heat map of {value_title}: {len(effects)} ablations by {len(kinds)} kinds of token. "
                       f"Largest{left_out}: {word_list(largest, len(largest))}.")  # fmt: skip
    subtitle = subtitle or f"Framed: clearly the largest of its column{', ' + apart + ' left out' if apart else ''}."
    names = {name: _broken(name, cell_width) for name in (overall_is, *kinds)}
    panels = [
        _panel(of_panel, columns, effects, high, value_title, names, labels).properties(
            width=cell_width * len(columns), height=ROW * len(effects)
        )
        for of_panel, columns, labels in ((at_left, [overall_is], label_width), (cells, kinds, 0))
    ]
    both = alt.hconcat(*panels, spacing=GAP).resolve_scale(color="shared")
    return theme.finish(both, title, subtitle, description)


def _cells(rows: Sequence[dict[str, Any]], apart: str) -> list[dict[str, Any]]:
    """Return the mean of every kind and effect, as number and text, and whether it leads its kind."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        values.setdefault((row["kind"], row["effect"]), []).append(float(plain(row["value"])))
    cells: list[dict[str, Any]] = []
    for (kind, effect), of_parts in values.items():
        mean, half_width = mean_and_half_width(of_parts)
        margin = "" if half_width is None else f" ± {half_width:.3f}"
        cells.append({"kind": kind, "effect": effect, "value": mean, "text": _text(mean), "interval": margin})
    leading = {kind: _leading(kind, values, apart) for kind in distinct(cell["kind"] for cell in cells)}
    return [{**cell, "framed": cell["effect"] == leading[cell["kind"]]} for cell in cells]


def _leading(kind: str, values: Mapping[tuple[str, str], list[float]], apart: str) -> str | None:
    """Return the largest effect, or None if the lead over the next one is within the spread over parts."""
    of_kind = {effect: found for (one, effect), found in values.items() if one == kind and effect != apart}
    first, second, *_ = [*sorted(of_kind, key=lambda effect: -fmean(of_kind[effect])), None, None]
    if first is None or second is None:
        return first
    leads = [one - other for one, other in zip(of_kind[first], of_kind[second], strict=True)]
    center, half_width = mean_and_half_width(leads)
    return first if center > (half_width or 0.0) else None


def _broken(name: str, width: int) -> list[str]:
    """Break a name into lines at its spaces, and a word that is wider than `width` px in the middle."""
    lines = []
    for word in name.split():
        half = (len(word) + 1) // 2
        is_wide = len(word) * 10 * CHARACTER_WIDTH > width
        lines += [f"{word[:half]}-", word[half:]] if is_wide else [word]
    return lines


def _text(value: float) -> str:
    """Format with three decimals, without a sign if all are 0."""
    text = f"{value:.3f}"
    return text.lstrip("-") if float(text) == 0 else text


def _panel(
    cells: list[dict[str, Any]],
    columns: list[str],
    effects: list[str],
    high: float,
    value_title: str,
    names: Mapping[str, list[str]],
    label_width: int,
) -> Any:
    """names: the lines of every column's name; label_width: px for the names of the rows, 0 to leave them out."""
    n_lines = max(map(len, names.values()))  # Vega places the first line, the others need padding
    x_axis = alt.Axis(orient="top", labelAngle=0, labelFontSize=10, labelOverlap=False, labelColor=theme.LIGHT["ink"],
                      labelExpr=f"({json.dumps(names)})[datum.label]", labelLineHeight=LINE,
                      labelPadding=6 + LINE * (n_lines - 1), grid=False)  # fmt: skip
    x = alt.X("kind:N", sort=columns, title=None, axis=x_axis)
    y_axis = alt.Axis(labels=label_width > 0, minExtent=label_width, labelColor=theme.LIGHT["ink"], grid=False)
    y = alt.Y("effect:N", sort=effects, title=None, axis=y_axis)
    scale = alt.Scale(type="sqrt", domain=[0.0, high], range=theme.RAMP, clamp=True, interpolate="rgb")
    ticks = [0.0, high / 16, high / 4, high]  # at 0, 1/4, 1/2 and 1 of the square-root scale
    color = alt.Color("value:Q", scale=scale, legend=gradient_legend(value_title, values=ticks, format=".2~g"))
    text_color = alt.condition(f"datum.value > {DEEP_FROM * high:.4g}", alt.value(theme.LIGHT["on_deep"]),
                               alt.value(theme.LIGHT["on_pale"]))  # fmt: skip
    base = alt.Chart(data(cells)).encode(x=x, y=y)
    tooltip = ["effect:N", "kind:N", alt.Tooltip("text:N", title=value_title),
               alt.Tooltip("interval:N", title="95% interval")]  # fmt: skip
    boxes = base.mark_rect(stroke=theme.LIGHT["card"], strokeWidth=2).encode(color=color, tooltip=tooltip)
    frames = base.transform_filter("datum.framed").mark_rect(filled=False, stroke=theme.LIGHT["frame"], strokeWidth=2)
    numbers = base.mark_text(style="in_cell", fontSize=11).encode(text="text:N", color=text_color)
    return alt.layer(boxes, frames, numbers)
