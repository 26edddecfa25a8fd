"""The routed experts with every backend, forward and backward: correctness first, then time and peak memory."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsmoe_lite.bench.attempt import Notes, attempt
from dsmoe_lite.bench.contenders import Contender, routed_experts, transformers_experts
from dsmoe_lite.bench.fixed_routing import uniform_ids
from dsmoe_lite.bench.timing import time_interleaved
from dsmoe_lite.common.errors import RunError
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.layers.experts import Experts

BACKENDS = ("grouped", "cuda", "triton")
TRANSFORMERS = ("eager", "grouped_mm")  # experts implementations of transformers
BASELINE = "grouped"
LIMITS = {torch.bfloat16: 2e-2, torch.float32: 1e-5}  # error relative to the norm, against the loop in float64


@dataclass(frozen=True)
class Layer:
    """The size of a layer, and the number of its tokens."""

    moe: MoEConfig
    d_model: int
    n_tokens: int

    def contender(self, backend: str, device: str, dtype: torch.dtype) -> Contender:
        """Return the routed experts with `backend`, ours or of transformers, and weights from a fixed seed."""
        torch.manual_seed(0)
        ids = uniform_ids(self.n_tokens, self.moe.n_routed_experts, self.moe.top_k)
        our_backend = BASELINE if backend in TRANSFORMERS else backend
        ours = routed_experts(self.moe, ids, our_backend, self.d_model, device, dtype)
        if backend not in TRANSFORMERS:
            return ours
        assert isinstance(ours.module, Experts)
        return transformers_experts(ours.module, ids, backend)


def check_backends(layer: Layer, device: str, dtype: torch.dtype, notes: Notes) -> list[dict[str, Any]]:
    """Compare output and gradients of every backend with the loop in float64. Raises RunError naming a wrong one."""

    def results(backend: str) -> list[Tensor]:
        return _results(layer.contender(backend, device, dtype))

    exact, rows = _results(layer.contender("loop", device, torch.float64)), []
    for backend in (*BACKENDS, *TRANSFORMERS):
        name = _name(backend)
        computed = attempt(f"experts by {name}", partial(results, backend), notes)
        if computed is None:
            continue
        error = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(computed, exact, strict=True))
        if not error <= LIMITS[dtype]:
            raise RunError(f"experts by {name}: differ from the loop by {error:.1e} of the norm; nothing was timed")
        rows.append({"what": "experts, forward and backward", "by": name, "error": error})
    return rows


def time_backends(
    layer: Layer, device: str, dtype: torch.dtype, rounds: int, repeat: int, notes: Notes
) -> list[dict[str, Any]]:
    """Rows {what, by, milliseconds, times grouped, peak bytes, of grouped}; times grouped: above 1 is faster."""

    def with_peak(backend: str) -> tuple[Contender, int]:
        contender = layer.contender(backend, device, dtype)
        return contender, contender.peak_bytes()

    contenders, peaks, rows = {}, {}, []
    for backend in (*BACKENDS, *TRANSFORMERS):
        prepared = attempt(f"experts by {_name(backend)}", partial(with_peak, backend), notes)
        if prepared is not None:
            contenders[backend], peaks[backend] = prepared
    if BASELINE not in contenders:
        notes.append(f"experts: left out, because the baseline '{BASELINE}' failed")
        return []
    for what, step in (("forward", _forward), ("forward and backward", Contender.step)):
        steps: dict[str, Callable[[], Any]] = {name: partial(step, one) for name, one in contenders.items()}
        seconds = time_interleaved(steps, rounds, device, f"experts, {what}", repeat)
        for name, times in seconds.items():
            ratio = statistics.median(base / own for base, own in zip(seconds[BASELINE], times, strict=True))
            row = {
                "what": what,
                "by": _name(name),
                "milliseconds": 1000 * statistics.median(times),
                "times grouped": ratio,
            }
            backward = what != "forward"
            row["peak bytes"] = peaks[name] if backward else None
            row["of grouped"] = peaks[name] / peaks[BASELINE] if backward else None
            rows.append(row)
    return rows


def _name(backend: str) -> str:
    return f"transformers {backend}" if backend in TRANSFORMERS else backend


def _forward(contender: Contender) -> None:
    with torch.no_grad():
        contender.call(*contender.inputs)


def _results(contender: Contender) -> list[Tensor]:
    """The output and all gradients."""
    y = contender.call(*contender.inputs)
    *gates, down = contender.module.parameters()
    dx, d_gates, *d_weights, d_down = torch.autograd.grad(y, [*contender.inputs, *gates, down], contender.dy)
    if len(d_weights) == 1:  # transformers has gate and up in one tensor
        d_weights = list(d_weights[0].chunk(2, dim=1))
    return [y.detach(), dx, d_gates, *d_weights, d_down]
