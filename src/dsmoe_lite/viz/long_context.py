"""Charts of long contexts, and the question that each answers.

- rotary_frequencies: which pairs of rotated channels turn once within the context?
- needle: is a fact found again, by its depth in the text and the length of the text?
"""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError, require_int, require_number
from dsmoe_lite.viz import identity, theme
from dsmoe_lite.viz.helpers import data, distinct, gradient_legend, plain, require_rows, separate_labels

Rows = Sequence[dict[str, Any]]
WAVELENGTHS_SIZE = (520, 320)  # px
LABEL_GAP = 17  # px between two labels
CELL, MIN_CELL_WIDTH, GAP = (38, 30), 25, 20  # px: a cell, one that fits its number, between two panels
AXIS_TITLE_WIDTH = 60  # px
MAX_DEPTHS, MAX_LENGTHS, MAX_KINDS = 10, 12, 6


def rotary_frequencies(
    rows: Rows,
    *,
    original: int,
    extended: int,
    title: str = "Which rotations fit into the context?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Draw the wavelength of each pair of rotated channels, log scale, one line per kind, beside both context lengths.

    rows: {pair, wavelength, kind}; pair j from 0, wavelength in tokens per turn; at most four kinds. original: context
    length in training; extended: the length to which it is extended.
    """
    require_rows(rows, "pair", "wavelength", "kind")
    kinds = distinct(row["kind"] for row in rows)
    if len(kinds) > theme.N_LINES:
        raise InputError(f"kinds = {len(kinds)}: at most {theme.N_LINES} lines can be distinguished in one panel")
    require_int("original", original, 1)
    require_int("extended", extended, original)
    for row in rows:
        require_int("pair", plain(row["pair"]), 0)
        require_number("wavelength", plain(row["wavelength"]), 0.0, open_low=True)
    points = [{"kind": row["kind"], "pair": plain(row["pair"]), "wavelength": float(plain(row["wavelength"]))}
              for row in sorted(rows, key=lambda row: (kinds.index(row["kind"]), plain(row["pair"])))]  # fmt: skip
    if not description:
        longer = {kind: sum(p["wavelength"] > extended for p in points if p["kind"] == kind) for kind in kinds}
        shorter = {kind: sum(p["wavelength"] <= original for p in points if p["kind"] == kind) for kind in kinds}
        counts = [f"{kind}: {shorter[kind]} turn once within {original:,} tokens, "
                  f"{longer[kind]} not within {extended:,}" for kind in kinds]  # fmt: skip
        description = f"Line chart of the wavelength of rotary channel pairs, log scale. {'; '.join(counts)}."
    subtitle = subtitle or "Tokens per full turn. Below a dashed line, a pair turns at least once within that context."
    return theme.finish(_wavelengths(points, kinds, original, extended), title, subtitle, description)


def _wavelengths(points: list[dict[str, Any]], kinds: list[str], original: int, extended: int) -> Any:
    values = [point["wavelength"] for point in points] + [float(original), float(extended)]
    low, high = min(values) / 1.5, max(values) * 1.5
    pairs = [point["pair"] for point in points]
    first, last = min(pairs), max(max(pairs), min(pairs) + 1)
    ticks = [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    x = alt.X("pair:Q", title="channel pair j", scale=alt.Scale(domain=[first, last], nice=False, padding=6),
              axis=alt.Axis(grid=False, tickMinStep=1, format="d"))  # fmt: skip
    y = alt.Y("wavelength:Q", title="tokens per turn (log scale)", axis=alt.Axis(values=ticks, format="~s"),
              scale=alt.Scale(type="log", domain=[low, high], nice=False))  # fmt: skip
    color = alt.Color("kind:N", legend=None, scale=alt.Scale(domain=kinds, range=identity.colors(kinds)))
    dash = alt.StrokeDash("kind:N", legend=None, scale=alt.Scale(domain=kinds, range=theme.DASHES[: len(kinds)]))
    tooltip = [alt.Tooltip("kind:N"), alt.Tooltip("pair:Q"), alt.Tooltip("wavelength:Q", format=",.4~r")]
    base = alt.Chart(data(points)).encode(x=x, y=y, color=color)
    limits = [{"wavelength": original, "name": f"trained on {original:,} tokens"},
              {"wavelength": extended, "name": f"extended to {extended:,}"}]  # fmt: skip
    levels = alt.Chart(data(limits if extended > original else limits[:1])).encode(y=y)
    layers: list[Any] = [
        levels.mark_rule(color=theme.LIGHT["muted"], strokeDash=[5, 3]),
        levels.mark_text(align="left", dy=-8, fontSize=11.5, color=theme.LIGHT["muted"]).encode(
            x=alt.value(2), text="name:N"
        ),
        base.mark_line(strokeWidth=2).encode(strokeDash=dash),
        base.mark_circle(size=26, opacity=1).encode(tooltip=tooltip),
        _line_labels(points, kinds, (math.log(low), math.log(high))),
    ]
    return (
        alt.layer(*layers)
        .resolve_scale(color="independent")
        .properties(width=WAVELENGTHS_SIZE[0], height=WAVELENGTHS_SIZE[1])
    )


def _line_labels(points: list[dict[str, Any]], kinds: list[str], y_range: tuple[float, float]) -> Any:
    ends = {kind: [point for point in points if point["kind"] == kind][-1] for kind in kinds}
    gap = LABEL_GAP * (y_range[1] - y_range[0]) / WAVELENGTHS_SIZE[1]
    heights = separate_labels([math.log(ends[kind]["wavelength"]) for kind in kinds], gap, *y_range)
    labels = [{"kind": kind, "pair": ends[kind]["pair"], "wavelength": math.exp(height)}
              for kind, height in zip(kinds, heights, strict=True)]  # fmt: skip
    color = alt.Color("kind:N", legend=None, scale=alt.Scale(domain=kinds, range=identity.label_colors(kinds)))
    text = alt.Chart(data(labels)).mark_text(style="line_name", align="left", dx=8, fontWeight=600, limit=110)
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
