"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves layout: channel j turns with channel j + d/2."""

import torch
from torch import Tensor


def rope_tables(head_dim: int, length: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position * theta^(-2j / head_dim), each (length, head_dim / 2), float32."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (..., S, head_dim) by its position; cos and sin (S, head_dim / 2)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
