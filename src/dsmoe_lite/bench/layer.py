"""One MoE layer, forward and backward: its time and memory relative to a dense FFN of equal active width."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dsmoe_lite.bench.contenders import Contender, dense_ffn, moe_layer, routed_experts, transformers_experts
from dsmoe_lite.bench.fixed_routing import max_violation, skewed_ids, uniform_ids, zipf_ids
from dsmoe_lite.bench.ratios import time_ratio
from dsmoe_lite.common.progress import progress
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.layers.experts import Experts


@dataclass(frozen=True)
class Size:
    """A layer to measure, and goals for its time and memory as ratios to a dense FFN of its active width."""

    name: str
    moe: MoEConfig
    time_goal: float
    memory_goal: float


SIZES = (
    Size("2/16", MoEConfig(n_routed_experts=16, top_k=2, expert_width=512), 1.25, 1.4),
    Size("6+2/64", MoEConfig(n_routed_experts=64, top_k=6, expert_width=128, n_shared_experts=2), 1.6, 2.0),
)
N_TOKENS, D_MODEL = 2048, 256
PRODUCTS = ("aten::mm", "aten::bmm", "aten::_grouped_mm")
TRANSFORMERS_GOAL = 1 / 1.3  # of the time of each implementation in transformers


@dataclass(frozen=True)
class Pair:
    """A contender and its baseline on the same ids, and the goals for their ratios."""

    columns: dict[str, Any]
    contender: Contender
    baseline: Contender
    time_goal: float | None = None
    memory_goal: float | None = None


def bench_layer(rounds: int, n_tokens: int = N_TOKENS, d_model: int = D_MODEL) -> list[dict[str, Any]]:
    """Measure both sizes: a row per pair. A ratio above 1 is slower, or larger, than the baseline.

    time: median of `rounds` interleaved pairs, with its 95% interval by order statistics. memory: peak without weights
    and their gradients (`memory.peak_bytes`). gap: ratio minus goal, above 0 if the goal is missed.
    """
    pairs = [pair for size in SIZES for pair in _pairs(size, n_tokens, d_model)]
    return [_row(pair, rounds) for pair in progress(pairs, desc="pairs")]


def profile_layer(rounds: int, n_tokens: int = N_TOKENS, d_model: int = D_MODEL) -> list[dict[str, Any]]:
    """Profile a step with uniform routing: milliseconds in each of the twelve slowest torch operations.

    Two more rows have the sum over matrix products and the sum over all operations. Their difference is the most that
    better code around the products could save.
    """
    rows = []
    for size in SIZES:
        E, K = size.moe.n_routed_experts, size.moe.top_k
        ids = uniform_ids(n_tokens, E, K)
        ours = routed_experts(size.moe, ids, "auto", d_model)
        profiles = {
            "dense": _operations(dense_ffn(size.moe, n_tokens, d_model), rounds),
            "layer": _operations(moe_layer(size.moe, ids, "auto", d_model), rounds),
            "experts": _operations(ours, rounds),
            "transformers": _operations(transformers_experts(_experts(ours), ids, "grouped_mm"), rounds),
        }
        operations = sorted({operation for times in profiles.values() for operation in times})
        operations.sort(key=lambda operation: -max(times.get(operation, 0.0) for times in profiles.values()))
        groups: dict[str, tuple[str, ...]] = {operation: (operation,) for operation in operations[:12]}
        groups |= {"matrix products": PRODUCTS, "all": tuple(operations)}
        for title, group in groups.items():
            sums = {of: sum(times.get(operation, 0.0) for operation in group) for of, times in profiles.items()}
            rows.append({"size": size.name, "operation": title, **sums})
    return rows


def _pairs(size: Size, T: int, D: int) -> Iterator[Pair]:
    moe, E, K = size.moe, size.moe.n_routed_experts, size.moe.top_k
    dense = dense_ffn(moe, T, D)
    for routing, ids in (("uniform", uniform_ids(T, E, K)), ("Zipf", zipf_ids(T, E, K))):
        memory_goal = size.memory_goal if routing == "uniform" else None
        layer, experts = _columns(size, "layer", routing, ids), _columns(size, "experts", routing, ids)
        yield Pair(layer | {"by": "auto"}, moe_layer(moe, ids, "auto", D), dense, size.time_goal, memory_goal)
        yield Pair(layer | {"by": "loop"}, moe_layer(moe, ids, "loop", D), dense)
        ours = routed_experts(moe, ids, "auto", D)
        for implementation in ("eager", "grouped_mm"):
            theirs = transformers_experts(_experts(ours), ids, implementation)
            columns = experts | {"by": "auto", "against": f"transformers {implementation}"}
            yield Pair(columns, ours, theirs, TRANSFORMERS_GOAL)
    for routing, ids in (("uniform", uniform_ids(T, E, K)), *((f"busy {v}", skewed_ids(T, E, K, v)) for v in (1, 3))):
        columns = _columns(size, "layer", routing, ids) | {"by": "padded"}
        yield Pair(columns, moe_layer(moe, ids, "padded", D), dense, size.time_goal, size.memory_goal)


def _columns(size: Size, what: str, routing: str, ids: Tensor) -> dict[str, Any]:
    violation = round(max_violation(ids, size.moe.n_routed_experts), 2)
    return {"size": size.name, "what": what, "by": "", "routing": routing, "MaxVio": violation, "against": "dense"}


def _experts(contender: Contender) -> Experts:
    assert isinstance(contender.module, Experts)
    return contender.module


def _row(pair: Pair, rounds: int) -> dict[str, Any]:
    time = time_ratio(pair.contender.step, pair.baseline.step, rounds)
    memory = pair.contender.peak_bytes() / pair.baseline.peak_bytes()
    return pair.columns | {
        "time": time.median,
        "low": time.low,
        "high": time.high,
        "time goal": pair.time_goal,
        "time gap": None if pair.time_goal is None else time.median - pair.time_goal,
        "memory": memory,
        "memory goal": pair.memory_goal,
        "memory gap": None if pair.memory_goal is None else memory - pair.memory_goal,
    }


def _operations(contender: Contender, rounds: int) -> dict[str, float]:
    """Milliseconds per step of each torch operation."""
    contender.step()  # warm-up
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        for _ in range(rounds):
            contender.step()
    return {event.key: event.self_cpu_time_total / 1000 / rounds for event in trace.key_averages()}
