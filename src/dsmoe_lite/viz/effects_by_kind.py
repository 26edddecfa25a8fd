"""The chart `effects_by_kind`: which kinds of token does an intervention affect more than the average token?"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.common.stats import mean_and_half_width
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.helpers import CHARACTER_WIDTH, data, distinct, plain, require_rows, word_list

MAX_PANELS = 4
ROW = 24  # px
TEXT_SIZE = 11.5  # font size
TEXT_GAP = 16  # px between a panel and the numbers at its right
MIN_TICK_GAP = 34  # px between two ticks whose labels do not touch


def effects_by_kind(
    rows: Sequence[dict[str, Any]],
    *,
    overall: Mapping[str, float],
    kinds_are: str = "kinds of token",
    dashed: str = "all tokens",
    number: str = "+.3f",
    one_scale: bool = False,
    title: str = "Which tokens are affected?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.ConcatChart:
    """Draw one panel per effect, one row per kind of token: the mean with its 95% t-interval over parts of the text.

    rows: {kind, effect, value, part (optional)}; overall: each effect on all tokens, drawn as a dashed line, on which
    every dot would be if the kind did not matter. `kinds_are` and `dashed` name the rows and the line. The largest
    mean of a panel is highlighted. At most four panels, each with its own scale unless `one_scale`; `number` is the
    format of the values.
    """
    require_rows(rows, "kind", "effect", "value")
    kinds, effects = distinct(row["kind"] for row in rows), distinct(row["effect"] for row in rows)
    if len(effects) > MAX_PANELS:
        raise InputError(f"effects = {len(effects)}: at most {MAX_PANELS} panels fit side by side")
    missing = [effect for effect in effects if effect not in overall]
    if missing:
        raise InputError(f"overall = {dict(overall)!r}: has no value for {missing[0]!r}")
    levels = {effect: float(plain(overall[effect])) for effect in effects}
    values: dict[str, dict[str, list[float]]] = {effect: {} for effect in effects}
    for row in rows:
        values[row["effect"]].setdefault(row["kind"], []).append(float(plain(row["value"])))
    label_width = int(max(len(kind) for kind in kinds) * 12 * CHARACTER_WIDTH) + 14
    marks = {effect: _marks(values[effect], number) for effect in effects}
    text_width = int(max(len(m["text"]) for ms in marks.values() for m in ms) * TEXT_SIZE * CHARACTER_WIDTH) + 2
    width = int((theme.MAX_WIDTH - 40 - label_width) / len(effects)) - 20 - TEXT_GAP - text_width
    ranges = {effect: _range(marks[effect], levels[effect]) for effect in effects}
    if one_scale:
        lows, highs = zip(*ranges.values(), strict=True)
        ranges = dict.fromkeys(effects, (min(lows), max(highs)))
    if not description:
        texts = [f"{effect}: {dashed} {levels[effect]:{number}}, most for {_largest(marks[effect])}"
                 for effect in effects]  # fmt: skip
        description = f"Dot chart of {len(kinds)} {kinds_are} by {word_list(effects)}. {'; '.join(texts)}."
    subtitle = subtitle or f"Dashed: {dashed}. Bar: 95% interval over parts of the text. Bold: largest of the panel."
    panels = [
        _panel(
            marks[effect],
            kinds,
            levels[effect],
            ranges[effect],
            number,
            width,
            label_width if i == 0 else 0,
            text_width,
        ).properties(
            title=alt.TitleParams(
                effect,
                subtitle=f"{dashed} {levels[effect]:{number}}",
                fontSize=12.5,
                subtitleFontSize=11.5,
                offset=8,
            )
        )
        for i, effect in enumerate(effects)
    ]
    return theme.finish(alt.concat(*panels, columns=MAX_PANELS, spacing=20), title, subtitle, description)


def _marks(values: dict[str, list[float]], number: str) -> list[dict[str, Any]]:
    marks: list[dict[str, Any]] = []
    for kind, of_parts in values.items():
        mean, half_width = mean_and_half_width(of_parts)
        margin = half_width or 0
        marks.append({"kind": kind, "mean": mean, "low": mean - margin, "high": mean + margin,
                      "text": _format(mean, number)})  # fmt: skip
    largest = max(mark["mean"] for mark in marks)
    return [{**mark, "largest": mark["mean"] == largest} for mark in marks]


def _format(value: float, number: str) -> str:
    """Format `value` as `number`, without a sign if all its digits are 0."""
    text = f"{value:{number}}"
    return text if any(digit in text for digit in "123456789") else text.lstrip("+-")


def _largest(marks: list[dict[str, Any]]) -> str:
    return next(f"{mark['kind']} {mark['text']}" for mark in marks if mark["largest"])


def _range(marks: list[dict[str, Any]], level: float) -> tuple[float, float]:
    """The lowest and the highest value of a panel, zero included."""
    low = min(0.0, level, *(mark["low"] for mark in marks))
    return low, max(0.0, level, *(mark["high"] for mark in marks)) or 1.0


def _panel(
    marks: list[dict[str, Any]],
    kinds: list[str],
    level: float,
    low_high: tuple[float, float],
    number: str,
    width: int,
    label_width: int,
    text_width: int,
) -> Any:
    """Draw dots on a scale with zero, and their numbers in a column right of it."""
    low, high = low_high
    tick = _round_down(0.9 * high)
    ticks = [0.0, tick] if tick / (high - low) * width > MIN_TICK_GAP else [tick]
    percent = "%" if number.endswith("%") else alt.Undefined
    x = alt.X("mean:Q", title=None, scale=alt.Scale(domain=[low, high], nice=False, zero=False),
              axis=alt.Axis(values=ticks, format=percent, grid=False))  # fmt: skip
    axis = alt.Axis(labels=label_width > 0, labelColor=theme.LIGHT["ink"], grid=True, labelLimit=200,
                    minExtent=label_width, maxExtent=label_width)  # fmt: skip
    y = alt.Y("kind:N", sort=kinds, title=None, scale=alt.Scale(domain=kinds), axis=axis)
    base = alt.Chart(data(marks)).encode(y=y)
    color = alt.condition("datum.largest", alt.value(theme.LIGHT["line4"]), alt.value(theme.LIGHT["line1"]))
    numbers = base.encode(x=alt.value(width), text="text:N")
    all_tokens = alt.Chart(data([{"mean": level}])).mark_rule(strokeDash=[4, 3], color=theme.LIGHT["muted"])
    layers: list[Any] = [
        alt.Chart(data([{"mean": 0.0}])).mark_rule(color=theme.LIGHT["fair"]).encode(x=x),
        all_tokens.encode(x=x),
        base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q"), x2="high:Q", color=color),
        base.mark_circle(size=64, opacity=1).encode(
            x=x, color=color, tooltip=["kind:N", alt.Tooltip("text:N", title="mean")]
        ),
        numbers.transform_filter("!datum.largest").mark_text(
            align="right", dx=TEXT_GAP + text_width, fontSize=TEXT_SIZE
        ),
        numbers.transform_filter("datum.largest").mark_text(
            align="right", dx=TEXT_GAP + text_width, fontSize=TEXT_SIZE, fontWeight=700
        ),
    ]
    return alt.layer(*layers).properties(width=width, height=ROW * len(kinds))


def _round_down(value: float) -> float:
    """Return the largest 1, 2 or 5 times a power of ten that is not above `value`."""
    size = 10.0 ** math.floor(math.log10(value))
    return next(digit * size for digit in (5, 2, 1) if digit * size <= value * (1 + 1e-9))
