"""What the shared and the routed experts of a model each add for a token."""

from typing import Any

import torch
from torch import Tensor, nn

from dsmoe_lite.common.errors import require
from dsmoe_lite.model import Transformer, eval_mode


@torch.no_grad()
def contributions(model: Transformer, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return (shared, routed), the two sums of DeepSeekMoE Eq 9 (arXiv:2401.06066), for every MoE layer.

    tokens (B, S) -> two tensors (T, D) a layer, T = B * S. The model is left in the mode it was in. InputError where it
    has no shared experts.
    """
    moe = model.config.moe
    shared = 0 if moe is None else moe.n_shared_experts
    require(shared > 0, "n_shared_experts", shared, "there is no shared expert to look at")
    heard: dict[nn.Module, Any] = {}

    def listen(module: nn.Module, inputs: Any, output: Any) -> None:
        heard[module] = output

    parts = [part for layer in model.moe_layers for part in (layer, layer.shared) if part is not None]
    hooks = [part.register_forward_hook(listen) for part in parts]
    try:
        with eval_mode(model):
            model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    both = []
    for layer in model.moe_layers:
        assert layer.shared is not None
        of_shared, whole = heard[layer.shared], heard[layer][0].flatten(0, 1)
        both.append((of_shared, whole - of_shared))
    return both
