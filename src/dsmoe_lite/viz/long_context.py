"""Charts of long contexts, and the question that each answers.

- rotary_frequencies: which pairs of rotated channels turn once within the context, and which does YaRN slow down?
- needle: is a fact found again, by its depth in the text and the length of the text?
"""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError, require, require_int, require_number
from dsmoe_lite.viz import identity, theme
from dsmoe_lite.viz.helpers import data, distinct, gradient_legend, plain, require_rows

Rows = Sequence[dict[str, Any]]
WAVELENGTHS_SIZE = (520, 320)  # px
FACTORS, LENGTHS = (1, 128, 1), (512, 16_384, 512)  # of YaRN: min, max, step
LABEL_GAP = 17  # px between two labels
CELL, MIN_CELL_WIDTH, GAP = (38, 30), 25, 20  # px: a cell, one that fits its number, between two panels
AXIS_TITLE_WIDTH = 60  # px
MAX_DEPTHS, MAX_LENGTHS, MAX_KINDS = 10, 12, 6


def rotary_frequencies(
    *,
    channels: int = 64,
    theta: float = 10_000.0,
    factor: int = 40,
    trained: int = 4096,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    title: str = "Which rotations fit into the context?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Draw the wavelength of each pair of rotated channels by RoPE and by YaRN, beside both context lengths; log scale.

    The frequencies are those of `layers.rope.rope_frequencies`, in the chart's own formulas: two sliders change the
    factor and the trained length without a kernel. factor: 1 to 128; trained: tokens, 512 to 16,384 in steps of 512.
    """
    require_int("channels", channels, 2)
    require(channels % 2 == 0, "channels", channels, "must be even: channels turn in pairs")
    require_number("theta", theta, 1.0, open_low=True)
    require_int("factor", factor, FACTORS[0], FACTORS[1])
    require_int("trained", trained, LENGTHS[0], LENGTHS[1])
    require(trained % LENGTHS[2] == 0, "trained", trained, f"must be a multiple of {LENGTHS[2]}")
    formulas = _yarn_formulas(channels, theta, beta_fast, beta_slow)
    if not description:
        description = (
            f"Line chart of the wavelength of {channels // 2} rotary channel pairs, log scale, by RoPE and by "
        )
        description += (
            f"YaRN with factor {factor} for a model trained on {trained:,} tokens: pairs that turn many times "
        )
        description += "keep their wavelength, slow ones get a longer one. Two sliders change factor and length."
    subtitle = subtitle or "Tokens per full turn. Below a dashed line, a pair turns at least once within that context."
    controls = [
        alt.param(name=name, value=value, bind=alt.binding_range(min=low, max=high, step=step, name=f"{label} "))
        for name, value, (low, high, step), label in (
            ("factor", factor, FACTORS, "Factor s"), ("trained", trained, LENGTHS, "Trained length L, tokens"),
        )
    ]  # fmt: skip
    return theme.finish(_wavelengths(channels, theta, formulas).add_params(*controls), title, subtitle, description)


def _yarn_formulas(channels: int, theta: float, beta_fast: float, beta_slow: float) -> dict[str, str]:
    """Return the Vega expressions of `layers.rope.yarn_range`, and of the wavelengths of pair `datum.pair`."""

    def pair(turns: float) -> str:
        return f"{channels} * log(trained / (2 * PI * {turns})) / {2 * math.log(theta)}"

    slowed = "clamp((datum.pair - datum.low) / max(datum.high - datum.low, 0.001), 0, 1)"
    rope = f"2 * PI * pow({theta}, 2 * datum.pair / {channels})"
    return {
        "low": f"max(floor({pair(beta_fast)}), 0)",
        "high": f"min(max(ceil({pair(beta_slow)}), 0), {channels - 1})",
        "RoPE": rope,
        "YaRN": f"{rope} / (1 - {slowed} + {slowed} / factor)",
    }


def _wavelengths(channels: int, theta: float, formulas: dict[str, str]) -> Any:
    kinds, last = ["RoPE", "YaRN"], channels // 2 - 1
    slowest = 2 * math.pi * theta ** (2 * last / channels)
    low, high = 4.0, 1.5 * max(slowest * FACTORS[1], LENGTHS[1] * FACTORS[1])
    ticks = [10.0**power for power in range(1, math.floor(math.log10(high)) + 1)]
    x = alt.X("pair:Q", title="channel pair j", scale=alt.Scale(domain=[0, max(last, 1)], nice=False, padding=6),
              axis=alt.Axis(grid=False, tickMinStep=1, format="d"))  # fmt: skip
    y = alt.Y("wavelength:Q", title="tokens per turn (log scale)", axis=alt.Axis(values=ticks, format="~s"),
              scale=alt.Scale(type="log", domain=[low, high], nice=False))  # fmt: skip
    color = alt.Color("kind:N", legend=None, scale=alt.Scale(domain=kinds, range=identity.colors(kinds)))
    dash = alt.StrokeDash("kind:N", legend=None, scale=alt.Scale(domain=kinds, range=theme.DASHES[: len(kinds)]))
    tooltip = [alt.Tooltip("kind:N"), alt.Tooltip("pair:Q"), alt.Tooltip("wavelength:Q", format=",.4~r")]
    ranged: Any = alt.Chart(alt.sequence(0, channels // 2, as_="pair"))
    for name, formula in formulas.items():
        ranged = ranged.transform_calculate(**{name: formula})
    pairs = ranged.transform_fold(kinds, as_=["kind", "wavelength"])
    base = pairs.encode(x=x, y=y, color=color)
    ink, muted = theme.LIGHT["ink"], theme.LIGHT["muted"]
    levels = alt.Chart(data([{"times": "1"}, {"times": "s"}])).transform_filter("datum.times == '1' || factor > 1")
    levels = levels.transform_calculate(
        wavelength="datum.times == '1' ? trained : trained * factor",
        name="(datum.times == '1' ? 'trained on ' : 'extended to ') + format(datum.wavelength, ',') + ' tokens'",
    ).encode(y=y)
    level_text: dict[str, Any] = {"align": "left", "fontSize": 11.5, "color": muted}
    range_text: dict[str, Any] = {"align": "right", "dx": -4, "baseline": "bottom", "fontWeight": 600, "color": ink}
    right, bottom = WAVELENGTHS_SIZE  # where no line passes
    said = ranged.transform_filter("datum.pair == 0").transform_calculate(
        kept="'Pairs 0 to ' + datum.low + ' keep their frequency'",
        slowed=f"factor == 1 || datum.high > {last} ? 'no pair is slowed down by all of s' : "
        f"'pairs ' + datum.high + ' to {last} turn ' + factor + ' times slower'",
    )
    layers: list[Any] = [
        levels.mark_rule(color=muted, strokeDash=[5, 3]),
        *(levels.transform_filter(f"datum.times == '{times}'").mark_text(**level_text, dy=dy)
          .encode(x=alt.value(2), text="name:N") for times, dy in (("1", 9), ("s", -8))),
        base.mark_line(strokeWidth=2).encode(strokeDash=dash),
        base.mark_circle(size=26, opacity=1).encode(tooltip=tooltip),
        _line_names(pairs, kinds, last, math.log(high / low)),
        *(said.mark_text(**range_text, dy=dy).encode(x=alt.value(right), y=alt.value(bottom), text=f"{field}:N")
          for field, dy in (("kept", -20), ("slowed", -4))),
    ]  # fmt: skip
    return (
        alt.layer(*layers)
        .resolve_scale(color="independent")
        .properties(width=WAVELENGTHS_SIZE[0], height=WAVELENGTHS_SIZE[1])
    )


def _line_names(pairs: Any, kinds: list[str], last: int, y_range: float) -> Any:
    """Write each kind at the end of its line; names of lines that end close together are moved apart."""
    apart = math.exp(LABEL_GAP * y_range / WAVELENGTHS_SIZE[1])
    side = {"RoPE": f"min(datum.RoPE, datum.middle / {math.sqrt(apart)})",
            "YaRN": f"max(datum.YaRN, datum.middle * {math.sqrt(apart)})"}  # fmt: skip
    ends = pairs.transform_filter(f"datum.pair == {last}")
    ends = ends.transform_calculate(middle="sqrt(datum.RoPE * datum.YaRN)")
    ends = ends.transform_calculate(wavelength=f"datum.kind == 'RoPE' ? {side['RoPE']} : {side['YaRN']}")
    color = alt.Color("kind:N", legend=None, scale=alt.Scale(domain=kinds, range=identity.label_colors(kinds)))
    text = ends.mark_text(style="line_name", align="left", dx=8, fontWeight=600, limit=110)
    return text.encode(x="pair:Q", y="wavelength:Q", text="kind:N", color=color)


def needle(
    rows: Rows,
    *,
    title: str = "Is the needle found?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.ConcatChart:
    """Draw one panel per kind: mean recall over seeds by the needle's depth (across) and the text's length (down).

    rows: {kind, length, depth, recall, seed}; length in tokens; depth and recall in [0, 1]. At most 6 kinds, 12 lengths
    and 10 depths: bin finer depths first.
    """
    require_rows(rows, "kind", "length", "depth", "recall", "seed")
    kinds = distinct(row["kind"] for row in rows)
    for row in rows:
        require_int("length", plain(row["length"]), 1)
        require_number("depth", plain(row["depth"]), 0.0, 1.0)
        require_number("recall", plain(row["recall"]), 0.0, 1.0)
    depths = sorted({float(plain(row["depth"])) for row in rows})
    lengths = sorted({int(plain(row["length"])) for row in rows})
    for name, values, limit in (("kinds", kinds, MAX_KINDS), ("depths", depths, MAX_DEPTHS),
                              ("lengths", lengths, MAX_LENGTHS)):  # fmt: skip
        if len(values) > limit:
            raise InputError(f"{name} = {len(values)}: at most {limit} can be read")
    seeds = len({row["seed"] for row in rows})
    cells = _cells(rows)
    if not description:
        summaries = []
        for kind in kinds:
            of_kind = [cell for cell in cells if cell["kind"] == kind]
            worst = min(of_kind, key=lambda cell: cell["recall"])
            mean = sum(cell["recall"] for cell in of_kind) / len(of_kind)
            summaries.append(f"{kind}: mean {mean:.0%}, lowest {worst['recall']:.0%} at {worst['length']} tokens, "
                             f"depth {worst['depth']}%")  # fmt: skip
        description = f"Heat maps of recall by depth and length, one per kind. {'; '.join(summaries)}."
    averaged = f"mean of {seeds} seeds" if seeds > 1 else "one seed"
    subtitle = subtitle or f"Across: position of the needle in the text. Number: recall in percent, {averaged}."
    available = theme.MAX_WIDTH - 120 + GAP  # beside the axis of the first panel
    columns = max(1, min(len(kinds), int(available // (max(MIN_CELL_WIDTH * len(depths), AXIS_TITLE_WIDTH) + GAP))))
    cell_width = min(CELL[0], (available / columns - GAP) / len(depths))
    depth_labels = [_percent(depth) for depth in depths]
    panels = [
        _panel([cell for cell in cells if cell["kind"] == kind], kind, depth_labels, [f"{n:,}" for n in lengths],
               cell_width, labels=i % columns == 0)
        for i, kind in enumerate(kinds)
    ]  # fmt: skip
    chart = alt.concat(*panels, columns=columns, spacing=GAP - 4, align="each").resolve_scale(color="shared")
    return theme.finish(chart, title, subtitle, description)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}"


def _cells(rows: Rows) -> list[dict[str, Any]]:
    recalls: dict[tuple[str, int, float], list[float]] = {}
    for row in rows:
        cell = (row["kind"], int(plain(row["length"])), float(plain(row["depth"])))
        recalls.setdefault(cell, []).append(float(plain(row["recall"])))
    return [{"kind": kind, "length": f"{length:,}", "depth": _percent(depth), "recall": math.fsum(seeds) / len(seeds)}
            for (kind, length, depth), seeds in recalls.items()]  # fmt: skip


def _panel(
    cells: list[dict[str, Any]], kind: str, depths: list[str], lengths: list[str], cell_width: float, *, labels: bool
) -> Any:
    x = alt.X("depth:N", sort=depths, title="depth (%)", scale=alt.Scale(domain=depths),
              axis=alt.Axis(labelAngle=0, grid=False, labelFontSize=11, labelOverlap=False))  # fmt: skip
    y = alt.Y("length:N", sort=lengths, title="tokens in the text" if labels else None,
              scale=alt.Scale(domain=lengths), axis=alt.Axis(labels=labels, grid=False))  # fmt: skip
    base = alt.Chart(data(cells)).transform_calculate(percent="100 * datum.recall").encode(x=x, y=y)
    boxes = base.mark_rect(stroke=theme.LIGHT["card"], strokeWidth=1.5).encode(
        color=alt.Color("recall:Q", scale=theme.ramp((0.0, 1.0)),
                        legend=gradient_legend("recall", values=[0, 0.5, 1], format="%")),
        tooltip=["kind:N", "length:N", "depth:N", alt.Tooltip("recall:Q", format=".1%")],
    )  # fmt: skip
    color = alt.condition(f"datum.recall > {theme.DEEP_FROM}", alt.value(theme.LIGHT["on_deep"]),
                          alt.value(theme.LIGHT["on_pale"]))  # fmt: skip
    numbers = base.mark_text(style="in_cell", fontSize=11).encode(text=alt.Text("percent:Q", format=".0f"), color=color)
    heading = alt.Chart(data([{"kind": kind}])).mark_text(align="left", fontSize=12.5, fontWeight=600)
    layers = [
        boxes,
        numbers,
        heading.encode(x=alt.value(0), y=alt.value(-13), text="kind:N"),
    ]  # at the same height in every panel
    return alt.layer(*layers).properties(width=cell_width * len(depths), height=CELL[1] * len(lengths))
