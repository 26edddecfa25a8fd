"""E SwiGLU networks with stacked weights, and the ways to run them on tokens sorted by expert."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

    def forward(self, x_sorted: Tensor, ends: Tensor) -> Tensor:
        """x_sorted (N, D) in expert order, ends (E,) cumulative counts -> (N, D)."""
        counts = ends.diff(prepend=ends.new_zeros(1))
        backend = choose_backend(counts) if self.backend == "auto" else self.backend
        run = run_padded if backend == "padded" else run_loop
        return run(x_sorted, counts, self.gate, self.up, self.down)


def run_loop(x_sorted: Tensor, counts: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Run one expert after the other: what the equation says, and the reference for every other way."""
    outputs = []
    for e, x in enumerate(x_sorted.split(counts.tolist())):  # x (tokens of e, D)
        hidden = F.silu(F.linear(x, gate[e])) * F.linear(x, up[e])
        outputs.append(F.linear(hidden, down[e]))
    return torch.cat(outputs)


def run_padded(x_sorted: Tensor, counts: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Give every expert as many rows as the busiest one has, zeros where it has fewer; multiply all in one batch."""
    E, C = counts.shape[0], int(counts.max())
    expert = torch.repeat_interleave(torch.arange(E, device=counts.device), counts)  # (N,)
    starts = counts.cumsum(0) - counts
    place = expert * C + torch.arange(len(expert), device=counts.device) - starts[expert]  # (N,) row in (E*C, D)
    x = x_sorted.new_zeros(E * C, x_sorted.shape[1]).index_copy(0, place, x_sorted).view(E, C, x_sorted.shape[1])
    hidden = F.silu(x @ gate.mT) * (x @ up.mT)  # (E, C, F)
    return (hidden @ down.mT).flatten(0, 1)[place]


def choose_backend(counts: Tensor) -> str:
    """Return "padded" unless padding would compute more than 4 rows for every real one."""
    rows, most = int(counts.sum()), int(counts.max())
    return "padded" if most * counts.shape[0] <= 4 * rows else "loop"
