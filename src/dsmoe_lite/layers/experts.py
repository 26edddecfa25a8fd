"""E SwiGLU networks with stacked weights; the way they are run is chosen by name."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from dsmoe_lite.layers.batched import can_group, run_grouped, run_padded
from dsmoe_lite.layers.dispatch import Dispatched
from dsmoe_lite.layers.fused import run_cuda, run_triton
from dsmoe_lite.layers.loop import run_loop
from dsmoe_lite.layers.selftest import ready


class Experts(nn.Module):
    """E experts FFN_e(x) = W_down,e (silu(W_gate,e x) * W_up,e x); weights stand stacked, (E, out, in)."""

    def __init__(self, n_experts: int, d_model: int, width: int, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend
        self.gate = nn.Parameter(torch.empty(n_experts, width, d_model))
        self.up = nn.Parameter(torch.empty(n_experts, width, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, width))
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    def forward(self, sent: Dispatched) -> Tensor:
        """Return y (T, D), y_t = sum of gate * FFN_e(x_t) over the rows of token t; a token without rows gets zero."""
        sent = as_multiplied(sent)
        weights = [weight.to(sent.x.dtype) for weight in (self.gate, self.up, self.down)]
        return run_experts(self.backend, sent, *weights)


IMPLEMENTATIONS = {
    "loop": run_loop,
    "padded": run_padded,
    "grouped": run_grouped,
    "triton": run_triton,
    "cuda": run_cuda,
}


def run_experts(backend: str, sent: Dispatched, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The experts' sums (T, D) by the way named `backend`; "auto" chooses one."""
    name = choose_backend(sent, gate) if backend == "auto" else backend
    return IMPLEMENTATIONS[name](sent, gate, up, down)


def choose_backend(sent: Dispatched, gate: Tensor) -> str:
    """Return the way for these tensors: on a GPU one by hand-written kernels, where one is ready; else torch's.

    "grouped" where torch has a grouped product for them, else "padded". Measured on CPUs in fp32, forward and backward,
    T 512 to 4096, D 64 to 512, one and two threads, time of grouped over padded: on an AMD EPYC 0.8 to 1.1 uniform, 0.6
    to 1.0 Zipf. An Intel Xeon, one thread, had padded up to 1.2 times ahead above N * F = 1.5 * 2^20 hidden numbers;
    the rule takes what loses nowhere by much and wastes no rows.
    """
    if sent.x.is_cuda:
        for name in by_kernels(sent.x.dtype, *gate.shape[1:]):
            if ready(name, sent.x.device):
                return name
    return "grouped" if can_group(sent.x, gate) else "padded"


def by_kernels(dtype: torch.dtype, *widths: int) -> list[str]:
    """The hand-written kernels made for this dtype and these widths, best first: those that feed tensor cores."""
    whole = all(width % 8 == 0 for width in widths)  # a copy moves 16 bytes
    return ["cuda"] * (dtype == torch.bfloat16 and whole) + ["triton"] * (dtype in (torch.bfloat16, torch.float16))


def as_multiplied(sent: Dispatched) -> Dispatched:
    """The same in the dtype torch.autocast multiplies in: it does not cast what a hand-written backward multiplies."""
    dtype, device = sent.x.dtype, sent.x.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return replace(sent, x=sent.x.to(dtype), gates=sent.gates.to(dtype))
