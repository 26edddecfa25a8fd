"""Decode and prefill with one attention layer: MHA, GQA and both forms of MLA, and the machine's peak speeds.

The peaks are those of a roofline: the bandwidth of a copy and the FLOP/s of a matrix product.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoe_lite.bench.ratios import Step, goal_row, median_interval
from dsmoe_lite.bench.timing import as_cuda_graph, time_interleaved
from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import RunError, require, require_int
from dsmoe_lite.common.machine import resolve_device
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
PREFILLS = ((2048, 6), (8192, 3))  # (tokens, pairs)
ABSORBED_GOAL, CACHE_GOAL, PREFILL_GOAL = 5.0, 1 / 7, 1.3


@dataclass(frozen=True)
class Shape:
    """Three kinds of attention of one model width. MHA has the heads of MLA, as wide as their part without rotation."""

    d_model: int
    mha: AttentionConfig
    gqa: AttentionConfig
    mla: MLAConfig


V2_LITE = Shape(  # DeepSeek-V2-Lite, and the same attention as MHA and GQA
    2048,
    AttentionConfig(n_heads=16, head_dim=128),
    AttentionConfig(n_heads=16, head_dim=128, n_kv_heads=4),
    MLAConfig(n_heads=16, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=512),
)


@dataclass(frozen=True)
class Setup:
    """The device and the data type of a benchmark, and the sizes with which the machine's peaks are measured."""

    device: str
    dtype: torch.dtype
    batch_size: int
    copied_bytes: int
    matmul_width: int
    copy_goal: float  # for the bandwidth at which absorbed MLA reads its cache, as a share of a copy's
    steps: int = 1  # in one timing


SETUPS = {
    "cpu": Setup("cpu", torch.float32, 1, 2**28, 2048, copy_goal=0.5),
    "cuda": Setup("cuda", torch.bfloat16, 64, 2**30, 8192, copy_goal=0.7, steps=10),
}


def bench_mla(
    contexts: Sequence[int] = CONTEXTS,
    rounds: int = ROUNDS,
    device: str = "cpu",
    *,
    shape: Shape = V2_LITE,
    prefills: Sequence[tuple[int, int]] = PREFILLS,
) -> dict[str, Any]:
    """Measure everything; return a JSON-able record of rows by name, with goals, versions and commit.

    prefills: (prompt length, number of pairs). The machine's peaks are the mean of a measurement before the decoding
    steps and one after them. Raises InputError if contexts do not increase or the GPU is missing.
    """
    setup = SETUPS[resolve_device(device)]
    _check(contexts, rounds)
    try:
        before = peaks(rounds, setup)
        decode = decode_costs(contexts, rounds, shape=shape, setup=setup)
        after = peaks(rounds, setup)
        prefill = [row for n, pairs in prefills for row in prefill_ratios((n,), pairs, shape=shape, setup=setup)]
    except torch.OutOfMemoryError:
        raise RunError(f"contexts = {list(contexts)}: do not fit into this GPU's memory; use shorter ones") from None
    machine = {name: round((before[name] + after[name]) / 2, 3) for name in before}
    lines = slopes(decode, machine)
    cache = cache_ratio(max(contexts), shape=shape)
    return {
        "schema_version": SCHEMA_VERSION,
        "shape": to_dict(shape),
        "place": {"device": setup.device, "dtype": str(setup.dtype), "batch_size": setup.batch_size, "rounds": rounds},
        "peaks": machine,
        "decode": decode,
        "cache": cache,
        "prefill": prefill,
        "slopes": lines,
        "goals": goals(decode, cache, prefill, lines, setup),
        "provenance": provenance(),
    }


def record_path(device: str) -> Path:
    """The path of the record of a kind of device to read: the reader's own, else the shipped one."""
    return paths.find_data(record_name(device))


def record_name(device: str) -> str:
    """The name of that record, below data/."""
    return f"runs/bench-mla-{device}.json"


def decode_costs(
    contexts: Sequence[int] = CONTEXTS, rounds: int = ROUNDS, *, shape: Shape = V2_LITE, setup: Setup = SETUPS["cpu"]
) -> list[dict[str, Any]]:
    """Time one decoding step of a layer: a new token attends to `context` tokens, itself included. A row per method.

    milliseconds: median of `rounds` interleaved rounds, with its 95% interval by order statistics. `times absorbed`:
    the median over rounds of the time over that of absorbed MLA in the same round. `cache bytes`: allocated for exactly
    `context` tokens. `FLOPs`: those of a step that grow with the context, two per multiplication.
    """
    _check(contexts, rounds)
    caches: dict[tuple[str, int], GrowingCache] = {}
    steps: dict[tuple[str, int], Step] = {}
    layers = Layers(shape, setup)
    for context in contexts:
        for method in METHODS:
            cache = caches[method, context] = filled_cache(layers.config(method), context, setup)
            steps[method, context] = as_cuda_graph(layers.decode(method, cache), setup.device)
    seconds = time_interleaved(steps, rounds, setup.device, "decoding", setup.steps)
    rows = []
    for (method, context), times in seconds.items():
        median, low, high = (round(1000 * value, 4) for value in median_interval(times))
        absorbed = seconds["MLA absorbed", context]
        ratio = statistics.median(own / base for own, base in zip(times, absorbed, strict=True))
        rows.append(
            {
                "method": method,
                "context": context,
                "milliseconds": median,
                "low": low,
                "high": high,
                "times absorbed": round(ratio, 3),
                "cache bytes": caches[method, context].nbytes,
                "FLOPs": 2 * setup.batch_size * context * _multiplications(shape, method),
            }
        )
    return rows


def prefill_ratios(
    lengths: Sequence[int], rounds: int, *, shape: Shape = V2_LITE, setup: Setup = SETUPS["cpu"]
) -> list[dict[str, Any]]:
    """Time the prefill of one sequence into an empty cache: a row per length with naive MLA over MHA, by pairs."""
    require_int("rounds", rounds, 3)
    layers, rows = Layers(shape, setup), []
    for n_tokens in lengths:
        require_int("tokens", n_tokens, 1)
        steps = {
            method: as_cuda_graph(layers.prefill(method, n_tokens), setup.device) for method in ("MHA", "MLA naive")
        }
        seconds = time_interleaved(steps, rounds, setup.device, f"prefill of {n_tokens} tokens", setup.steps)
        mha, mla = seconds["MHA"], seconds["MLA naive"]
        ratio, low, high = median_interval([own / base for own, base in zip(mla, mha, strict=True)])
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


def cache_ratio(n_tokens: int = 8192, *, shape: Shape = V2_LITE, setup: Setup = SETUPS["cpu"]) -> dict[str, Any]:
    """Return the bytes that caches of n_tokens allocate with MHA and with MLA, and their ratio."""
    mha, mla = (filled_cache(config, n_tokens, setup).nbytes for config in (shape.mha, shape.mla))
    return {"tokens": n_tokens, "MHA bytes": mha, "MLA bytes": mla, "MLA / MHA": mla / mha}


def peaks(rounds: int = ROUNDS, setup: Setup = SETUPS["cpu"]) -> dict[str, float]:
    """Measure the machine's peaks: `copy GB/s`, bytes read plus bytes written by `copy_`, and `matmul GFLOP/s`."""
    require_int("rounds", rounds, 3)
    source = torch.ones(setup.copied_bytes, dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    n = setup.matmul_width
    a, b = (_random(setup, n, n) for _ in range(2))
    product = torch.empty_like(a)
    steps: dict[str, Step] = {
        "copy": lambda: target.copy_(source),
        "matmul": lambda: torch.mm(a, b, out=product),
    }
    seconds = time_interleaved(steps, rounds, setup.device, "peaks", setup.steps)
    copy, matmul = (statistics.median(seconds[name]) for name in steps)
    return {
        "copy GB/s": round(2 * setup.copied_bytes / copy / 1e9, 3),
        "matmul GFLOP/s": round(2 * n**3 / matmul / 1e9, 3),
    }


def slopes(rows: Sequence[dict[str, Any]], machine: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """Fit a line through each method's milliseconds by context, and derive speeds from its slope: a row per method.

    A slope excludes costs that do not grow with the context, such as reading the weights. GB/s: cache bytes over time;
    GFLOP/s: the rows' FLOPs over time. machine: the result of `peaks`; if given, rows also have the shares of these
    peaks. Values are None if noise hides the growth of time.
    """
    results = []
    for method in dict.fromkeys(row["method"] for row in rows):
        method_rows = [row for row in rows if row["method"] == method]
        milliseconds, in_bytes, flops = (_slope(method_rows, name) for name in ("milliseconds", "cache bytes", "FLOPs"))
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
        results.append(row)
    return results


def goals(
    decode: Sequence[dict[str, Any]],
    cache: dict[str, Any],
    prefill: Sequence[dict[str, Any]],
    lines: Sequence[dict[str, Any]],
    setup: Setup,
) -> list[dict[str, Any]]:
    """Compare measurements with our goals: a row per goal."""
    longest = max(row["context"] for row in decode)
    naive = next(row for row in decode if (row["method"], row["context"]) == ("MLA naive", longest))
    of_copy = next(row["of copy"] for row in lines if row["method"] == "MLA absorbed")
    return [
        goal_row(f"one token at {longest}: naive / absorbed", naive["times absorbed"], ">=", ABSORBED_GOAL),
        goal_row(f"cache of {cache['tokens']}: MLA / MHA", cache["MLA / MHA"], "<=", CACHE_GOAL),
        *(goal_row(f"prompt of {row['tokens']}: MLA / MHA", row["MLA / MHA"], "<=", PREFILL_GOAL) for row in prefill),
        goal_row("cache bytes a second, absorbed / copy", of_copy, ">=", setup.copy_goal),
    ]


class Layers:
    """A layer with random weights for each method, and its steps to time. Both forms of MLA share one layer."""

    def __init__(self, shape: Shape, setup: Setup) -> None:
        self._setup, self._d_model = setup, shape.d_model
        mla = MLA(shape.d_model, shape.mla)
        layers: tuple[Attention | MLA, ...] = (
            Attention(shape.d_model, shape.mha),
            Attention(shape.d_model, shape.gqa),
            mla,
            mla,
        )
        self._layers: dict[str, Attention | MLA] = {
            method: layer.to(setup.device, setup.dtype) for method, layer in zip(METHODS, layers, strict=True)
        }

    def config(self, method: str) -> AnyAttention:
        """The attention config of a method."""
        return self._layers[method].config

    def decode(self, method: str, cache: GrowingCache) -> Callable[[], Tensor]:
        """Return a step of one new token per sequence after those in `cache`, whose length it does not change."""
        return self._step(method, self._setup.batch_size, 1, cache)

    def prefill(self, method: str, n_tokens: int) -> Callable[[], Tensor]:
        """Return a step that prefills an empty cache with one sequence of n_tokens."""
        return self._step(method, 1, n_tokens, GrowingCache(reserve=n_tokens))

    def _step(self, method: str, batch_size: int, n_tokens: int, cache: GrowingCache) -> Callable[[], Tensor]:
        layer, setup = self._layers[method], self._setup
        x = _random(setup, batch_size, n_tokens, self._d_model)
        tables = rope_tables(layer.config.rope_dim, cache.length + n_tokens)
        cos, sin = (table[cache.length :].to(setup.device) for table in tables)

        def step() -> Tensor:
            if isinstance(layer, MLA):
                layer.use(method.removeprefix("MLA "))
            with torch.no_grad():
                return layer(x, cos, sin, cache=cache)

        return step


def filled_cache(config: AnyAttention, context: int, setup: Setup) -> GrowingCache:
    """Return a cache of context - 1 random tokens with room for exactly one more."""
    cache = GrowingCache(reserve=context)
    if isinstance(config, MLAConfig):
        heads, widths = 1, [config.cache_width]  # latent and rotated key are in one tensor
    else:
        heads, widths = config.kv_heads, [config.head_dim] * 2
    with torch.no_grad():
        cache.extend(*(_random(setup, setup.batch_size, heads, context - 1, width) for width in widths))
    cache.advance(context - 1)
    return cache


def _slope(rows: Sequence[dict[str, Any]], name: str) -> float:
    """The least-squares slope of `name` over the context."""
    return statistics.linear_regression([row["context"] for row in rows], [row[name] for row in rows]).slope


def _multiplications(shape: Shape, method: str) -> int:
    """Multiplications per token of the context."""
    if not method.startswith("MLA"):
        config = shape.mha
        return config.n_heads * 2 * config.head_dim
    c = shape.mla
    if method == "MLA absorbed":
        return c.n_heads * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
    return c.n_heads * (c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim) + c.qk_dim + c.v_head_dim)


def _random(setup: Setup, *size: int) -> Tensor:
    generator = torch.Generator(setup.device).manual_seed(0)
    return torch.randn(size, generator=generator, dtype=setup.dtype, device=setup.device)


def _check(contexts: Sequence[int], rounds: int) -> None:
    require_int("rounds", rounds, 3)
    for context in contexts:
        require_int("context", context, 2)
    increasing = len(contexts) >= 2 and all(a < b for a, b in pairwise(contexts))
    require(increasing, "contexts", list(contexts), "must be two or more, each longer than the one before")
