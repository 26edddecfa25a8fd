"""Run the products of a model's blocks in FP8, as DeepSeek-V3 does (arXiv:2412.19437, Section 3.3.1).

Embedding, head, router, norms, attention's own products and the projections of MTP modules keep their precision.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_lite.layers.dispatch import Dispatched, Implementation, combine
from dsmoe_lite.layers.experts import Experts
from dsmoe_lite.layers.ffn import clamp
from dsmoe_lite.layers.quant import Recipe, fp8_linear
from dsmoe_lite.model import Transformer


@contextmanager
def fp8_products(model: Transformer, recipe: Recipe) -> Iterator[None]:
    """Multiply in FP8 by every weight of nn.Linear and of experts in the blocks of `model`, until the context ends.

    Weights stay as they are: each product quantises them anew.
    """
    linears, experts = _parts(model)
    before = [one.implementation for one in experts]
    try:
        for linear in linears:
            linear.forward = partial(_multiply, linear, recipe)  # type: ignore[method-assign]
        for one in experts:
            one.implementation = Implementation(partial(run_fp8, recipe=recipe), combine)
        yield
    finally:
        for linear in linears:
            linear.__dict__.pop("forward", None)
        for one, implementation in zip(experts, before, strict=True):
            one.implementation = implementation


def run_fp8(
    dispatched: Dispatched, gate: Tensor, up: Tensor, down: Tensor, limit: float | None = None, *, recipe: Recipe
) -> Tensor:
    """Return y_sorted (N, D) as `loop.run_loop`, with the three products of every expert in FP8."""
    counts = dispatched.counts
    rows = zip(dispatched.x_sorted.split(counts), dispatched.gates.split(counts), strict=True)
    y_sorted = []
    for (x, g), *weights in zip(rows, gate.unbind(), up.unbind(), down.unbind(), strict=True):
        a, b = clamp(fp8_linear(x, weights[0], recipe), fp8_linear(x, weights[1], recipe), limit)
        y_sorted.append(g.unsqueeze(1) * fp8_linear(F.silu(a) * b, weights[2], recipe))
    return torch.cat(y_sorted)


def _parts(model: Transformer) -> tuple[list[nn.Linear], list[Experts]]:
    blocks = [*model.blocks, *(module.block for module in model.mtp)]
    modules = [module for block in blocks for module in block.modules()]
    return [m for m in modules if isinstance(m, nn.Linear)], [m for m in modules if isinstance(m, Experts)]


def _multiply(linear: nn.Linear, recipe: Recipe, x: Tensor) -> Tensor:
    return fp8_linear(x, linear.weight, recipe)
