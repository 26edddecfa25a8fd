"""The SwiGLU feed-forward network (Shazeer 2020, arXiv:2002.05202), dense; an expert is the same idea, narrower."""

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """FFN(x) = W_down (silu(W_gate x) * W_up x), without biases: 3 * D * F parameters.

    With a `limit`, W_gate x is clamped to at most the limit and W_up x to within it (DeepSeek-V4, arXiv:2606.19348).
    """

    def __init__(self, d_model: int, width: int, limit: float | None = None) -> None:
        super().__init__()
        self.limit = limit
        self.gate = nn.Linear(d_model, width, bias=False)
        self.up = nn.Linear(d_model, width, bias=False)
        self.down = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        a, b = clamp(self.gate(x), self.up(x), self.limit)
        return self.down(F.silu(a) * b)


def clamp(a: Tensor, b: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    """Clamp a = W_gate x to at most `limit`, and b = W_up x to [-limit, limit]."""
    return (a, b) if limit is None else (a.clamp(max=limit), b.clamp(-limit, limit))
