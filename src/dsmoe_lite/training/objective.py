"""What training adds to the loss: balance losses, summed over the MoE layers, and that of multi-token prediction."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe_lite.config import ModelConfig, MoEConfig
from dsmoe_lite.layers import balance
from dsmoe_lite.layers.router import Routing
from dsmoe_lite.layers.selection import group_of
from dsmoe_lite.model import Output

PLAIN_LOSSES: dict[str, Callable[..., Tensor]] = {
    "importance": balance.importance_loss,
    "load": balance.load_loss,
    "gshard": balance.gshard_loss,
    "switch": balance.switch_loss,
    "z": balance.z_loss,
    "expert": balance.expert_loss,
    "sequence": balance.sequence_loss,
}
DEVICE_LOSSES = ("device", "communication")  # a group of experts in the config is a device
BALANCE_LOSSES = (*PLAIN_LOSSES, *DEVICE_LOSSES)
GLOBAL_LOSSES = ("expert", "device")  # that can count the choices of all micro-batches


def balance_terms(
    output: Output,
    config: ModelConfig,
    weights: Mapping[str, float],
    all_reduce: balance.AllReduce = balance.single_process,
    earlier: Sequence[Tensor] | None = None,
) -> Tensor:
    """Sum the balance losses of all MoE layers, times their `weights` (name -> alpha); 0 for a dense model.

    Layers with `chooser="hash"` are left out: a table chooses, whatever the scores are.
    all_reduce: as in `layers.balance`, for a batch that is divided among processes.
    earlier: of each MoE layer the choices (E,) in earlier micro-batches, for the losses of GLOBAL_LOSSES.
    """
    terms = output.logits.new_zeros((), dtype=torch.float32)
    layers = config.all_moe_layers if output.ahead else config.moe_layers
    for i, (routing, moe) in enumerate(zip((*output.routings, *output.ahead_routings), layers, strict=True)):
        if moe.chooser == "hash":
            continue
        for name, weight in weights.items():
            if weight:
                counted = {"earlier": earlier[i]} if earlier is not None and name in GLOBAL_LOSSES else {}
                terms = terms + weight * _balance_loss(name, routing, moe, all_reduce=all_reduce, **counted)
    return terms


def mtp_loss(output: Output, tokens: Tensor) -> Tensor:
    """Mean over MTP modules k of the cross-entropy of token i + k + 1 (DeepSeek-V3 Eq 24-25, without lambda).

    tokens (B, S + 1): those the model read and the last target. As printed, a module's sum over its S - k tokens is
    divided by S.
    """
    total, S = output.logits.new_zeros((), dtype=torch.float32), tokens.shape[1] - 1
    for k, logits in enumerate(output.ahead, start=1):
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, k + 1 :].flatten())
        total = total + loss * (S - k) / S
    return total / max(1, len(output.ahead))


def _balance_loss(name: str, routing: Routing, moe: MoEConfig, **options: Any) -> Tensor:
    if name in PLAIN_LOSSES:
        return PLAIN_LOSSES[name](routing, **options)
    device_of = group_of(moe.n_routed_experts, moe.n_group, routing.topk_ids.device)
    if name == "device":
        return balance.device_loss(routing, device_of=device_of, **options)
    return balance.communication_loss(routing, device_of=device_of, topk_group=moe.topk_group, **options)
