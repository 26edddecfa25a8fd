"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), and YaRN as DeepSeek-V2 and V3 use it.

The package turns halves: channel j with channel j + d/2, as transformers does. The paper and DeepSeek's own code turn
neighbours, 2j with 2j + 1. One is the other with its channels in another order (`pairs_to_halves`).
"""

import math

import torch
from torch import Tensor

from dsmoe_lite.common.errors import require
from dsmoe_lite.config import YarnConfig


def rope_frequencies(rope_dim: int, theta: float = 10_000.0, yarn: YarnConfig | None = None) -> Tensor:
    """Return theta^(-2j / rope_dim), radians a token, (rope_dim / 2,) float64; with `yarn` its mixture.

    theta'_j = gamma_j theta_j + (1 - gamma_j) theta_j / s, where gamma falls from 1 to 0 between the pairs that
    `yarn_range` gives (arXiv:2309.00071, Section 3.2; arXiv:2405.04434, Section 3.1.4).
    """
    frequencies = theta ** (-torch.arange(0, rope_dim, 2, dtype=torch.float64) / rope_dim)
    if yarn is None:
        return frequencies
    low, high = yarn_range(rope_dim, theta, yarn)
    pairs = torch.arange(rope_dim // 2, dtype=torch.float64)
    kept = 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)  # gamma
    return kept * frequencies + (1 - kept) * frequencies / yarn.factor


def yarn_range(rope_dim: int, theta: float, yarn: YarnConfig) -> tuple[int, int]:
    """Return the last pair that keeps its frequency and the first that is divided by the whole factor.

    d(r) = rope_dim ln(L / (2 pi r)) / (2 ln theta) is the pair that turns r times over L = original_max_len tokens;
    floor(d(beta_fast)) and ceil(d(beta_slow)), both inside 0..rope_dim - 1.
    """

    def pair(turns: float) -> float:
        return rope_dim * math.log(yarn.original_max_len / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = math.floor(pair(yarn.beta_fast)), math.ceil(pair(yarn.beta_slow))
    return max(low, 0), min(max(high, 0), rope_dim - 1)


def softmax_scale(qk_dim: int, yarn: YarnConfig | None = None) -> float:
    """Return what scores are multiplied by: 1 / sqrt(qk_dim), with `yarn` times (0.1 mscale ln s + 1)^2."""
    scale = 1 / math.sqrt(qk_dim)
    if yarn is None:
        return scale
    return scale * (0.1 * yarn.mscale * math.log(yarn.factor) + 1) ** 2


def rope_tables(
    rope_dim: int, length: int, theta: float = 10_000.0, yarn: YarnConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position times frequency, each (length, rope_dim / 2), float32."""
    positions = torch.arange(length, dtype=torch.float64)
    angles = torch.outer(positions, rope_frequencies(rope_dim, theta, yarn))
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves of x (..., S, d) by its position; cos and sin (..., S, d / 2)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def apply_rope_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbours of x (..., S, d) by its position: channel 2j with 2j + 1; cos and sin (..., S, d / 2)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def pairs_to_halves(x: Tensor, dim: int = -1) -> Tensor:
    """Reorder channels along `dim` from neighbours to halves: even ones first, then odd ones.

    Exact, no number changes: apply_rope(pairs_to_halves(x)) = pairs_to_halves(apply_rope_pairs(x)). Along the outputs
    of the projections that make a head's rotated part (queries and keys alike) it converts a model's weights.
    """
    require(x.shape[dim] % 2 == 0, "channels", x.shape[dim], "must be even: RoPE rotates pairs of channels")
    order = torch.arange(x.shape[dim], device=x.device).view(-1, 2).T.flatten()
    return x.index_select(dim, order)
