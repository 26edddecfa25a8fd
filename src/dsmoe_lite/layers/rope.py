"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), and YaRN as DeepSeek-V2 and V3 use it.

This package rotates halves: channel j with channel j + d/2, as transformers does. The paper and DeepSeek's code rotate
neighbours: 2j with 2j + 1. The two layouts differ only in the order of the channels (`pairs_to_halves`).
"""

import math
from typing import Any

import torch
from torch import Tensor

from dsmoe_lite.common.errors import require
from dsmoe_lite.config import YarnConfig


def rope_frequencies(rope_dim: int, theta: float = 10_000.0, yarn: YarnConfig | None = None) -> Tensor:
    """Return theta_j = theta^(-2j / rope_dim) in radians per token: (rope_dim / 2,) float64.

    With `yarn`: ramp_j theta_j + (1 - ramp_j) theta_j / factor. The ramp falls from 1 to 0 between the channel pairs of
    `yarn_range` (arXiv:2309.00071, Section 3.2, which calls it gamma; arXiv:2405.04434, Section 3.1.4).
    """
    frequencies = theta ** (-torch.arange(0, rope_dim, 2, dtype=torch.float64, device="cpu") / rope_dim)
    if yarn is None:
        return frequencies
    low, high = yarn_range(rope_dim, theta, yarn)
    pairs = torch.arange(rope_dim // 2, dtype=torch.float64, device="cpu")
    ramp = 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return ramp * frequencies + (1 - ramp) * frequencies / yarn.factor


def yarn_range(rope_dim: int, theta: float, yarn: YarnConfig) -> tuple[int, int]:
    """Return the last channel pair that keeps its frequency, and the first whose frequency is divided by `factor`.

    pair(r) = rope_dim ln(original_max_len / (2 pi r)) / (2 ln theta) makes r turns over original_max_len tokens. The
    results are floor(pair(beta_fast)), at least 0, and ceil(pair(beta_slow)), inside 0..rope_dim - 1.
    """

    def pair(turns: float) -> float:
        return rope_dim * math.log(yarn.original_max_len / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = math.floor(pair(yarn.beta_fast)), math.ceil(pair(yarn.beta_slow))
    return max(low, 0), min(max(high, 0), rope_dim - 1)


def softmax_scale(qk_dim: int, yarn: YarnConfig | None = None) -> float:
    """Return the factor of the scores: 1 / sqrt(qk_dim), with `yarn` times (0.1 mscale ln factor + 1)^2."""
    scale = 1 / math.sqrt(qk_dim)
    if yarn is None:
        return scale
    return scale * (0.1 * yarn.mscale * math.log(yarn.factor) + 1) ** 2


def rope_tables(
    rope_dim: int, length: int, theta: float = 10_000.0, yarn: YarnConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position times frequency, each (length, rope_dim / 2) in float32."""
    positions = torch.arange(length, dtype=torch.float64, device="cpu")
    angles = torch.outer(positions, rope_frequencies(rope_dim, theta, yarn))
    return angles.cos().float(), angles.sin().float()


class RopeTables:
    """cos and sin of `rope_tables` for a model: in float32, whatever dtype and device the model was moved through.

    As buffers they would be rounded by `.half()` and left uninitialised by `.to_empty()`, and no file would restore
    them.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self._on = {cos.device: (cos, sin)}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin on `device`, each (length, rope_dim / 2) float32; copied there once."""
        if device not in self._on:
            with torch.inference_mode(False):  # a later call may need gradients
                cos, sin = next(iter(self._on.values()))
                self._on[device] = cos.to(device), sin.to(device)
        return self._on[device]

    def __deepcopy__(self, memo: dict[int, Any]) -> "RopeTables":
        return self  # never changed


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (..., S, d) by halves, channel j with j + d/2, each token by its position; cos, sin (..., S, d / 2)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def apply_rope_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (..., S, d) by neighbours, channel 2j with 2j + 1, as DeepSeek's code does; cos, sin (..., S, d / 2)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def pairs_to_halves(x: Tensor, dim: int = -1) -> Tensor:
    """Reorder channels along `dim` from neighbours to halves: even channels first, then odd ones.

    No number changes: apply_rope(pairs_to_halves(x)) = pairs_to_halves(apply_rope_pairs(x)) exactly. To convert the
    weights of a model, reorder the outputs of the projections that make the rotated parts of queries and of keys.
    """
    require(x.shape[dim] % 2 == 0, "channels", x.shape[dim], "must be even: RoPE rotates pairs of channels")
    order = torch.arange(x.shape[dim], device=x.device).view(-1, 2).T.flatten()
    return x.index_select(dim, order)
