"""The routed experts by every backend, forward and with gradients: right first, then time and peak memory."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsmoe_lite.bench.contenders import Contender, routed_experts, transformers_experts
from dsmoe_lite.bench.products import Notes
from dsmoe_lite.bench.recorded import uniform_ids
from dsmoe_lite.bench.turns import turns
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.errors import InputError, RunError
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
    exact, found = _results(layer.contender("loop", device, torch.float64)), []
    for backend in BACKENDS:
        try:
            mine = _results(layer.contender(backend, device, dtype))
        except (InputError, RunError, RuntimeError) as refusal:
            notes.append(f"experts by {backend}: {str(refusal).splitlines()[0]}")
            continue
        error = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(mine, exact, strict=True))
        if not error <= LIMIT[dtype]:
            raise RunError(f"experts by {backend}: differ from the loop by {error:.1e} of the norm, nothing was timed")
        found.append({"what": "experts, forward and backward", "by": backend, "error": error})
    return found


def time_backends(
    layer: Layer, device: str, dtype: torch.dtype, rounds: int, repeat: int, notes: Notes
) -> list[dict[str, Any]]:
    """Rows {what, by, milliseconds, times grouped, peak bytes, of grouped}; times grouped: above 1 is faster."""
    contenders = {}
    for backend in (*BACKENDS, *THEIRS):
        try:
            contenders[backend] = layer.contender(backend, device, dtype)
            contenders[backend].step()
        except (InputError, RunError, RuntimeError) as error:
            contenders.pop(backend, None)
            notes.append(f"experts by {backend}: {str(error).splitlines()[0]}")
    peaks = {name: one.peak_bytes() for name, one in contenders.items()}
    found = []
    for what, step in (("forward", _forward), ("forward and backward", Contender.step)):
        steps: dict[str, Callable[[], Any]] = {name: partial(step, one) for name, one in contenders.items()}
        seconds = turns(steps, rounds, device, f"experts, {what}", repeat)
        for name, own in seconds.items():
            ratio = statistics.median(base / mine for base, mine in zip(seconds[BASELINE], own, strict=True))
            by = f"transformers {name}" if name in THEIRS else name
            row = {"what": what, "by": by, "milliseconds": 1000 * statistics.median(own), "times grouped": ratio}
            with_peak = what != "forward"
            row["peak bytes"] = peaks[name] if with_peak else None
            row["of grouped"] = peaks[name] / peaks[BASELINE] if with_peak else None
            found.append(row)
    return found


def _forward(contender: Contender) -> None:
    with torch.no_grad():
        contender.call(*contender.inputs)


def _results(contender: Contender) -> list[Tensor]:
    y = contender.call(*contender.inputs)
    wanted = [*contender.inputs, *contender.module.parameters()]
    return [y.detach(), *torch.autograd.grad(y, wanted, contender.dy)]
