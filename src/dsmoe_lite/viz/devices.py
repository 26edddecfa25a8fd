"""Chart of devices: where the experts of each token sit, under a limit on the devices that it may reach."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.parts import CHARACTER, data, flattened, gradient, listed, plain
from dsmoe_lite.viz.tokens import WORD_WIDTH, visible

MOST_TOKENS, MOST_DEVICES, LONGEST = 48, 8, 12
WIDTH, WIDEST_CELL, ROW = 560, 60, 25  # px
WORD = 11  # font size
Table = list[list[float]]


def device_flow(
    tokens: Sequence[str],
    limits: Sequence[Mapping[str, Any]],
    *,
    limit: int | None = None,
    title: str = "Where must tokens travel?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.VConcatChart:
    """A matrix of tokens by devices: the number says how many of the token's experts sit there, the fill their gate.

    limits: one mapping a device limit M = 1, 2, ... with counts [T][D], gates [T][D] (the gate mass on the device),
    reached (mean devices a token) and kept (share of affinity, in [0, 1]). A slider sets M; beneath, what each M costs.
    limit: the M shown first, by default the last. At most 48 tokens and 8 devices.
    """
    counts, gates = _tables(tokens, limits, "counts"), _tables(tokens, limits, "gates")
    n_devices = len(counts[0][0])
    _check(counts, gates, limits)
    first = len(limits) if limit is None else int(plain(limit))
    if not 1 <= first <= len(limits):
        raise InputError(f"limit = {first}: must be 1 to {len(limits)}")
    costs = [{"limit": m, "reached": float(plain(one["reached"])), "kept": float(plain(one["kept"]))}
             for m, one in enumerate(limits, 1)]  # fmt: skip
    if not description:
        ends = costs[:: max(1, len(costs) - 1)]
        said = listed([f"{c['reached']:.2f} devices and keeps {c['kept']:.1%} of its affinity at M = {c['limit']}"
                       for c in ends])  # fmt: skip
        description = f"Matrix of {len(tokens)} tokens by {n_devices} devices; a slider sets the device limit M. "
        description += f"A token reaches {said}."
    subtitle = subtitle or ["Number: how many of the token's experts sit on the device. Fill: their gate.",
                            "Beneath: what each limit M on a token's devices costs."]  # fmt: skip
    rows = [
        {"t": t, "token": visible(token, LONGEST), "counts": _packed(counts, t), "gates": _packed(gates, t)}
        for t, token in enumerate(tokens)
    ]
    highest = max(gate for table in gates for row in table for gate in row) or 1.0
    widest = max(count for table in counts for row in table for count in row)
    slider = alt.binding_range(min=1, max=len(limits), step=1, name="Device limit M ")
    at = alt.param(name="limit", value=first, bind=slider)
    matrix = _matrix(rows, n_devices, highest, len(f"{widest:g}")).add_params(at)
    both = alt.vconcat(matrix, _costs(costs), spacing=16).resolve_scale(color="independent")
    return theme.finish(both, title, subtitle, description)


def _tables(tokens: Sequence[str], limits: Sequence[Mapping[str, Any]], name: str) -> list[Table]:
    """The table `name` of each limit; raises InputError unless all of them are T x D."""
    if not 1 <= len(tokens) <= MOST_TOKENS:
        raise InputError(f"tokens = {len(tokens)} of them: must be 1 to {MOST_TOKENS}")
    if not limits:
        raise InputError("limits = []: a chart needs at least one device limit")
    tables: list[Table] = []
    for m, one in enumerate(limits, 1):
        for field in (name, "reached", "kept"):
            if field not in one:
                raise InputError(f"limits, M = {m}: has no {field!r}")
        table = [[float(plain(cell)) for cell in row] for row in one[name]]
        n_devices = len(tables[0][0] if tables else table[0]) if table else 0
        if not 1 <= n_devices <= MOST_DEVICES:
            raise InputError(f"limits, M = {m}: {name} has {n_devices} devices, must be 1 to {MOST_DEVICES}")
        if len(table) != len(tokens) or any(len(row) != n_devices for row in table):
            raise InputError(f"limits, M = {m}: {name} must have {len(tokens)} rows of {n_devices}")
        if not all(0 <= cell < math.inf for row in table for cell in row):
            raise InputError(f"limits, M = {m}: {name} must be 0 or above")
        tables.append(table)
    return tables


def _check(counts: list[Table], gates: list[Table], limits: Sequence[Mapping[str, Any]]) -> None:
    if len(gates[0][0]) != len(counts[0][0]):
        raise InputError(f"limits: gates has {len(gates[0][0])} devices, counts {len(counts[0][0])}")
    for m, (table, one) in enumerate(zip(counts, limits, strict=True), 1):
        if not 0 <= plain(one["kept"]) <= 1:
            raise InputError(f"limits, M = {m}: kept = {one['kept']!r}, must be 0 to 1")
        for t, row in enumerate(table):
            reached = sum(count > 0 for count in row)
            if reached > m:
                raise InputError(f"limits, M = {m}: token {t} reaches {reached} devices")


def _packed(tables: list[Table], t: int) -> str:
    """Row t of each table: numbers joined by spaces, tables by bars."""
    return "|".join(" ".join(f"{cell:.3g}" for cell in table[t]) for table in tables)


def _matrix(rows: list[dict[str, Any]], n_devices: int, highest: float, digits: int) -> Any:
    step = min(WIDEST_CELL, WIDTH / len(rows))
    devices = [f"d{d}" for d in range(n_devices)]
    cells = alt.Chart()
    x = alt.X("t:O", axis=None)
    y = alt.Y("device:N", sort=devices, title=None,
              axis=alt.Axis(labelColor=theme.LIGHT["ink"], labelFontSize=11, grid=False))  # fmt: skip
    tooltip = [alt.Tooltip("token:N"), alt.Tooltip("device:N"), alt.Tooltip("count:Q", title="experts"),
               alt.Tooltip("gate:Q", format=".3f")]  # fmt: skip
    legend = gradient("gate on the device", tickCount=3, format="~g")
    boxes = cells.mark_rect(stroke=theme.LIGHT["card"], strokeWidth=1).encode(
        x=x, y=y, tooltip=tooltip,
        color=alt.Color("gate:Q", scale=theme.ramp((0.0, highest)), legend=legend),
    )  # fmt: skip
    color = alt.condition(f"datum.gate > {theme.DEEP_FROM * highest:.4g}", alt.value(theme.LIGHT["on_deep"]),
                          alt.value(theme.LIGHT["on_pale"]))  # fmt: skip
    reached = cells.transform_filter("datum.count > 0")
    layers: list[Any] = [boxes]
    if digits * 10.5 * CHARACTER + 2 <= step:
        numbers = reached.mark_text(fontSize=10.5)
        layers.append(numbers.encode(x=x, y=y, text="count:Q", color=color))
    upright = max(len(row["token"]) for row in rows) * WORD_WIDTH * WORD / 13 + 6 <= step
    turn: dict[str, Any] = {"align": "center"} if upright else {"angle": 270, "align": "left"}
    ink = theme.LIGHT["ink"]
    words = alt.Chart(data(rows)).mark_text(font=theme.MONO, fontSize=WORD, color=ink, **turn)
    words = words.encode(x=x, y=alt.value(-9 if upright else -6), text="token:N")
    both = alt.layer(_under_limit(layers, rows, n_devices), words)
    return both.properties(width=step * len(rows), height=ROW * n_devices)


def _under_limit(layers: list[Any], rows: list[dict[str, Any]], n_devices: int) -> Any:
    """The layers over one row a token and device, as the chosen limit has it."""
    chosen = alt.layer(*layers, data=data(rows)).transform_calculate(
        count="split(datum.counts, '|')[limit - 1]",
        gate="split(datum.gates, '|')[limit - 1]",
        d=f"'{' '.join(map(str, range(n_devices)))}'",
    )
    return flattened(chosen, ["count", "gate", "d"]).transform_calculate(device="'d' + datum.d")


def _costs(costs: list[dict[str, Any]]) -> Any:
    """What each limit costs, a column a limit; the chosen one is framed."""
    names = {"limit": "limit M", "reached": "devices reached", "kept": "affinity kept"}
    cells = [
        {"limit": cost["limit"], "name": name,
         "text": {"limit": f"{cost[field]:g}", "reached": f"{cost[field]:.2f}", "kept": f"{cost[field]:.0%}"}[field]}
        for cost in costs for field, name in names.items()
    ]  # fmt: skip
    x = alt.X("limit:O", axis=None)
    y = alt.Y("name:N", sort=list(names.values()), title=None,
              axis=alt.Axis(labelColor=theme.LIGHT["ink"], labelLimit=200, grid=False))  # fmt: skip
    texts = alt.Chart(data(cells)).mark_text().encode(x=x, y=y, text="text:N")
    here = alt.Chart(data({"limit": cost["limit"]} for cost in costs)).transform_filter("datum.limit == limit")
    frame = here.mark_rect(filled=False, stroke=theme.LIGHT["line2"], strokeWidth=2).encode(x=x)
    return alt.layer(texts, frame).properties(width=54 * len(costs), height=22 * len(names))
