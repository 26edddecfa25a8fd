"""Which experts a token gets, from scores alone: ties go to the lower id, everywhere."""

import math

import torch
from torch import Tensor


def ordered_topk(scores: Tensor, k: int) -> Tensor:
    """Return the ids (..., k) of the k largest scores of each row, best first; equal scores go to the lower id."""
    if not scores.is_cpu:  # to look for ties would wait for the GPU; a stable sort does not
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    values, ids = scores.topk(min(k + 1, scores.shape[-1]), dim=-1)
    ids = ids[..., :k]
    tied = (values[..., 1:] == values[..., :-1]).any(dim=-1)  # topk may take any of equal scores
    if tied.any():
        ids[tied] = scores[tied].sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return ids


def group_of(n_experts: int, n_group: int, device: torch.device | None = None) -> Tensor:
    """Return the group of every expert, (E,): neighbours stand together, E / n_group in each."""
    return torch.arange(n_experts, device=device) // (n_experts // n_group)


def limit_groups(scores: Tensor, n_group: int, topk_group: int, group_score: str) -> Tensor:
    """Return scores (T, E) with -inf outside the best `topk_group` of `n_group` groups of each token.

    group_score "max": a group is worth its best score (DeepSeek-V2, arXiv:2405.04434, Section 2.2.2). "top2": the sum
    of its best two (DeepSeek-V3, arXiv:2412.19437, Section 2.1.2, with K_r / M = 2). Not 0 outside: a biased score can
    be negative, and 0 would win.
    """
    T, E = scores.shape
    best = scores.view(T, n_group, E // n_group).topk(2 if group_score == "top2" else 1, dim=-1).values
    chosen = ordered_topk(best.sum(dim=-1), topk_group)  # (T, topk_group)
    allowed = torch.zeros(T, n_group, dtype=torch.bool, device=scores.device).scatter(1, chosen, True)
    return scores.masked_fill(~allowed.repeat_interleave(E // n_group, dim=1), -math.inf)


def expert_choice(scores: Tensor, per_expert: int) -> Tensor:
    """Return ids (T, K') when every expert takes its best `per_expert` tokens of scores (T, E) (arXiv:2202.09368).

    A token's experts stand best first; K' is the most that any token has, -1 fills the rest. It looks at all T tokens,
    later ones too: not causal.
    """
    T, E = scores.shape
    taken = torch.zeros(T, E, dtype=torch.bool, device=scores.device)
    taken.scatter_(0, ordered_topk(scores.T, per_expert).T, True)
    most = int(taken.sum(dim=1).max()) if T else 0
    ids = ordered_topk(scores.masked_fill(~taken, -math.inf), most)
    return ids.masked_fill(~taken.gather(1, ids), -1)
