"""How much do the shared and the routed experts each add to a token?"""

from typing import Any

import torch
from torch import Tensor, nn

from dsmoe_lite.common.errors import require
from dsmoe_lite.model import Transformer, eval_mode


@torch.no_grad()
def contributions(model: Transformer, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the two sums of DeepSeekMoE Eq 9 (arXiv:2401.06066), (shared, routed), for every MoE layer.

    tokens (B, S) -> two tensors (T, D) per layer, T = B * S. The model stays in its mode, training or evaluation.
    Raises InputError if it has no shared experts.
    """
    moe = model.config.moe
    shared = 0 if moe is None else moe.n_shared_experts
    require(shared > 0, "n_shared_experts", shared, "the model has no shared experts")
    outputs: dict[nn.Module, Any] = {}

    def save_output(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs[module] = output

    parts = [part for layer in model.moe_layers for part in (layer, layer.shared) if part is not None]
    hooks = [part.register_forward_hook(save_output) for part in parts]
    try:
        with eval_mode(model):
            model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    sums = []
    for layer in model.moe_layers:
        assert layer.shared is not None
        shared_sum, layer_sum = outputs[layer.shared], outputs[layer][0].flatten(0, 1)
        sums.append((shared_sum, layer_sum - shared_sum))
    return sums
