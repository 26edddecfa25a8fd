"""Run the products of a model's blocks in FP8, as DeepSeek-V3 does (arXiv:2412.19437, Section 3.3.1).

Embedding, head, router, norms, attention's own products and the projections of MTP modules keep their precision.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_lite.layers.batched import cut_blocks, row_of_slot
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
    """Return y_sorted (N, D) as `loop.run_loop`, with the three products of every expert in FP8.

    By blocks of experts, whose rows are padded as in `batched.run_padded`: with zeros, which change no scale.
    """
    x, T, N, counts = dispatched.x, len(dispatched.x), len(dispatched.choice), dispatched.counts
    blocks = cut_blocks(counts, gate.shape[1])
    row = row_of_slot(blocks, N).to(x.device)
    token = F.pad(dispatched.token, (0, 1), value=T).index_select(0, row)  # row T of x is zero
    slots = F.pad(x, (0, 0, 0, 1)).index_select(0, token).split([math.prod(block.shape) for block in blocks])
    weights = (weight.split([block.shape[0] for block in blocks]) for weight in (gate, up, down))
    y = []
    for block, x_slots, *of_block in zip(blocks, slots, *weights, strict=True):
        rows = x_slots.view(*block.shape, x.shape[1])
        a, b = clamp(fp8_linear(rows, of_block[0], recipe), fp8_linear(rows, of_block[1], recipe), limit)
        y.append(fp8_linear(F.silu(a) * b, of_block[2], recipe).flatten(0, 1))
    return dispatched.gates.unsqueeze(1) * torch.cat(y).index_select(0, (row < N).nonzero()[:, 0])


def _parts(model: Transformer) -> tuple[list[nn.Linear], list[Experts]]:
    blocks = [*model.blocks, *(module.block for module in model.mtp)]
    modules = [module for block in blocks for module in block.modules()]
    return [m for m in modules if isinstance(m, nn.Linear)], [m for m in modules if isinstance(m, Experts)]


def _multiply(linear: nn.Linear, recipe: Recipe, x: Tensor) -> Tensor:
    return fp8_linear(x, linear.weight, recipe)
