"""Charts of the KV cache, and the question that each answers.

- cache_calculator: how large is the KV cache of each model, for a context, a precision and a number of sequences?
- cache_by_design: how many numbers does each attention design cache per token?
- decode_cost: how long does it take to decode a token, by the length of the context?
"""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError, require, require_choice, require_int, require_number
from dsmoe_lite.viz import identity, theme
from dsmoe_lite.viz.helpers import (
    CHARACTER_WIDTH,
    data,
    distinct,
    plain,
    require_rows,
    separate_labels,
    short_number,
    word_list,
)

Rows = Sequence[dict[str, Any]]
KINDS = ("MHA", "GQA", "MQA", "MLA")
CONTEXTS = [2**power for power in range(10, 18)]  # tokens
BITS = [32, 16, 8, 6, 4]
MAX_MODELS, MAX_SEQUENCES = 20, 64
HEADS, GROUPS = (8, 128, 8), [1, 2, 4, 8]  # HEADS: min, max, step; all are divisible by all GROUPS
UNITS = {1e15: "PB", 1e12: "TB", 1e9: "GB", 1e6: "MB", 1e3: "KB"}
TEXT_SIZE, NAME_SIZE = 11.5, 12  # font sizes
DECODE_COST_SIZE = (500, 300)  # px
LABEL_GAP = 17  # px between two labels


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
    """Draw one bar per model, largest first: the bytes of its cache at the chosen context, bits and sequences.

    models: {model, kind, elements_per_token}, elements in all layers; kind is MHA, GQA, MQA or MLA. At most 20 models.
    The three controls work without a kernel; context, bits and sequences are their initial values. memory: bytes of a
    device, a line that appears once the largest cache is a quarter of it.
    """
    require_rows(models, "model", "kind", "elements_per_token")
    require(len(models) <= MAX_MODELS, "models", len(models), f"must be at most {MAX_MODELS}")
    for name, value, choices in (("context", context, CONTEXTS), ("bits", bits, BITS)):
        require(value in choices, name, value, f"must be one of {', '.join(map(str, choices))}")
    require_int("sequences", sequences, 1, MAX_SEQUENCES)
    if memory is not None:
        require_number("memory", memory, 0.0, open_low=True)
    rows = sorted((_model(row) for row in models), key=lambda row: -row["elements"])
    names = distinct(row["name"] for row in rows)
    require(len(names) == len(rows), "models", len(rows), "two of them have the same name and kind: rename one")
    if not description:
        sizes = [f"{row['name']} {_size(row['elements'] * context * sequences * bits / 8)}" for row in rows]
        description = f"Bar chart of the KV cache of {_count(len(rows), 'model')} for {_count(sequences, 'sequence')} "
        description += f"of {context:,} tokens at {bits} bits per number; three controls change these. "
        description += f"{word_list(sizes, limit=len(sizes))}."
    if not subtitle:
        device = [] if memory is None else [f"A dashed line appears near {_size(memory)} of memory."]
        subtitle = ["Keys and values of all layers, or the latents that replace them.", *device]
    return theme.finish(_calculator(rows, context, bits, sequences, memory), title, subtitle, description)


def _model(row: dict[str, Any]) -> dict[str, Any]:
    require_choice("kind", row["kind"], KINDS)
    elements = plain(row["elements_per_token"])
    require_int("elements_per_token", elements, 1)
    return {"name": f"{row['model']} · {row['kind']}", "kind": row["kind"], "elements": elements}


def _count(n: int, noun: str) -> str:
    return f"1 {noun}" if n == 1 else f"{n} {noun}s"


def _size(n_bytes: float) -> str:
    """Write bytes with three digits and a decimal unit, 9.21 GB, exactly as `_size_expression` does in the chart."""
    size, unit = next((pair for pair in UNITS.items() if n_bytes >= pair[0]), (1.0, "B"))
    digits = max(0, 2 - math.floor(math.log10(max(n_bytes / size, 1.0))))
    text = f"{n_bytes / size:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if digits else text} {unit}"


def _size_expression(value: str) -> str:
    """Return the Vega expression that writes `value` bytes as text."""
    text = f"format({value}, '.3~r') + ' B'"
    for size, unit in reversed(UNITS.items()):
        text = f"{value} >= {size:.0f} ? format({value} / {size:.0f}, '.3~r') + ' {unit}' : {text}"
    return text


def _calculator(rows: list[dict[str, Any]], context: int, bits: int, sequences: int, memory: float | None) -> Any:
    labels = [f"{tokens // 1024}K tokens" for tokens in CONTEXTS]
    controls = [
        alt.param(name="context", value=context,
                  bind=alt.binding_select(options=CONTEXTS, labels=labels, name="Context ")),
        alt.param(name="bits", value=bits, bind=alt.binding_select(options=BITS, name="Bits per number ")),
        alt.param(name="sequences", value=sequences,
                  bind=alt.binding_range(min=1, max=MAX_SEQUENCES, step=1, name="Sequences ")),
    ]  # fmt: skip
    names_width = min(max(len(row["name"]) for row in rows) * NAME_SIZE * CHARACTER_WIDTH, 230)
    axis = alt.Axis(labelExpr=f"datum.value === 0 ? '0' : {_size_expression('datum.value')}", tickCount=4)
    x = alt.X("bytes:Q", title="cache of all sequences", axis=axis, scale=alt.Scale(zero=True, nice=False))
    y = alt.Y("name:N", sort=[row["name"] for row in rows], title=None,
              axis=alt.Axis(labelColor=theme.LIGHT["ink"], labelLimit=230, grid=False))  # fmt: skip
    color = alt.Color("kind:N", legend=None, scale=alt.Scale(domain=list(KINDS), range=identity.colors(KINDS)))
    sized = alt.Chart(data(rows)).transform_calculate(bytes="datum.elements * context * sequences * bits / 8")
    sized = sized.transform_calculate(text=_size_expression("datum.bytes"))
    tooltip = [alt.Tooltip("name:N"), alt.Tooltip("elements:Q", title="numbers per token", format=","),
               alt.Tooltip("bytes:Q", format=",")]  # fmt: skip
    layers: list[Any] = [sized.mark_bar(size=15).encode(x=x, y=y, color=color, tooltip=tooltip)]
    if memory is not None:
        limit = sized.transform_aggregate(largest="max(bytes)").transform_calculate(bytes=f"{memory:.0f}")
        limit = limit.transform_filter("datum.largest >= datum.bytes / 4").transform_calculate(
            name=f"'{_size(memory)}'"
        )
        ink = theme.LIGHT["ink"]
        layers += [
            limit.mark_rule(color=ink, strokeDash=[5, 3], strokeWidth=1.2).encode(x=x),
            limit.mark_text(color=ink, fontSize=TEXT_SIZE, dy=-4, baseline="bottom").encode(
                x=x, y=alt.value(0), text="name:N"
            ),
        ]
    # so that the line does not cross the letters
    halo: dict[str, Any] = {"stroke": theme.LIGHT["card"], "strokeWidth": 4, "strokeJoin": "round"}
    texts = sized.encode(x=x, y=y, text="text:N")
    layers += [texts.mark_text(align="left", dx=5, fontSize=TEXT_SIZE, **style) for style in (halo, {})]
    width = int(theme.MAX_WIDTH - 115 - names_width)
    return alt.layer(*layers).add_params(*controls).properties(width=width, height=26 * len(rows))


def cache_by_design(
    *,
    heads: int = 128,
    groups: int = 8,
    head_dim: int = 128,
    title: str = "What does each design cache per token?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Draw the numbers cached per token in one layer by MHA, GQA, MQA and MLA with the same heads.

    MLA has d_c = 4 d_h and d_h^R = d_h / 2. heads: 8 to 128 in steps of 8; groups: 1, 2, 4 or 8; two controls change
    them without a kernel. head_dim: d_h, even. DeepSeek-V2 (arXiv:2405.04434), Table 1; its sizes are the default.
    """
    require_int("heads", heads, HEADS[0], HEADS[1])
    require(heads % HEADS[2] == 0, "heads", heads, f"must be a multiple of {HEADS[2]}")
    require(groups in GROUPS, "groups", groups, f"must be one of {', '.join(map(str, GROUPS))}")
    require_int("head_dim", head_dim, 2)
    require(head_dim % 2 == 0, "head_dim", head_dim, "must be even: MLA rotates head_dim / 2 channels")
    numbers = {"MHA": 2 * heads * head_dim, "GQA": 2 * groups * head_dim, "MQA": 2 * head_dim,
               "MLA": 4 * head_dim + head_dim // 2}  # fmt: skip
    if not description:
        counts = ", ".join(f"{kind} {number:,}" for kind, number in numbers.items())
        description = f"Bar chart of the numbers cached per token in one layer with {heads} heads of {head_dim} and "
        description += f"{_count(groups, 'group')}: {counts}. Two controls change heads and groups."
    subtitle = subtitle or [
        f"Numbers per token in one layer; heads of {head_dim} channels.",
        "MLA does not depend on the number of heads: it costs as much as 2.25 groups.",
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
    number_expression = (
        " : ".join(f"datum.kind === '{kind}' ? {value}" for kind, (value, _) in formulas.items()) + " : 0"
    )
    formula_expression = (
        " : ".join(f"datum.kind === '{kind}' ? {text}" for kind, (_, text) in formulas.items()) + " : ''"
    )
    controls = [
        alt.param(name="heads", value=heads,
                  bind=alt.binding_range(min=HEADS[0], max=HEADS[1], step=HEADS[2], name="Heads ")),
        alt.param(name="groups", value=groups, bind=alt.binding_select(options=GROUPS, name="Groups of GQA ")),
    ]  # fmt: skip
    base = alt.Chart(data({"kind": kind} for kind in KINDS)).transform_calculate(
        numbers=number_expression, formula=formula_expression
    )
    share = f"', ' + format(datum.numbers / (2 * heads * {head_dim}), '.3~p') + ' of MHA'"
    base = base.transform_calculate(
        text=f"datum.formula + ' = ' + format(datum.numbers, ',') + (datum.kind === 'MHA' ? '' : {share})"
    )
    x_max = 2 * HEADS[1] * head_dim
    x = alt.X("numbers:Q", title="numbers per token and layer", scale=alt.Scale(domain=[0, x_max], nice=False),
              axis=alt.Axis(tickCount=5, format=",d"))  # fmt: skip
    y = alt.Y("kind:N", sort=list(KINDS), title=None,
              axis=alt.Axis(labelColor=theme.LIGHT["ink"], labelFontWeight=600, grid=False))  # fmt: skip
    color = alt.Color("kind:N", legend=None, scale=alt.Scale(domain=list(KINDS), range=identity.colors(KINDS)))
    bars = base.mark_bar(size=14, yOffset=8).encode(x=x, y=y, color=color, tooltip=["text:N"])
    texts = base.mark_text(align="left", dx=2, dy=-9, fontSize=TEXT_SIZE).encode(x=alt.value(0), y=y, text="text:N")
    chart = alt.layer(bars, texts).add_params(*controls).properties(width=560, height=44 * len(KINDS))
    return theme.finish(chart, title, subtitle, description)


def decode_cost(
    rows: Rows,
    *,
    title: str = "How long does it take to decode a token?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.LayerChart:
    """Draw milliseconds per decoded token against the tokens in the cache, both on log scales; one line per method.

    rows: {method, context, milliseconds}; at most four methods. Several runs of a method at one context are drawn as
    their median with a bar from the fastest to the slowest.
    """
    require_rows(rows, "method", "context", "milliseconds")
    methods = distinct(row["method"] for row in rows)
    if len(methods) > theme.N_LINES:
        raise InputError(f"methods = {len(methods)}: at most {theme.N_LINES} lines can be distinguished in one panel")
    for row in rows:
        require_int("context", plain(row["context"]), 1)
        require_number("milliseconds", plain(row["milliseconds"]), 0.0, open_low=True)
    points = _medians(rows, methods)
    n_runs = max(point["runs"] for point in points)
    ends = {method: [point for point in points if point["method"] == method][-1] for method in methods}
    if not description:
        last_values = word_list([f"{m} {short_number(end['ms'])} ms at {end['context']:,}" for m, end in ends.items()])
        description = (
            f"Line chart of milliseconds per decoded token against context, both on log scales. Last: {last_values}."
        )
    subtitle = subtitle or (f"Line: median of {n_runs} runs. Bar: fastest to slowest." if n_runs > 1 else "")
    return theme.finish(_decode_cost_chart(points, methods, ends), title, subtitle, description)


def _medians(rows: Rows, methods: list[str]) -> list[dict[str, Any]]:
    runs: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        runs.setdefault((row["method"], plain(row["context"])), []).append(float(plain(row["milliseconds"])))
    return [
        {"method": method, "context": context, "ms": median(of_runs), "low": min(of_runs), "high": max(of_runs),
         "runs": len(of_runs)}
        for (method, context), of_runs in sorted(runs.items(), key=lambda run: (methods.index(run[0][0]), run[0][1]))
    ]  # fmt: skip


def _decode_cost_chart(points: list[dict[str, Any]], methods: list[str], ends: dict[str, dict[str, Any]]) -> Any:
    contexts = sorted({point["context"] for point in points})
    low, high = min(point["low"] for point in points) / 1.15, max(point["high"] for point in points) * 1.15
    labelled = contexts[:: -(-len(contexts) // 8)]
    x = alt.X("context:Q", title="tokens in the cache (log scale)",
              scale=alt.Scale(type="log", base=2, domain=[contexts[0], max(contexts[-1], contexts[0] + 1)], nice=False),
              axis=alt.Axis(values=labelled, grid=False, labelOverlap=False, labelFlush=False,
                            labelExpr="datum.value % 1024 == 0 ? datum.value / 1024 + 'K' : datum.label"))  # fmt: skip
    digits = (1, 2, 5) if high / low < 300 else (1,)
    ticks = [digit * 10.0**power for power in range(-6, 9) for digit in digits if low <= digit * 10.0**power <= high]
    y = alt.Y("ms:Q", title="milliseconds per token (log scale)",
              scale=alt.Scale(type="log", domain=[low, high], nice=False),
              axis=alt.Axis(values=ticks, format="~g") if len(ticks) > 1 else alt.Axis(tickCount=4))  # fmt: skip
    color = alt.Color("method:N", legend=None, scale=alt.Scale(domain=methods, range=identity.colors(methods)))
    dash = alt.StrokeDash("method:N", legend=None, scale=alt.Scale(domain=methods, range=theme.DASHES[: len(methods)]))
    tooltip = [alt.Tooltip("method:N"), alt.Tooltip("context:Q", format=","), alt.Tooltip("ms:Q", format=".3~g")]
    base = alt.Chart(data(points)).encode(x=x, y=y, color=color)
    layers: list[Any] = [base.mark_line(strokeWidth=2).encode(strokeDash=dash)]
    if any(point["runs"] > 1 for point in points):
        bars = base.mark_rule(strokeWidth=2, opacity=0.45)
        layers.append(bars.encode(y=alt.Y("low:Q", title="milliseconds per token (log scale)"), y2="high:Q"))
    layers.append(base.mark_circle(size=36, opacity=1).encode(tooltip=tooltip))
    layers.append(_line_labels(methods, ends, (math.log(low), math.log(high))))
    labels_width = max(len(_end_label(method, end)) for method, end in ends.items()) * NAME_SIZE * CHARACTER_WIDTH * 1.1
    width = int(min(DECODE_COST_SIZE[0], theme.MAX_WIDTH - 110 - labels_width))
    return alt.layer(*layers).resolve_scale(color="independent").properties(width=width, height=DECODE_COST_SIZE[1])


def _end_label(method: str, end: dict[str, Any]) -> str:
    return f"{method} {short_number(end['ms'])} ms"


def _line_labels(methods: list[str], ends: dict[str, dict[str, Any]], y_range: tuple[float, float]) -> Any:
    """Draw each method's name and last value at the end of its line."""
    gap = LABEL_GAP * (y_range[1] - y_range[0]) / DECODE_COST_SIZE[1]
    heights = separate_labels([math.log(ends[method]["ms"]) for method in methods], gap, *y_range)
    labels = [{"method": method, "context": ends[method]["context"], "ms": math.exp(height),
               "text": _end_label(method, ends[method])}
              for method, height in zip(methods, heights, strict=True)]  # fmt: skip
    color = alt.Color("method:N", legend=None, scale=alt.Scale(domain=methods, range=identity.label_colors(methods)))
    text = alt.Chart(data(labels)).mark_text(style="line_name", align="left", dx=8, fontWeight=600)
    return text.encode(x="context:Q", y="ms:Q", text="text:N", color=color)
