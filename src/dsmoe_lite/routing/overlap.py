"""Do the two best experts of a token write the same thing?"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_lite.common.errors import require
from dsmoe_lite.layers.ffn import clamp
from dsmoe_lite.model import Transformer, eval_mode


@torch.no_grad()
def output_overlap(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """Return the cosine between the outputs of each token's two best routed experts, (T,) for every MoE layer.

    tokens (B, S), T = B * S. 1: both experts write the same, up to its size; 0: their outputs have nothing in common.
    Gates and capacity play no part. The model stays in its mode, training or evaluation. Raises InputError if a token
    has fewer than two routed experts.
    """
    top_k = 0 if model.config.moe is None else model.config.moe.top_k
    require(top_k >= 2, "top_k", top_k, "a token needs two routed experts to compare")
    inputs: list[Tensor] = []

    def save_input(module: nn.Module, arguments: Any) -> None:
        inputs.append(arguments[0].flatten(0, 1))

    hooks = [layer.register_forward_pre_hook(save_input) for layer in model.moe_layers]
    try:
        with eval_mode(model):
            routings = model(tokens).routings
    finally:
        for hook in hooks:
            hook.remove()
    overlaps = []
    for layer, u, routing in zip(model.moe_layers, inputs, routings, strict=True):
        experts, outputs = layer.experts, torch.empty(2, *u.shape, dtype=u.dtype, device=u.device)
        best = routing.topk_ids[:, :2]
        for i in range(routing.n_experts):
            token, rank = torch.where(best == i)
            a, b = clamp(u[token] @ experts.gate[i].T, u[token] @ experts.up[i].T, experts.limit)
            hidden = F.silu(a) * b
            outputs[rank, token] = hidden @ experts.down[i].T
        overlaps.append(F.cosine_similarity(outputs[0], outputs[1], dim=-1))
    return overlaps
