"""The experts one after the other: what the equation says, and the reference for every other way."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe_lite.layers.dispatch import Dispatched, combine


def run_loop(sent: Dispatched, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """y (T, D), y_t = sum over the rows of token t of g W_down,e (silu(W_gate,e x_t) * W_up,e x_t)."""
    rows = zip(sent.x_sorted.split(sent.counts), sent.gates.split(sent.counts), strict=True)
    weights = zip(gate.unbind(), up.unbind(), down.unbind(), strict=True)  # gate[e] would make E gradients of full size
    outputs = []
    for (x, g), (w_gate, w_up, w_down) in zip(rows, weights, strict=True):
        hidden = F.silu(F.linear(x, w_gate)) * F.linear(x, w_up)  # (rows of e, F)
        outputs.append(g.unsqueeze(1) * F.linear(hidden, w_down))
    return combine(torch.cat(outputs), sent)
