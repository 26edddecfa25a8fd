"""One layer of attention that generates, and that reads a prompt: MHA, GQA and both paths of MLA, beside what this
machine can do at most, copy memory and multiply matrices.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoe_lite.bench.ratios import Step, median_interval
from dsmoe_lite.bench.timing import captured, turns
from dsmoe_lite.common.errors import RunError, require, require_whole
from dsmoe_lite.common.machine import resolve_device
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.config import AnyAttention, AttentionConfig, MLAConfig, to_dict
from dsmoe_lite.layers.attention import Attention
from dsmoe_lite.layers.cache import GrowingCache
from dsmoe_lite.layers.mla import MLA
from dsmoe_lite.layers.rope import rope_tables
from dsmoe_lite.training.provenance import provenance

SCHEMA_VERSION = 1
CONTEXTS = (1024, 2048, 4096, 8192)
ROUNDS = 12
METHODS = ("MHA", "GQA", "MLA naive", "MLA absorbed")
PREFILLS = ((2048, 6), (8192, 3))  # tokens, pairs
ABSORBED_GOAL, CACHE_GOAL, PREFILL_GOAL = 5.0, 1 / 7, 1.3


@dataclass(frozen=True)
class Shape:
    """Three kinds of attention of one model width; MHA has the heads of MLA, and their width without rotated part."""

    d_model: int
    mha: AttentionConfig
    gqa: AttentionConfig
    mla: MLAConfig


V2_LITE = Shape(  # DeepSeek-V2-Lite, and what its attention would be with keys and values of its own for every head
    2048,
    AttentionConfig(n_heads=16, head_dim=128),
    AttentionConfig(n_heads=16, head_dim=128, n_kv_heads=4),
    MLAConfig(n_heads=16, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=512),
)


@dataclass(frozen=True)
class Place:
    """Where and in which numbers a step runs, and the sizes that show what this place can do."""

    device: str
    dtype: torch.dtype
    batch_size: int
    copied_bytes: int
    matmul_width: int
    copy_goal: float  # cache bytes a second that absorbed MLA should read, as a share of what a copy moves
    steps: int = 1  # timed together


PLACES = {
    "cpu": Place("cpu", torch.float32, 1, 2**28, 2048, copy_goal=0.5),
    "cuda": Place("cuda", torch.bfloat16, 64, 2**30, 8192, copy_goal=0.7, steps=10),
}


def bench_mla(
    contexts: Sequence[int] = CONTEXTS,
    rounds: int = ROUNDS,
    device: str = "cpu",
    *,
    shape: Shape = V2_LITE,
    prefills: Sequence[tuple[int, int]] = PREFILLS,
) -> dict[str, Any]:
    """Measure everything: a JSON-able record of rows by name, with the goals, the versions and the commit.

    prefills: lengths of prompts, and over how many pairs each. What the machine can do is measured before and after the
    steps that are held against it. Raises InputError for contexts that do not grow and for a GPU that is not there.
    """
    place = PLACES[resolve_device(device)]
    _check(contexts, rounds)
    try:
        before = peaks(rounds, place)
        decode = decode_costs(contexts, rounds, shape=shape, place=place)
        after = peaks(rounds, place)
        prefill = [row for n, pairs in prefills for row in prefill_ratios((n,), pairs, shape=shape, place=place)]
    except torch.OutOfMemoryError:
        raise RunError(f"contexts up to {max(contexts)} do not fit into this GPU's memory: give shorter ones") from None
    machine = {name: round((before[name] + after[name]) / 2, 3) for name in before}
    lines = slopes(decode, machine)
    cache = cache_ratio(max(contexts), shape=shape)
    return {
        "schema_version": SCHEMA_VERSION,
        "shape": to_dict(shape),
        "place": {"device": place.device, "dtype": str(place.dtype), "batch_size": place.batch_size, "rounds": rounds},
        "peaks": machine,
        "decode": decode,
        "cache": cache,
        "prefill": prefill,
        "slopes": lines,
        "goals": goals(decode, cache, prefill, lines, place),
        "provenance": provenance(),
    }


def record_path(device: str) -> Path:
    """Where the record of one kind of device lies."""
    return DATA / "runs" / f"bench-mla-{device}.json"


def decode_costs(
    contexts: Sequence[int] = CONTEXTS, rounds: int = ROUNDS, *, shape: Shape = V2_LITE, place: Place = PLACES["cpu"]
) -> list[dict[str, Any]]:
    """Time one step of a layer, a new token that looks at `context` tokens, itself included; a row for each.

    Medians of `rounds` turns of everything, with their 95% interval by order statistics. `times absorbed`: the median
    over turns of the time over absorbed MLA's in the same turn. `cache bytes`: what is allocated, room for no token too
    many. `FLOPs`: those in a step that grow with the context, two for each multiplication.
    """
    _check(contexts, rounds)
    caches: dict[tuple[str, int], GrowingCache] = {}
    steps: dict[tuple[str, int], Step] = {}
    layers = Layers(shape, place)
    for context in contexts:
        for method in METHODS:
            cache = caches[method, context] = filled_cache(layers.config(method), context, place)
            steps[method, context] = captured(layers.decode(method, cache), place.device)
    seconds = turns(steps, rounds, place.device, "decoding", place.steps)
    rows = []
    for (method, context), own in seconds.items():
        middle, low, high = (round(1000 * value, 4) for value in median_interval(own))
        absorbed = seconds["MLA absorbed", context]
        times = statistics.median(a / b for a, b in zip(own, absorbed, strict=True))
        rows.append(
            {
                "method": method,
                "context": context,
                "milliseconds": middle,
                "low": low,
                "high": high,
                "times absorbed": round(times, 3),
                "cache bytes": caches[method, context].nbytes,
                "FLOPs": 2 * place.batch_size * context * _multiplications(shape, method),
            }
        )
    return rows


def prefill_ratios(
    lengths: Sequence[int], rounds: int, *, shape: Shape = V2_LITE, place: Place = PLACES["cpu"]
) -> list[dict[str, Any]]:
    """Time the layer on prompts, one sequence each, into an empty cache: naive MLA over MHA, median of pairs."""
    require_whole("rounds", rounds, 3)
    layers, rows = Layers(shape, place), []
    for n_tokens in lengths:
        require_whole("tokens", n_tokens, 1)
        steps = {method: captured(layers.prefill(method, n_tokens), place.device) for method in ("MHA", "MLA naive")}
        seconds = turns(steps, rounds, place.device, f"reading {n_tokens} tokens", place.steps)
        mha, mla = seconds["MHA"], seconds["MLA naive"]
        ratio, low, high = median_interval([a / b for a, b in zip(mla, mha, strict=True)])
        rows.append(
            {
                "tokens": n_tokens,
                "MHA milliseconds": round(1000 * statistics.median(mha), 3),
                "MLA milliseconds": round(1000 * statistics.median(mla), 3),
                "MLA / MHA": round(ratio, 3),
                "low": round(low, 3),
                "high": round(high, 3),
            }
        )
    return rows


def cache_ratio(n_tokens: int = 8192, *, shape: Shape = V2_LITE, place: Place = PLACES["cpu"]) -> dict[str, Any]:
    """Return the bytes that caches of n_tokens allocate, and MLA's over MHA's."""
    MHA, MLA = (filled_cache(config, n_tokens, place).nbytes for config in (shape.mha, shape.mla))
    return {"tokens": n_tokens, "MHA bytes": MHA, "MLA bytes": MLA, "MLA / MHA": MLA / MHA}


def peaks(rounds: int = ROUNDS, place: Place = PLACES["cpu"]) -> dict[str, float]:
    """Measure what the machine can do: `copy GB/s`, bytes read and bytes written by `copy_`, and `matmul GFLOP/s`."""
    require_whole("rounds", rounds, 3)
    source = torch.ones(place.copied_bytes, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    n = place.matmul_width
    a, b = (_random(place, n, n) for _ in range(2))
    product = torch.empty_like(a)
    steps: dict[str, Step] = {
        "copy": lambda: target.copy_(source),
        "matmul": lambda: torch.mm(a, b, out=product),
    }
    seconds = {
        name: statistics.median(own) for name, own in turns(steps, rounds, place.device, "peaks", place.steps).items()
    }
    return {
        "copy GB/s": round(2 * place.copied_bytes / seconds["copy"] / 1e9, 3),
        "matmul GFLOP/s": round(2 * n**3 / seconds["matmul"] / 1e9, 3),
    }


def slopes(rows: Sequence[dict[str, Any]], machine: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """Fit a line through each method's milliseconds by context, and say what its slope means; a row a method.

    What does not grow with the context, such as reading the weights, is not in a slope. GB/s: cache bytes over time;
    GFLOP/s: the rows' FLOPs over time; with `machine`, what `peaks` found, also the shares of it. None where noise
    leaves no time that grows.
    """
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        milliseconds, in_bytes, flops = (_slope(own, name) for name in ("milliseconds", "cache bytes", "FLOPs"))
        grows = milliseconds > 0
        row = {
            "method": method,
            "ms per 1K tokens": round(1024 * milliseconds, 4),
            "GB/s": round(in_bytes / milliseconds / 1e6, 4) if grows else None,
            "GFLOP/s": round(flops / milliseconds / 1e6, 4) if grows else None,
            "FLOPs a byte": round(flops / in_bytes, 3),
        }
        if machine is not None:
            row["of copy"] = round(in_bytes / milliseconds / 1e6 / machine["copy GB/s"], 4) if grows else None
            row["of matmul"] = round(flops / milliseconds / 1e6 / machine["matmul GFLOP/s"], 4) if grows else None
        found.append(row)
    return found


def goals(
    decode: Sequence[dict[str, Any]],
    cache: dict[str, Any],
    prefill: Sequence[dict[str, Any]],
    lines: Sequence[dict[str, Any]],
    place: Place,
) -> list[dict[str, Any]]:
    """Hold what was measured against what it should be: a row a goal."""
    longest = max(row["context"] for row in decode)
    naive = next(row for row in decode if (row["method"], row["context"]) == ("MLA naive", longest))
    of_copy = next(row["of copy"] for row in lines if row["method"] == "MLA absorbed")
    rows = [
        (f"one token at {longest}: naive / absorbed", naive["times absorbed"], ">=", ABSORBED_GOAL),
        (f"cache of {cache['tokens']}: MLA / MHA", cache["MLA / MHA"], "<=", CACHE_GOAL),
        *((f"prompt of {row['tokens']}: MLA / MHA", row["MLA / MHA"], "<=", PREFILL_GOAL) for row in prefill),
        ("cache bytes a second, absorbed / copy", of_copy, ">=", place.copy_goal),
    ]
    return [
        {
            "what": what,
            "value": value,
            "goal": f"{sense} {goal:.3g}",
            "reached": value is not None and (value >= goal if sense == ">=" else value <= goal),
        }
        for what, value, sense, goal in rows
    ]


class Layers:
    """A layer for each method, with random weights, and what it is given to do; both paths of MLA are one layer."""

    def __init__(self, shape: Shape, place: Place) -> None:
        self._place, self._d_model = place, shape.d_model
        mla = MLA(shape.d_model, shape.mla)
        layers: tuple[Attention | MLA, ...] = (
            Attention(shape.d_model, shape.mha),
            Attention(shape.d_model, shape.gqa),
            mla,
            mla,
        )
        self._layers: dict[str, Attention | MLA] = {
            method: layer.to(place.device, place.dtype) for method, layer in zip(METHODS, layers, strict=True)
        }

    def config(self, method: str) -> AnyAttention:
        """What the layer of `method` is."""
        return self._layers[method].config

    def decode(self, method: str, cache: GrowingCache) -> Callable[[], Tensor]:
        """Return a step of one new token a sequence after those in `cache`, which it leaves as long as it is."""
        return self._step(method, self._place.batch_size, 1, cache)

    def prefill(self, method: str, n_tokens: int) -> Callable[[], Tensor]:
        """Return a step that reads one sequence of n_tokens into an empty cache."""
        return self._step(method, 1, n_tokens, GrowingCache(reserve=n_tokens))

    def _step(self, method: str, batch_size: int, n_tokens: int, cache: GrowingCache) -> Callable[[], Tensor]:
        layer, place = self._layers[method], self._place
        x = _random(place, batch_size, n_tokens, self._d_model)
        tables = rope_tables(layer.config.rope_dim, cache.length + n_tokens)
        cos, sin = (table[cache.length :].to(place.device) for table in tables)

        def step() -> Tensor:
            if isinstance(layer, MLA):
                layer.use(method.removeprefix("MLA "))
            with torch.no_grad():
                return layer(x, cos, sin, cache=cache)

        return step


def filled_cache(config: AnyAttention, context: int, place: Place) -> GrowingCache:
    """Return a cache of context - 1 random tokens with room for one more, and none besides."""
    cache = GrowingCache(reserve=context)
    if isinstance(config, MLAConfig):
        heads, widths = 1, [config.cache_width]  # latent and rotated key lie in one tensor
    else:
        heads, widths = config.kv_heads, [config.head_dim] * 2
    with torch.no_grad():
        cache.extend(*(_random(place, place.batch_size, heads, context - 1, width) for width in widths))
    cache.advance(context - 1)
    return cache


def _slope(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Slope of least squares of `name` over the context."""
    return statistics.linear_regression([row["context"] for row in rows], [row[name] for row in rows]).slope


def _multiplications(shape: Shape, method: str) -> int:
    """Multiplications for each token in the context."""
    if not method.startswith("MLA"):
        config = shape.mha
        return config.n_heads * 2 * config.head_dim
    c = shape.mla
    if method == "MLA absorbed":
        return c.n_heads * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
    return c.n_heads * (c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim) + c.qk_dim + c.v_head_dim)


def _random(place: Place, *size: int) -> Tensor:
    generator = torch.Generator(place.device).manual_seed(0)
    return torch.randn(size, generator=generator, dtype=place.dtype, device=place.device)


def _check(contexts: Sequence[int], rounds: int) -> None:
    require_whole("rounds", rounds, 3)
    for context in contexts:
        require_whole("context", context, 2)
    rising = len(contexts) >= 2 and all(a < b for a, b in pairwise(contexts))
    require(rising, "contexts", list(contexts), "must be two or more, each longer than the one before")
