"""One layer of experts by each backend, forward and backward, beside the dense FFN of equal active FLOPs."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dsmoe_lite.bench.ratios import compare
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.layers.ffn import SwiGLU
from dsmoe_lite.layers.moe import MoELayer


def bench_layer(rounds: int, n_tokens: int = 2048, d_model: int = 64) -> list[dict[str, Any]]:
    """Time GShard's 2 of 16 by loop and by padded batch; ratios are to the dense FFN with twice an expert's width."""
    width = 2 * d_model
    moe = MoEConfig(16, 2, width, norm_topk_prob=True)
    x = torch.randn(1, n_tokens, d_model, generator=torch.Generator().manual_seed(0))
    dense = SwiGLU(d_model, 2 * width)
    steps = {"dense FFN, 2x width": _step(dense, lambda: dense(x))}
    for backend in ("loop", "padded"):
        layer = MoELayer(d_model, replace(moe, backend=backend), vocab_size=1)
        steps[f"2 of 16 experts, {backend}"] = _step(layer, partial(_first, layer, x))
    return compare(steps, rounds)


def _first(layer: MoELayer, x: torch.Tensor) -> torch.Tensor:
    return layer(x)[0]


def _step(module: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
    def step() -> None:
        forward().square().mean().backward()
        module.zero_grad(set_to_none=True)

    return step
