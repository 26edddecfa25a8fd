"""The routed experts by every backend, forward and with gradients: right first, then time and peak memory."""

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
from dsmoe_lite.bench.timing import turns
from dsmoe_lite.common.errors import RunError
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.layers.experts import Experts

BACKENDS = ("grouped", "cuda", "triton")
THEIRS = ("eager", "grouped_mm")  # of transformers
BASELINE = "grouped"
LIMIT = {torch.bfloat16: 2e-2, torch.float32: 1e-5}  # of the norm, against the loop in float64


@dataclass(frozen=True)
class Layer:
    """The size of the layer, and how many tokens it gets."""

    moe: MoEConfig
    d_model: int
    n_tokens: int

    def contender(self, backend: str, device: str, dtype: torch.dtype) -> Contender:
        """The routed experts by `backend`, or by one of transformers' ways, with weights from a fixed seed."""
        torch.manual_seed(0)
        ids = uniform_ids(self.n_tokens, self.moe.n_routed_experts, self.moe.top_k)
        own = BASELINE if backend in THEIRS else backend
        ours = routed_experts(self.moe, ids, own, self.d_model, device, dtype)
        if backend not in THEIRS:
            return ours
        assert isinstance(ours.module, Experts)
        return transformers_experts(ours.module, ids, backend)


def check_backends(layer: Layer, device: str, dtype: torch.dtype, notes: Notes) -> list[dict[str, Any]]:
    """Hold output and gradients of every backend against the loop in float64. RunError names the first wrong one."""

    def results(backend: str) -> list[Tensor]:
        return _results(layer.contender(backend, device, dtype))

    exact, found = _results(layer.contender("loop", device, torch.float64)), []
    for backend in (*BACKENDS, *THEIRS):
        by = _name(backend)
        mine = attempt(f"experts by {by}", partial(results, backend), notes)
        if mine is None:
            continue
        error = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(mine, exact, strict=True))
        if not error <= LIMIT[dtype]:
            raise RunError(f"experts by {by}: differ from the loop by {error:.1e} of the norm, nothing was timed")
        found.append({"what": "experts, forward and backward", "by": by, "error": error})
    return found


def time_backends(
    layer: Layer, device: str, dtype: torch.dtype, rounds: int, repeat: int, notes: Notes
) -> list[dict[str, Any]]:
    """Rows {what, by, milliseconds, times grouped, peak bytes, of grouped}; times grouped: above 1 is faster."""

    def measured(backend: str) -> tuple[Contender, int]:
        contender = layer.contender(backend, device, dtype)
        return contender, contender.peak_bytes()

    contenders, peaks, found = {}, {}, []
    for backend in (*BACKENDS, *THEIRS):
        made = attempt(f"experts by {_name(backend)}", partial(measured, backend), notes)
        if made is not None:
            contenders[backend], peaks[backend] = made
    if BASELINE not in contenders:
        notes.append(f"experts: left out, there is no '{BASELINE}' to hold them against")
        return []
    for what, step in (("forward", _forward), ("forward and backward", Contender.step)):
        steps: dict[str, Callable[[], Any]] = {name: partial(step, one) for name, one in contenders.items()}
        seconds = turns(steps, rounds, device, f"experts, {what}", repeat)
        for name, own in seconds.items():
            ratio = statistics.median(base / mine for base, mine in zip(seconds[BASELINE], own, strict=True))
            row = {
                "what": what,
                "by": _name(name),
                "milliseconds": 1000 * statistics.median(own),
                "times grouped": ratio,
            }
            with_peak = what != "forward"
            row["peak bytes"] = peaks[name] if with_peak else None
            row["of grouped"] = peaks[name] / peaks[BASELINE] if with_peak else None
            found.append(row)
    return found


def _name(backend: str) -> str:
    return f"transformers {backend}" if backend in THEIRS else backend


def _forward(contender: Contender) -> None:
    with torch.no_grad():
        contender.call(*contender.inputs)


def _results(contender: Contender) -> list[Tensor]:
    y = contender.call(*contender.inputs)
    *gates, down = contender.module.parameters()
    dx, d_gates, *d_weights, d_down = torch.autograd.grad(y, [*contender.inputs, *gates, down], contender.dy)
    if len(d_weights) == 1:  # transformers keeps gate and up in one tensor
        d_weights = list(d_weights[0].chunk(2, dim=1))
    return [y.detach(), dx, d_gates, *d_weights, d_down]
