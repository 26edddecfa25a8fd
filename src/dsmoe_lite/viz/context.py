"""Charts of long context: the wavelengths of rotary positions, and needles found by depth and length."""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError, require_number, require_whole
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.parts import data, gradient, in_order, need_rows, plain, spread

Rows = Sequence[dict[str, Any]]
WAVES = (520, 320)  # px
LINE = 17  # px between two names
CELL, NARROWEST, GAP = (38, 30), 25, 20  # px: a cell, the least that holds its number, between two panels
AXIS_TITLE = 60  # px
MOST_DEPTHS, MOST_LENGTHS, MOST_KINDS = 10, 12, 6


def rotary_frequencies(
    rows: Rows,
    *,
    original: int,
    extended: int,
    title: str = "Which rotations fit into the context?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Wavelength of each pair of rotated channels, log scale, one line a kind; across, both context lengths.

    rows: {pair, wavelength, kind}; pair j from 0, wavelength in tokens for one turn; at most four kinds. original,
    extended: tokens the model was trained on, and those it is stretched to.
    """
    need_rows(rows, "pair", "wavelength", "kind")
    kinds = in_order(row["kind"] for row in rows)
    if len(kinds) > len(theme.LINES):
        raise InputError(f"kinds = {len(kinds)}: at most {len(theme.LINES)} lines can be told apart in one panel")
    require_whole("original", original, 1)
    require_whole("extended", extended, original)
    for row in rows:
        require_whole("pair", plain(row["pair"]), 0)
        require_number("wavelength", plain(row["wavelength"]), 0.0, open_low=True)
    points = [{"kind": row["kind"], "pair": plain(row["pair"]), "wavelength": float(plain(row["wavelength"]))}
              for row in sorted(rows, key=lambda row: (kinds.index(row["kind"]), plain(row["pair"])))]  # fmt: skip
    if not description:
        longer = {kind: sum(p["wavelength"] > extended for p in points if p["kind"] == kind) for kind in kinds}
        shorter = {kind: sum(p["wavelength"] <= original for p in points if p["kind"] == kind) for kind in kinds}
        said = [f"{kind}: {shorter[kind]} turn once within {original:,} tokens, {longer[kind]} not within {extended:,}"
                for kind in kinds]  # fmt: skip
        description = f"Line chart of the wavelength of rotary channel pairs, log scale. {'; '.join(said)}."
    subtitle = (
        subtitle or "Tokens for one full turn. Below a dashed line a pair turns at least once within that context."
    )
    return theme.finish(_waves(points, kinds, original, extended), title, subtitle, description)


def _waves(points: list[dict[str, Any]], kinds: list[str], original: int, extended: int) -> Any:
    values = [point["wavelength"] for point in points] + [float(original), float(extended)]
    low, high = min(values) / 1.5, max(values) * 1.5
    pairs = [point["pair"] for point in points]
    first, last = min(pairs), max(max(pairs), min(pairs) + 1)
    ticks = [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    x = alt.X("pair:Q", title="channel pair j", scale=alt.Scale(domain=[first, last], nice=False, padding=6),
              axis=alt.Axis(grid=False, tickMinStep=1, format="d"))  # fmt: skip
    y = alt.Y("wavelength:Q", title="tokens for one turn (log scale)", axis=alt.Axis(values=ticks, format="~s"),
              scale=alt.Scale(type="log", domain=[low, high], nice=False))  # fmt: skip
    color = alt.Color("kind:N", legend=None, scale=alt.Scale(domain=kinds, range=theme.LINES[: len(kinds)]))
    dash = alt.StrokeDash("kind:N", legend=None, scale=alt.Scale(domain=kinds, range=theme.DASHES[: len(kinds)]))
    tooltip = [alt.Tooltip("kind:N"), alt.Tooltip("pair:Q"), alt.Tooltip("wavelength:Q", format=",.4~r")]
    base = alt.Chart(data(points)).encode(x=x, y=y, color=color)
    limits = [{"wavelength": original, "name": f"trained on {original:,} tokens"},
              {"wavelength": extended, "name": f"stretched to {extended:,}"}]  # fmt: skip
    levels = alt.Chart(data(limits if extended > original else limits[:1])).encode(y=y)
    layers: list[Any] = [
        levels.mark_rule(color=theme.LIGHT["muted"], strokeDash=[5, 3]),
        levels.mark_text(align="left", dy=-8, fontSize=11.5, color=theme.LIGHT["muted"]).encode(
            x=alt.value(2), text="name:N"
        ),
        base.mark_line(strokeWidth=2).encode(strokeDash=dash),
        base.mark_circle(size=26, opacity=1).encode(tooltip=tooltip),
        _kinds(points, kinds, (math.log(low), math.log(high))),
    ]
    return alt.layer(*layers).resolve_scale(color="independent").properties(width=WAVES[0], height=WAVES[1])


def _kinds(points: list[dict[str, Any]], kinds: list[str], y_range: tuple[float, float]) -> Any:
    ends = {kind: [point for point in points if point["kind"] == kind][-1] for kind in kinds}
    gap = LINE * (y_range[1] - y_range[0]) / WAVES[1]
    places = spread([math.log(ends[kind]["wavelength"]) for kind in kinds], gap, *y_range)
    spots = [{"kind": kind, "pair": ends[kind]["pair"], "wavelength": math.exp(place)}
             for kind, place in zip(kinds, places, strict=True)]  # fmt: skip
    color = alt.Color("kind:N", legend=None, scale=alt.Scale(domain=kinds, range=theme.LINE_LABELS[: len(kinds)]))
    text = alt.Chart(data(spots)).mark_text(align="left", dx=8, fontWeight=600, limit=110)
    return text.encode(x="pair:Q", y="wavelength:Q", text="kind:N", color=color)


def needle(
    rows: Rows,
    *,
    title: str = "Is the needle found?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.ConcatChart:
    """A panel a kind: recall by where the needle lies (across) and how long the text is (down), a mean over seeds.

    rows: {kind, length, depth, recall, seed}; length in tokens; depth and recall in [0, 1]. At most 6 kinds, 12 lengths
    and 10 different depths: put finer ones into bins first.
    """
    need_rows(rows, "kind", "length", "depth", "recall", "seed")
    kinds = in_order(row["kind"] for row in rows)
    for row in rows:
        require_whole("length", plain(row["length"]), 1)
        require_number("depth", plain(row["depth"]), 0.0, 1.0)
        require_number("recall", plain(row["recall"]), 0.0, 1.0)
    depths = sorted({float(plain(row["depth"])) for row in rows})
    lengths = sorted({int(plain(row["length"])) for row in rows})
    for name, found, most in (("kinds", kinds, MOST_KINDS), ("depths", depths, MOST_DEPTHS),
                              ("lengths", lengths, MOST_LENGTHS)):  # fmt: skip
        if len(found) > most:
            raise InputError(f"{name} = {len(found)}: at most {most} can be read")
    seeds = len({row["seed"] for row in rows})
    cells = _cells(rows)
    if not description:
        said = []
        for kind in kinds:
            own = [cell for cell in cells if cell["kind"] == kind]
            worst = min(own, key=lambda cell: cell["recall"])
            mean = sum(cell["recall"] for cell in own) / len(own)
            said.append(f"{kind}: mean {mean:.0%}, lowest {worst['recall']:.0%} at {worst['length']} tokens, depth "
                        f"{worst['depth']}%")  # fmt: skip
        description = f"Heat maps of recall by depth and length, one a kind. {'; '.join(said)}."
    seen = f"mean of {seeds} seeds" if seeds > 1 else "one seed"
    subtitle = subtitle or f"Across: where in the text the needle lies. Number: recall in percent, {seen}."
    room = theme.MAX_WIDTH - 120 + GAP  # beside the axis of the first panel
    columns = max(1, min(len(kinds), int(room // (max(NARROWEST * len(depths), AXIS_TITLE) + GAP))))
    size = min(CELL[0], (room / columns - GAP) / len(depths))
    names = [_percent(depth) for depth in depths]
    panels = [
        _panel([cell for cell in cells if cell["kind"] == kind], kind, names, [f"{n:,}" for n in lengths],
               size, labels=i % columns == 0)
        for i, kind in enumerate(kinds)
    ]  # fmt: skip
    chart = alt.concat(*panels, columns=columns, spacing=GAP - 4, align="each").resolve_scale(color="shared")
    return theme.finish(chart, title, subtitle, description)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}"


def _cells(rows: Rows) -> list[dict[str, Any]]:
    seen: dict[tuple[str, int, float], list[float]] = {}
    for row in rows:
        place = (row["kind"], int(plain(row["length"])), float(plain(row["depth"])))
        seen.setdefault(place, []).append(float(plain(row["recall"])))
    return [{"kind": kind, "length": f"{length:,}", "depth": _percent(depth), "recall": math.fsum(found) / len(found)}
            for (kind, length, depth), found in seen.items()]  # fmt: skip


def _panel(
    cells: list[dict[str, Any]], kind: str, depths: list[str], lengths: list[str], size: float, *, labels: bool
) -> Any:
    x = alt.X("depth:N", sort=depths, title="depth (%)", scale=alt.Scale(domain=depths),
              axis=alt.Axis(labelAngle=0, grid=False, labelFontSize=11, labelOverlap=False))  # fmt: skip
    y = alt.Y("length:N", sort=lengths, title="tokens of the text" if labels else None,
              scale=alt.Scale(domain=lengths), axis=alt.Axis(labels=labels, grid=False))  # fmt: skip
    base = alt.Chart(data(cells)).transform_calculate(percent="100 * datum.recall").encode(x=x, y=y)
    boxes = base.mark_rect(stroke=theme.LIGHT["card"], strokeWidth=1.5).encode(
        color=alt.Color("recall:Q", scale=theme.ramp((0.0, 1.0)),
                        legend=gradient("recall", values=[0, 0.5, 1], format="%")),
        tooltip=["kind:N", "length:N", "depth:N", alt.Tooltip("recall:Q", format=".1%")],
    )  # fmt: skip
    color = alt.condition(f"datum.recall > {theme.DEEP_FROM}", alt.value(theme.LIGHT["on_deep"]),
                          alt.value(theme.LIGHT["on_pale"]))  # fmt: skip
    numbers = base.mark_text(fontSize=11).encode(text=alt.Text("percent:Q", format=".0f"), color=color)
    heading = alt.Chart(data([{"kind": kind}])).mark_text(align="left", fontSize=12.5, fontWeight=600)
    layers = [boxes, numbers, heading.encode(x=alt.value(0), y=alt.value(-13), text="kind:N")]  # level in every panel
    return alt.layer(*layers).properties(width=size * len(depths), height=CELL[1] * len(lengths))
