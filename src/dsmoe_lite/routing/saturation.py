"""When does routing settle? Choices of an earlier checkpoint against the final ones, on the same tokens."""

import torch
from torch import Tensor

from dsmoe_lite.common.errors import require
from dsmoe_lite.layers.load import expert_counts
from dsmoe_lite.routing.choices import require_choices


def saturation(topk_ids_then: Tensor, topk_ids_final: Tensor) -> float:
    """Return the share of the final choices that the same token had made already; 0 where there are none.

    OLMoE's router saturation (arXiv:2409.02060, Eq 5), the order of the choices left aside. Uniform choice gives K / E;
    for the loads at hand see `saturation_null`.
    """
    _require_same_tokens(topk_ids_then, topk_ids_final)
    final = topk_ids_final >= 0
    already = torch.zeros_like(final)
    for rank in range(topk_ids_then.shape[1]):
        already |= topk_ids_final == topk_ids_then[:, rank : rank + 1]
    return int((already & final).sum()) / max(1, int(final.sum()))


def saturation_null(topk_ids_then: Tensor, topk_ids_final: Tensor, n_experts: int) -> float:
    """Return the mean `saturation` over all ways to pair the tokens then with the tokens now.

    sum_e then_e * final_e / (T * sum_e final_e), counts of tokens: K / E where one of the two is balanced, more where
    both overload the same experts.
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
