"""E SwiGLU networks with stacked weights; the backend that runs them is chosen by name."""

import torch
from torch import Tensor, nn

from dsmoe_lite.layers.batched import can_group, run_grouped, run_padded
from dsmoe_lite.layers.dispatch import Dispatched, Implementation, combine, dispatch
from dsmoe_lite.layers.fused import KERNELS
from dsmoe_lite.layers.loop import run_loop
from dsmoe_lite.layers.router import Routing
from dsmoe_lite.layers.selftest import passes_selftest

IMPLEMENTATIONS = {
    "loop": Implementation(run_loop, combine),
    "padded": Implementation(run_padded, combine),
    "grouped": Implementation(run_grouped, combine),
    **KERNELS,
}


class Experts(nn.Module):
    """E experts FFN_e(x) = W_down,e (silu(W_gate,e x) * W_up,e x). Each weight is one tensor (E, out, in).

    `dispatch`, `forward` and `combine` are the last three steps of an MoE layer; `backend` runs the last two. limit: of
    `SwiGLU`; the hand-written kernels have none.
    """

    implementation: Implementation | None = None  # replaces the backend while it is set

    def __init__(
        self, n_experts: int, d_model: int, width: int, backend: str = "auto", limit: float | None = None
    ) -> None:
        super().__init__()
        self.backend, self.limit = backend, limit
        self.gate = nn.Parameter(torch.empty(n_experts, width, d_model))
        self.up = nn.Parameter(torch.empty(n_experts, width, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, width))
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        """Sort the tokens x (T, D) by expert, N rows."""
        return dispatch(x.to(_autocast_dtype(x)), routing)

    def forward(self, dispatched: Dispatched) -> Tensor:
        """Return y_sorted (N, D): gate * FFN_e(x) of every row, in expert order."""
        weights = [weight.to(dispatched.x.dtype) for weight in self.local_weights()]
        limit = () if self.limit is None else (self.limit,)
        return self._implementation(dispatched.x).run(dispatched, *weights, *limit)

    def combine(self, y_sorted: Tensor, dispatched: Dispatched) -> Tensor:
        """Add up the rows y_sorted (N, D) of each token: y (T, D). A token without rows gets zero."""
        return self._implementation(y_sorted).combine(y_sorted, dispatched)

    def local_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """gate, up and down of the experts that this process computes."""
        return self.gate, self.up, self.down

    def _implementation(self, x: Tensor) -> Implementation:
        if self.implementation is not None:
            return self.implementation
        name = choose_backend(x, self.gate, self.limit) if self.backend == "auto" else self.backend
        return IMPLEMENTATIONS[name]


def choose_backend(x: Tensor, gate: Tensor, limit: float | None = None) -> str:
    """Choose a backend for tokens like x and weights `gate` (E, F, D), with or without a limit of SwiGLU.

    On a GPU the first of `kernels_for` that passes its self-test. Else "grouped" if torch has a grouped product for
    these tensors, else "padded". Inside torch.compile always "padded": it
    cannot trace a self-test, or the grouped product of every dtype.

    Measured on CPUs in fp32, forward and backward, T 512 to 4096, D 64 to 512, one and two threads, time of grouped
    over padded: on an AMD EPYC 0.8 to 1.1 with uniform routing, 0.6 to 1.0 with Zipf. On one thread of an Intel Xeon
    padded was up to 1.2 times faster above N * F = 1.5 * 2^20 hidden numbers. The rule takes the backend that never
    loses by much and computes no padding.
    """
    if torch.compiler.is_compiling():
        return "padded"
    if x.is_cuda and limit is None:
        for name in kernels_for(x.dtype, *gate.shape[1:]):
            if passes_selftest(name, x.device):
                return name
    return "grouped" if can_group(x, gate) else "padded"


def kernels_for(dtype: torch.dtype, *widths: int) -> list[str]:
    """The hand-written kernels that use tensor cores for this dtype and these widths, best first."""
    names = []
    if dtype == torch.bfloat16 and all(width % 8 == 0 for width in widths):  # a copy moves 16 bytes
        names.append("cuda")
    if dtype in (torch.bfloat16, torch.float16):
        names.append("triton")
    return names


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which torch.autocast would multiply x: it does not cast for a hand-written backward pass."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
