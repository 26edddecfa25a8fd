"""When does routing settle? The choices of an earlier checkpoint and of the final one, on the same tokens."""

import torch
from torch import Tensor

from dsmoe_lite.common.errors import require
from dsmoe_lite.layers.load import expert_counts
from dsmoe_lite.routing.checks import require_choices


def saturation(topk_ids_then: Tensor, topk_ids_final: Tensor) -> float:
    """Return the share of final choices that the same token had already made earlier; 0 if there are no choices.

    OLMoE's router saturation (arXiv:2409.02060, Eq 5); the order of a token's choices does not matter. Uniformly random
    choices give K / E; `saturation_null` gives the baseline for the actual loads.
    """
    _require_same_tokens(topk_ids_then, topk_ids_final)
    final = topk_ids_final >= 0
    made_before = torch.zeros_like(final)
    for rank in range(topk_ids_then.shape[1]):
        made_before |= topk_ids_final == topk_ids_then[:, rank : rank + 1]
    return int((made_before & final).sum()) / max(1, int(final.sum()))


def saturation_null(topk_ids_then: Tensor, topk_ids_final: Tensor, n_experts: int) -> float:
    """Return the mean `saturation` over all permutations of the tokens: the null baseline.

    sum_e then_e * final_e / (T * sum_e final_e), with counts of tokens per expert: K / E if one of the two is balanced,
    more if both overload the same experts.
    """
    require_choices(topk_ids_then, n_experts, "topk_ids_then")
    require_choices(topk_ids_final, n_experts, "topk_ids_final")
    _require_same_tokens(topk_ids_then, topk_ids_final)
    then, final = (expert_counts(ids, n_experts).double() for ids in (topk_ids_then, topk_ids_final))
    return float((then * final).sum() / (len(topk_ids_final) * final.sum()).clamp(min=1))


def _require_same_tokens(then: Tensor, final: Tensor) -> None:
    for name, ids in (("topk_ids_then", then), ("topk_ids_final", final)):
        require(ids.dim() == 2, name, tuple(ids.shape), "must be (tokens, choices)")
    require(len(then) == len(final), "topk_ids_then", len(then), f"must be of the same {len(final)} tokens")
