"""One layer of experts, forward and backward: its time and memory beside the dense FFN of equal active width."""

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
    """A layer to measure and what it should reach, as ratios to the dense FFN of its active width."""

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
TRANSFORMERS_GOAL = 1 / 1.3  # of the time of each of their ways, so of the best one's


@dataclass(frozen=True)
class Pair:
    """Two contenders on the same ids, and the goals of the first as ratios to the second."""

    named: dict[str, Any]
    own: Contender
    other: Contender
    time_goal: float | None = None
    memory_goal: float | None = None


def bench_layer(rounds: int, n_tokens: int = N_TOKENS, d_model: int = D_MODEL) -> list[dict[str, Any]]:
    """Measure both sizes; a ratio above 1 is slower, or larger, than what it is held against.

    time: median of `rounds` alternated pairs, with its 95% interval of order statistics. memory: peak beyond the
    weights and their gradients (`memory.peak_bytes`). gap: ratio less goal, above 0 where the goal is missed.
    """
    pairs = [pair for size in SIZES for pair in _pairs(size, n_tokens, d_model)]
    return [_row(pair, rounds) for pair in progress(pairs, desc="pairs")]


def profile_layer(rounds: int, n_tokens: int = N_TOKENS, d_model: int = D_MODEL) -> list[dict[str, Any]]:
    """Say where the time goes: milliseconds a step in each torch operation, of the twelve largest, uniform routing.

    Then the sum over the matrix products, and over everything: what is between the two could at most be saved.
    """
    rows = []
    for size in SIZES:
        E, K = size.moe.n_routed_experts, size.moe.top_k
        ids = uniform_ids(n_tokens, E, K)
        ours = routed_experts(size.moe, ids, "auto", d_model)
        measured = {
            "dense": _operations(dense_ffn(size.moe, n_tokens, d_model), rounds),
            "layer": _operations(moe_layer(size.moe, ids, "auto", d_model), rounds),
            "experts": _operations(ours, rounds),
            "transformers": _operations(transformers_experts(_experts(ours), ids, "grouped_mm"), rounds),
        }
        operations = sorted({name for one in measured.values() for name in one})
        operations.sort(key=lambda name: -max(one.get(name, 0.0) for one in measured.values()))
        shown: dict[str, tuple[str, ...]] = {name: (name,) for name in operations[:12]}
        shown |= {"matrix products": PRODUCTS, "all": tuple(operations)}
        for title, names in shown.items():
            sums = {of: sum(one.get(name, 0.0) for name in names) for of, one in measured.items()}
            rows.append({"size": size.name, "operation": title, **sums})
    return rows


def _pairs(size: Size, T: int, D: int) -> Iterator[Pair]:
    moe, E, K = size.moe, size.moe.n_routed_experts, size.moe.top_k
    dense = dense_ffn(moe, T, D)
    for routing, ids in (("uniform", uniform_ids(T, E, K)), ("Zipf", zipf_ids(T, E, K))):
        memory_goal = size.memory_goal if routing == "uniform" else None
        whole, alone = _named(size, "layer", routing, ids), _named(size, "experts", routing, ids)
        yield Pair(whole | {"by": "auto"}, moe_layer(moe, ids, "auto", D), dense, size.time_goal, memory_goal)
        yield Pair(whole | {"by": "loop"}, moe_layer(moe, ids, "loop", D), dense)
        ours = routed_experts(moe, ids, "auto", D)
        for way in ("eager", "grouped_mm"):
            theirs = transformers_experts(_experts(ours), ids, way)
            yield Pair(alone | {"by": "auto", "against": f"transformers {way}"}, ours, theirs, TRANSFORMERS_GOAL)
    for routing, ids in (("uniform", uniform_ids(T, E, K)), *((f"busy {v}", skewed_ids(T, E, K, v)) for v in (1, 3))):
        named = _named(size, "layer", routing, ids) | {"by": "padded"}
        yield Pair(named, moe_layer(moe, ids, "padded", D), dense, size.time_goal, size.memory_goal)


def _named(size: Size, what: str, routing: str, ids: Tensor) -> dict[str, Any]:
    violation = round(max_violation(ids, size.moe.n_routed_experts), 2)
    return {"size": size.name, "what": what, "by": "", "routing": routing, "MaxVio": violation, "against": "dense"}


def _experts(contender: Contender) -> Experts:
    assert isinstance(contender.module, Experts)
    return contender.module


def _row(pair: Pair, rounds: int) -> dict[str, Any]:
    own, other, time_goal, memory_goal = pair.own, pair.other, pair.time_goal, pair.memory_goal
    time = time_ratio(own.step, other.step, rounds)
    memory = own.peak_bytes() / other.peak_bytes()
    return pair.named | {
        "time": time.median,
        "low": time.low,
        "high": time.high,
        "time goal": time_goal,
        "time gap": None if time_goal is None else time.median - time_goal,
        "memory": memory,
        "memory goal": memory_goal,
        "memory gap": None if memory_goal is None else memory - memory_goal,
    }


def _operations(contender: Contender, rounds: int) -> dict[str, float]:
    contender.step()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        for _ in range(rounds):
            contender.step()
    return {one.key: one.self_cpu_time_total / 1000 / rounds for one in trace.key_averages()}
