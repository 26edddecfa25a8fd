"""The experts one after the other: the equation as written, and the reference for every other backend."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe_lite.layers.dispatch import Dispatched
from dsmoe_lite.layers.ffn import clamp


def run_loop(dispatched: Dispatched, gate: Tensor, up: Tensor, down: Tensor, limit: float | None = None) -> Tensor:
    """Return y_sorted (N, D): g W_down,e (silu(W_gate,e x) * W_up,e x) of each row x of expert e, with its gate g."""
    counts = dispatched.counts
    rows = zip(dispatched.x_sorted.split(counts), dispatched.gates.split(counts), strict=True)
    weights = zip(gate.unbind(), up.unbind(), down.unbind(), strict=True)  # gate[e] would make E gradients of full size
    y_sorted = []
    for (x, g), (w_gate, w_up, w_down) in zip(rows, weights, strict=True):
        a, b = clamp(F.linear(x, w_gate), F.linear(x, w_up), limit)
        hidden = F.silu(a) * b  # (rows of e, F)
        y_sorted.append(g.unsqueeze(1) * F.linear(hidden, w_down))
    return torch.cat(y_sorted)
