"""The SwiGLU feed-forward network (Shazeer 2020, arXiv:2002.05202), dense; an expert is the same idea, narrower."""

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """FFN(x) = W_down (silu(W_gate x) * W_up x), without biases: 3 * D * F parameters."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, width, bias=False)
        self.up = nn.Linear(d_model, width, bias=False)
        self.down = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))
