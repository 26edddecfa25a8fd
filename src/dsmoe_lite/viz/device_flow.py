"""The chart `device_flow`: to which devices must a token be sent, under a limit on the devices that it may reach?"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.helpers import CHARACTER_WIDTH, data, flatten_packed, gradient_legend, plain, word_list
from dsmoe_lite.viz.token_routing import MONO_WIDTH, visible

MAX_TOKENS, MAX_DEVICES, MAX_TOKEN_LENGTH = 48, 8, 12
WIDTH, MAX_CELL_WIDTH, ROW_HEIGHT = 560, 60, 25  # px
TOKEN_SIZE = 11  # font size
Table = list[list[float]]


def device_flow(
    tokens: Sequence[str],
    limits: Sequence[Mapping[str, Any]],
    *,
    limit: int | None = None,
    title: str = "To which devices must tokens travel?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.VConcatChart:
    """Draw a matrix of tokens by devices: the number of the token's experts on the device; the fill is their gate sum.

    limits: one mapping per device limit M = 1, 2, ... with counts [T][G], gates [T][G] (the sum of gates on the
    device), reached (mean devices per token) and affinity (the share kept, in [0, 1]). A slider sets M; a table
    below gives the cost of each M. limit: the M shown first, by default the last. At most 48 tokens and 8 devices.
    """
    counts, gates = _tables(tokens, limits, "counts"), _tables(tokens, limits, "gates")
    n_devices = len(counts[0][0])
    _check(counts, gates, limits)
    first = len(limits) if limit is None else int(plain(limit))
    if not 1 <= first <= len(limits):
        raise InputError(f"limit = {first}: must be 1 to {len(limits)}")
    costs = [{"limit": m, "reached": float(plain(table["reached"])), "affinity": float(plain(table["affinity"]))}
             for m, table in enumerate(limits, 1)]  # fmt: skip
    if not description:
        ends = costs[:: max(1, len(costs) - 1)]
        reach = word_list([f"{cost['reached']:.2f} devices and keeps {cost['affinity']:.1%} of its affinity "
                           f"at M = {cost['limit']}" for cost in ends])  # fmt: skip
        description = f"Matrix of {len(tokens)} tokens by {n_devices} devices; a slider sets the device limit M. "
        description += f"A token reaches {reach}."
    subtitle = subtitle or ["Number: the token's experts on the device. Fill: the sum of their gates.",
                            "Below: the cost of each limit M on a token's devices."]  # fmt: skip
    rows = [
        {"t": t, "token": visible(token, MAX_TOKEN_LENGTH), "counts": _packed(counts, t), "gates": _packed(gates, t)}
        for t, token in enumerate(tokens)
    ]
    highest = max(gate for table in gates for row in table for gate in row) or 1.0
    max_count = max(count for table in counts for row in table for count in row)
    slider = alt.binding_range(min=1, max=len(limits), step=1, name="Device limit M ")
    limit_param = alt.param(name="limit", value=first, bind=slider)
    matrix = _matrix(rows, n_devices, highest, len(f"{max_count:g}")).add_params(limit_param)
    both = alt.vconcat(matrix, _costs(costs), spacing=16).resolve_scale(color="independent")
    return theme.finish(both, title, subtitle, description)


def _tables(tokens: Sequence[str], limits: Sequence[Mapping[str, Any]], name: str) -> list[Table]:
    """Return the table `name` of each limit. Raises InputError unless each is T x G."""
    if not 1 <= len(tokens) <= MAX_TOKENS:
        raise InputError(f"tokens = {len(tokens)} of them: must be 1 to {MAX_TOKENS}")
    if not limits:
        raise InputError("limits = []: a chart needs at least one device limit")
    tables: list[Table] = []
    for m, given in enumerate(limits, 1):
        for field in (name, "reached", "affinity"):
            if field not in given:
                raise InputError(f"limits, M = {m}: has no {field!r}")
        table = [[float(plain(cell)) for cell in row] for row in given[name]]
        n_devices = len(tables[0][0] if tables else table[0]) if table else 0
        if not 1 <= n_devices <= MAX_DEVICES:
            raise InputError(f"limits, M = {m}: {name} has {n_devices} devices, must be 1 to {MAX_DEVICES}")
        if len(table) != len(tokens) or any(len(row) != n_devices for row in table):
            raise InputError(f"limits, M = {m}: {name} must have {len(tokens)} rows of {n_devices}")
        if not all(0 <= cell < math.inf for row in table for cell in row):
            raise InputError(f"limits, M = {m}: {name} must be 0 or above")
        tables.append(table)
    return tables


def _check(counts: list[Table], gates: list[Table], limits: Sequence[Mapping[str, Any]]) -> None:
    if len(gates[0][0]) != len(counts[0][0]):
        raise InputError(f"limits: gates has {len(gates[0][0])} devices, counts {len(counts[0][0])}")
    for m, (table, given) in enumerate(zip(counts, limits, strict=True), 1):
        if not 0 <= plain(given["affinity"]) <= 1:
            raise InputError(f"limits, M = {m}: affinity = {given['affinity']!r}, must be 0 to 1")
        for t, row in enumerate(table):
            reached = sum(count > 0 for count in row)
            if reached > m:
                raise InputError(f"limits, M = {m}: token {t} reaches {reached} devices")


def _packed(tables: list[Table], t: int) -> str:
    """Pack row t of all tables: numbers joined by spaces, tables by bars."""
    return "|".join(" ".join(f"{cell:.3g}" for cell in table[t]) for table in tables)


def _matrix(rows: list[dict[str, Any]], n_devices: int, highest: float, digits: int) -> Any:
    step = min(MAX_CELL_WIDTH, WIDTH / len(rows))
    devices = [f"d{d}" for d in range(n_devices)]
    cells = alt.Chart()
    x = alt.X("t:O", axis=None)
    y = alt.Y("device:N", sort=devices, title=None,
              axis=alt.Axis(labelColor=theme.LIGHT["ink"], labelFontSize=11, grid=False))  # fmt: skip
    tooltip = [alt.Tooltip("token:N"), alt.Tooltip("device:N"), alt.Tooltip("count:Q", title="experts"),
               alt.Tooltip("gate:Q", format=".3f")]  # fmt: skip
    legend = gradient_legend("sum of gates on the device", tickCount=3, format="~g")
    boxes = cells.mark_rect(stroke=theme.LIGHT["card"], strokeWidth=1).encode(
        x=x, y=y, tooltip=tooltip,
        color=alt.Color("gate:Q", scale=theme.ramp((0.0, highest)), legend=legend),
    )  # fmt: skip
    color = alt.condition(f"datum.gate > {theme.DEEP_FROM * highest:.4g}", alt.value(theme.LIGHT["on_deep"]),
                          alt.value(theme.LIGHT["on_pale"]))  # fmt: skip
    reached = cells.transform_filter("datum.count > 0")
    layers: list[Any] = [boxes]
    if digits * 10.5 * CHARACTER_WIDTH + 2 <= step:
        numbers = reached.mark_text(fontSize=10.5)
        layers.append(numbers.encode(x=x, y=y, text="count:Q", color=color))
    horizontal = max(len(row["token"]) for row in rows) * MONO_WIDTH * TOKEN_SIZE / 13 + 6 <= step
    direction: dict[str, Any] = {"align": "center"} if horizontal else {"angle": 270, "align": "left"}
    ink = theme.LIGHT["ink"]
    words = alt.Chart(data(rows)).mark_text(font=theme.MONO, fontSize=TOKEN_SIZE, color=ink, **direction)
    words = words.encode(x=x, y=alt.value(-9 if horizontal else -6), text="token:N")
    both = alt.layer(_at_chosen_limit(layers, rows, n_devices), words)
    return both.properties(width=step * len(rows), height=ROW_HEIGHT * n_devices)


def _at_chosen_limit(layers: list[Any], rows: list[dict[str, Any]], n_devices: int) -> Any:
    """Draw the layers with one row per token and device, at the limit that the slider sets."""
    chosen = alt.layer(*layers, data=data(rows)).transform_calculate(
        count="split(datum.counts, '|')[limit - 1]",
        gate="split(datum.gates, '|')[limit - 1]",
        d=f"'{' '.join(map(str, range(n_devices)))}'",
    )
    return flatten_packed(chosen, ["count", "gate", "d"]).transform_calculate(device="'d' + datum.d")


def _costs(costs: list[dict[str, Any]]) -> Any:
    """Draw the cost of each limit, one column per limit; a frame marks the chosen one."""
    names = {"limit": "limit M", "reached": "devices reached", "affinity": "affinity kept"}
    formats = {"limit": "g", "reached": ".2f", "affinity": ".0%"}
    cells = [
        {"limit": cost["limit"], "name": name, "text": f"{cost[field]:{formats[field]}}"}
        for cost in costs
        for field, name in names.items()
    ]
    x = alt.X("limit:O", axis=None)
    y = alt.Y("name:N", sort=list(names.values()), title=None,
              axis=alt.Axis(labelColor=theme.LIGHT["ink"], labelLimit=200, grid=False))  # fmt: skip
    texts = alt.Chart(data(cells)).mark_text().encode(x=x, y=y, text="text:N")
    chosen = alt.Chart(data({"limit": cost["limit"]} for cost in costs)).transform_filter("datum.limit == limit")
    frame = chosen.mark_rect(filled=False, stroke=theme.LIGHT["frame"], strokeWidth=2).encode(x=x)
    return alt.layer(texts, frame).properties(width=54 * len(costs), height=22 * len(names))
