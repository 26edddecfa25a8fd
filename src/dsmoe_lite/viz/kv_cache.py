"""Charts of the KV cache: how large it is, what a design saves, what a token costs that is decoded with it."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError, require, require_choice, require_number, require_whole
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.parts import CHARACTER, data, in_order, listed, need_rows, plain, short, spread

Rows = Sequence[dict[str, Any]]
KINDS = ("MHA", "GQA", "MQA", "MLA")
CONTEXTS = [2**power for power in range(10, 18)]  # tokens
BITS = [32, 16, 8, 6, 4]
MOST_MODELS, MOST_SEQUENCES = 20, 64
HEADS, GROUPS = (8, 128, 8), [1, 2, 4, 8]  # lowest, highest and step; every group count divides every number of heads
UNITS = {1e15: "PB", 1e12: "TB", 1e9: "GB", 1e6: "MB", 1e3: "KB"}
TEXT, NAME = 11.5, 12  # font sizes
COST = (500, 300)  # px
LINE = 17  # px between two names


def cache_calculator(
    models: Rows,
    *,
    context: int = 131_072,
    bits: int = 16,
    sequences: int = 1,
    memory: float | None = 80e9,
    title: str = "How big is the KV cache?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """One bar a model, the largest first: bytes of its cache for the context, bits a number and sequences that are set.

    models: {model, kind, elements_per_token}, elements in all layers; kind is MHA, GQA, MQA or MLA. At most 20 models.
    The three controls work without a kernel; context, bits and sequences are where they stand first. memory: bytes of
    a device, a line that shows as soon as the largest cache is a quarter of it.
    """
    need_rows(models, "model", "kind", "elements_per_token")
    require(len(models) <= MOST_MODELS, "models", len(models), f"must be at most {MOST_MODELS}")
    for name, value, choices in (("context", context, CONTEXTS), ("bits", bits, BITS)):
        require(value in choices, name, value, f"must be one of {', '.join(map(str, choices))}")
    require_whole("sequences", sequences, 1, MOST_SEQUENCES)
    if memory is not None:
        require_number("memory", memory, 0.0, open_low=True)
    rows = sorted((_model(row) for row in models), key=lambda row: -row["elements"])
    names = in_order(row["name"] for row in rows)
    require(len(names) == len(rows), "models", len(rows), "two of them have the same name and kind")
    if not description:
        said = [f"{row['name']} {_size(row['elements'] * context * sequences * bits / 8)}" for row in rows]
        description = (
            f"Bars of the KV cache of {_many(len(rows), 'model')}, {_many(sequences, 'sequence')} of {context:,} "
        )
        description += f"tokens, {bits} bits a number; three controls change these. {listed(said, most=len(said))}."
    if not subtitle:
        device = [] if memory is None else [f"A dashed line appears near {_size(memory)} of memory."]
        subtitle = ["Keys and values, or what stands for them, of all layers.", *device]
    return theme.finish(_calculator(rows, context, bits, sequences, memory), title, subtitle, description)


def _model(row: dict[str, Any]) -> dict[str, Any]:
    require_choice("kind", row["kind"], KINDS)
    elements = plain(row["elements_per_token"])
    require_whole("elements_per_token", elements, 1)
    return {"name": f"{row['model']} · {row['kind']}", "kind": row["kind"], "elements": elements}


def _many(count: int, what: str) -> str:
    return f"1 {what}" if count == 1 else f"{count} {what}s"


def _size(amount: float) -> str:
    """Bytes in three digits with their decimal unit: 9.21 GB; the same as `_size_expression`."""
    size, unit = next((pair for pair in UNITS.items() if amount >= pair[0]), (1.0, "B"))
    digits = max(0, 2 - math.floor(math.log10(max(amount / size, 1.0))))
    return (
        f"{amount / size:.{digits}f}".rstrip("0").rstrip(".") + f" {unit}" if digits else f"{amount / size:.0f} {unit}"
    )


def _size_expression(value: str) -> str:
    """A Vega expression: the text of `value` bytes."""
    text = f"format({value}, '.3~r') + ' B'"
    for size, unit in reversed(UNITS.items()):
        text = f"{value} >= {size:.0f} ? format({value} / {size:.0f}, '.3~r') + ' {unit}' : {text}"
    return text


def _calculator(rows: list[dict[str, Any]], context: int, bits: int, sequences: int, memory: float | None) -> Any:
    labels = [f"{tokens // 1024}K tokens" for tokens in CONTEXTS]
    controls = [
        alt.param(name="context", value=context,
                  bind=alt.binding_select(options=CONTEXTS, labels=labels, name="Context ")),
        alt.param(name="bits", value=bits, bind=alt.binding_select(options=BITS, name="Bits a number ")),
        alt.param(name="sequences", value=sequences,
                  bind=alt.binding_range(min=1, max=MOST_SEQUENCES, step=1, name="Sequences ")),
    ]  # fmt: skip
    longest = min(max(len(row["name"]) for row in rows) * NAME * CHARACTER, 230)
    axis = alt.Axis(labelExpr=f"datum.value === 0 ? '0' : {_size_expression('datum.value')}", tickCount=4)
    x = alt.X("bytes:Q", title="cache of all sequences", axis=axis, scale=alt.Scale(zero=True, nice=False))
    y = alt.Y("name:N", sort=[row["name"] for row in rows], title=None,
              axis=alt.Axis(labelColor=theme.LIGHT["ink"], labelLimit=230, grid=False))  # fmt: skip
    color = alt.Color("kind:N", legend=None, scale=alt.Scale(domain=list(KINDS), range=theme.LINES))
    counted = alt.Chart(data(rows)).transform_calculate(bytes="datum.elements * context * sequences * bits / 8")
    counted = counted.transform_calculate(text=_size_expression("datum.bytes"))
    tooltip = [alt.Tooltip("name:N"), alt.Tooltip("elements:Q", title="numbers a token", format=","),
               alt.Tooltip("bytes:Q", format=",")]  # fmt: skip
    layers: list[Any] = [counted.mark_bar(size=15).encode(x=x, y=y, color=color, tooltip=tooltip)]
    if memory is not None:
        limit = counted.transform_aggregate(most="max(bytes)").transform_calculate(bytes=f"{memory:.0f}")
        limit = limit.transform_filter("datum.most >= datum.bytes / 4").transform_calculate(name=f"'{_size(memory)}'")
        ink = theme.LIGHT["ink"]
        layers += [
            limit.mark_rule(color=ink, strokeDash=[5, 3], strokeWidth=1.2).encode(x=x),
            limit.mark_text(color=ink, fontSize=TEXT, dy=-4, baseline="bottom").encode(
                x=x, y=alt.value(0), text="name:N"
            ),
        ]
    halo: dict[str, Any] = {
        "stroke": theme.LIGHT["card"],
        "strokeWidth": 4,
        "strokeJoin": "round",
    }  # keeps the line off the letters
    texts = counted.encode(x=x, y=y, text="text:N")
    layers += [texts.mark_text(align="left", dx=5, fontSize=TEXT, **style) for style in (halo, {})]
    width = int(theme.MAX_WIDTH - 115 - longest)
    return alt.layer(*layers).add_params(*controls).properties(width=width, height=26 * len(rows))


def cache_by_design(
    *,
    heads: int = 128,
    groups: int = 8,
    head_dim: int = 128,
    title: str = "What does each design keep of a token?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Numbers cached for a token in one layer, of one geometry as MHA, GQA, MQA and MLA.

    MLA has d_c = 4 d_h and d_h^R = d_h / 2. heads: 8 to 128 in steps of 8; groups: 1, 2, 4 or 8; two controls change
    them without a kernel. head_dim: d_h, even. DeepSeek-V2 (arXiv:2405.04434), Table 1; its geometry is the default.
    """
    require_whole("heads", heads, HEADS[0], HEADS[1])
    require(heads % HEADS[2] == 0, "heads", heads, f"must be a multiple of {HEADS[2]}")
    require(groups in GROUPS, "groups", groups, f"must be one of {', '.join(map(str, GROUPS))}")
    require_whole("head_dim", head_dim, 2)
    require(head_dim % 2 == 0, "head_dim", head_dim, "must be even: MLA rotates half as many channels")
    numbers = {"MHA": 2 * heads * head_dim, "GQA": 2 * groups * head_dim, "MQA": 2 * head_dim,
               "MLA": 4 * head_dim + head_dim // 2}  # fmt: skip
    if not description:
        said = ", ".join(f"{kind} {number:,}" for kind, number in numbers.items())
        description = f"Bars of the numbers cached for a token in one layer with {heads} heads of {head_dim} and "
        description += f"{_many(groups, 'group')}: {said}. Two controls change heads and groups."
    subtitle = subtitle or [
        f"Numbers in one layer, for a token; heads of {head_dim}.",
        "MLA does not depend on the heads: it is worth 2.25 groups.",
    ]
    formulas = {
        "MHA": (f"2 * heads * {head_dim}", f"'2 × ' + heads + ' heads × {head_dim}'"),
        "GQA": (
            f"2 * groups * {head_dim}",
            f"'2 × ' + groups + (groups == 1 ? ' group' : ' groups') + ' × {head_dim}'",
        ),
        "MQA": (f"2 * {head_dim}", f"'2 × 1 head × {head_dim}'"),
        "MLA": (f"4.5 * {head_dim}", f"'4 × {head_dim} + {head_dim} / 2'"),
    }
    chosen = " : ".join(f"datum.kind === '{kind}' ? {value}" for kind, (value, _) in formulas.items()) + " : 0"
    spelled = " : ".join(f"datum.kind === '{kind}' ? {text}" for kind, (_, text) in formulas.items()) + " : ''"
    controls = [
        alt.param(name="heads", value=heads,
                  bind=alt.binding_range(min=HEADS[0], max=HEADS[1], step=HEADS[2], name="Heads ")),
        alt.param(name="groups", value=groups, bind=alt.binding_select(options=GROUPS, name="Groups of GQA ")),
    ]  # fmt: skip
    base = alt.Chart(data({"kind": kind} for kind in KINDS)).transform_calculate(numbers=chosen, formula=spelled)
    share = f"', ' + format(datum.numbers / (2 * heads * {head_dim}), '.3~p') + ' of MHA'"
    base = base.transform_calculate(
        text=f"datum.formula + ' = ' + format(datum.numbers, ',') + (datum.kind === 'MHA' ? '' : {share})"
    )
    top = 2 * HEADS[1] * head_dim
    x = alt.X("numbers:Q", title="numbers a token and layer", scale=alt.Scale(domain=[0, top], nice=False),
              axis=alt.Axis(tickCount=5, format=",d"))  # fmt: skip
    y = alt.Y("kind:N", sort=list(KINDS), title=None,
              axis=alt.Axis(labelColor=theme.LIGHT["ink"], labelFontWeight=600, grid=False))  # fmt: skip
    color = alt.Color("kind:N", legend=None, scale=alt.Scale(domain=list(KINDS), range=theme.LINES))
    bars = base.mark_bar(size=14, yOffset=8).encode(x=x, y=y, color=color, tooltip=["text:N"])
    texts = base.mark_text(align="left", dx=2, dy=-9, fontSize=TEXT).encode(x=alt.value(0), y=y, text="text:N")
    chart = alt.layer(bars, texts).add_params(*controls).properties(width=560, height=44 * len(KINDS))
    return theme.finish(chart, title, subtitle, description)


def decode_cost(
    rows: Rows,
    *,
    title: str = "What does a decoded token cost?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Milliseconds a decoded token against the tokens in the cache, both on log scales, one line a method.

    rows: {method, context, milliseconds}; at most four methods; of several runs of a method at a context the median is
    drawn, with a bar from the fastest to the slowest.
    """
    need_rows(rows, "method", "context", "milliseconds")
    methods = in_order(row["method"] for row in rows)
    if len(methods) > len(theme.LINES):
        raise InputError(f"methods = {len(methods)}: at most {len(theme.LINES)} lines can be told apart in one panel")
    for row in rows:
        require_whole("context", plain(row["context"]), 1)
        require_number("milliseconds", plain(row["milliseconds"]), 0.0, open_low=True)
    points = _medians(rows, methods)
    most = max(point["runs"] for point in points)
    ends = {method: [point for point in points if point["method"] == method][-1] for method in methods}
    if not description:
        said = listed([f"{m} {short(end['ms'])} ms at {end['context']:,}" for m, end in ends.items()])
        description = f"Line chart of milliseconds a decoded token against context, both on log scales. Last: {said}."
    subtitle = subtitle or (f"Line: median of {most} runs. Bar: fastest to slowest." if most > 1 else "")
    return theme.finish(_cost(points, methods, ends), title, subtitle, description)


def _medians(rows: Rows, methods: list[str]) -> list[dict[str, Any]]:
    runs: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        runs.setdefault((row["method"], plain(row["context"])), []).append(float(plain(row["milliseconds"])))
    return [
        {"method": method, "context": context, "ms": median(seen), "low": min(seen), "high": max(seen),
         "runs": len(seen)}
        for (method, context), seen in sorted(runs.items(), key=lambda run: (methods.index(run[0][0]), run[0][1]))
    ]  # fmt: skip


def _cost(points: list[dict[str, Any]], methods: list[str], ends: dict[str, dict[str, Any]]) -> Any:
    contexts = sorted({point["context"] for point in points})
    low, high = min(point["low"] for point in points) / 1.15, max(point["high"] for point in points) * 1.15
    shown = contexts[:: -(-len(contexts) // 8)]
    x = alt.X("context:Q", title="tokens in the cache (log scale)",
              scale=alt.Scale(type="log", base=2, domain=[contexts[0], max(contexts[-1], contexts[0] + 1)], nice=False),
              axis=alt.Axis(values=shown, grid=False, labelOverlap=False, labelFlush=False,
                            labelExpr="datum.value % 1024 == 0 ? datum.value / 1024 + 'K' : datum.label"))  # fmt: skip
    digits = (1, 2, 5) if high / low < 300 else (1,)
    ticks = [digit * 10.0**power for power in range(-6, 9) for digit in digits if low <= digit * 10.0**power <= high]
    y = alt.Y("ms:Q", title="milliseconds a token (log scale)",
              scale=alt.Scale(type="log", domain=[low, high], nice=False),
              axis=alt.Axis(values=ticks, format="~g") if len(ticks) > 1 else alt.Axis(tickCount=4))  # fmt: skip
    color = alt.Color("method:N", legend=None, scale=alt.Scale(domain=methods, range=theme.LINES[: len(methods)]))
    dash = alt.StrokeDash("method:N", legend=None, scale=alt.Scale(domain=methods, range=theme.DASHES[: len(methods)]))
    tooltip = [alt.Tooltip("method:N"), alt.Tooltip("context:Q", format=","), alt.Tooltip("ms:Q", format=".3~g")]
    base = alt.Chart(data(points)).encode(x=x, y=y, color=color)
    layers: list[Any] = [base.mark_line(strokeWidth=2).encode(strokeDash=dash)]
    if any(point["runs"] > 1 for point in points):
        bars = base.mark_rule(strokeWidth=2, opacity=0.45)
        layers.append(bars.encode(y=alt.Y("low:Q", title="milliseconds a token (log scale)"), y2="high:Q"))
    layers.append(base.mark_circle(size=36, opacity=1).encode(tooltip=tooltip))
    layers.append(_names(methods, ends, (math.log(low), math.log(high))))
    longest = max(len(_end(method, end)) for method, end in ends.items()) * NAME * CHARACTER * 1.1
    width = int(min(COST[0], theme.MAX_WIDTH - 110 - longest))
    return alt.layer(*layers).resolve_scale(color="independent").properties(width=width, height=COST[1])


def _end(method: str, end: dict[str, Any]) -> str:
    return f"{method} {short(end['ms'])} ms"


def _names(methods: list[str], ends: dict[str, dict[str, Any]], y_range: tuple[float, float]) -> Any:
    """Each method's name and last value at the end of its line."""
    gap = LINE * (y_range[1] - y_range[0]) / COST[1]
    places = spread([math.log(ends[method]["ms"]) for method in methods], gap, *y_range)
    spots = [{"method": method, "context": ends[method]["context"], "ms": math.exp(place),
              "text": _end(method, ends[method])} for method, place in zip(methods, places, strict=True)]  # fmt: skip
    color = alt.Color("method:N", legend=None, scale=alt.Scale(domain=methods, range=theme.LINE_LABELS[: len(methods)]))
    text = alt.Chart(data(spots)).mark_text(align="left", dx=8, fontWeight=600)
    return text.encode(x="context:Q", y="ms:Q", text="text:N", color=color)
