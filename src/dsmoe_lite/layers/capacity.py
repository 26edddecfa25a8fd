"""What is left of a choice when experts, or groups of experts, have a limited number of slots."""

import math
from fractions import Fraction

import torch
from torch import Tensor


def capacity(n_tokens: int, top_k: int, n_experts: int, factor: float) -> int:
    """Return the slots of one expert: ceil(factor * T * K / E). Factor 1 is GShard's 2N/(GE) with K = 2, one group."""
    return math.ceil(_as_written(factor) * n_tokens * top_k / n_experts)


def even_parts(n: int, parts: int) -> list[int]:
    """Cut n things into `parts`, each of n / parts rounded up or down, the larger ones first."""
    return [n // parts + (part < n % parts) for part in range(parts)]


def place_in_expert(topk_ids: Tensor, n_experts: int) -> Tensor:
    """Return how many assignments stand before each one in its expert's queue, (T, K).

    GShard's order (arXiv:2006.16668, Algorithm 1): every first choice in token order, then every second choice, and so
    on. An assignment counts even when it is not kept, as the algorithm prints it.
    """
    T, K = topk_ids.shape
    queue = topk_ids.T.reshape(-1)  # (K*T,) choice-major
    return _rank(queue, torch.arange(K * T, device=queue.device), n_experts).view(K, T).T


def group_budget(n_tokens: int, top_k: int, n_group: int, factor: float) -> int:
    """Return the slots of one group of experts: floor(factor * T * K / n_group), counted in assignments."""
    return math.floor(_as_written(factor) * n_tokens * top_k / n_group)


def within_budget(groups: Tensor, affinities: Tensor, n_group: int, budget: int, exempt: Tensor) -> Tensor:
    """Return which assignments stay, (T, K) bool, when each group drops its lowest affinities down to `budget`.

    DeepSeek-V2's token dropping (arXiv:2405.04434, Section 2.2.4): groups (T, K) holds the device of each assignment,
    affinities (T, K) its score; a token in `exempt` (T,) is never dropped, yet takes its slots first. The paper names
    neither the unit (here token-expert assignments) nor the rounding of the budget (here down).
    """
    T, K = groups.shape
    free = exempt.unsqueeze(1).expand(T, K).flatten()
    by_affinity = affinities.detach().flatten().argsort(descending=True, stable=True)
    order = by_affinity[(~free[by_affinity]).to(torch.int8).argsort(stable=True)]
    return ((_rank(groups.flatten(), order, n_group) < budget) | free).view(T, K)


def exempt_tokens(batch_shape: tuple[int, int], share: float, device: torch.device) -> Tensor:
    """Return which of the T tokens belong to the first round(share * B) sequences, (T,) bool.

    With a share of 0.1 a batch of up to 5 sequences exempts none. Batches are shuffled, so the first sequences are any;
    and they are the same in every layer.
    """
    B, S = batch_shape
    return torch.arange(B * S, device=device) < round(share * B) * S


def _as_written(factor: float) -> Fraction:
    """The decimal that `factor` prints as: in floating point 1.1 * 50 is a little above 55."""
    return Fraction(str(factor))


def _rank(labels: Tensor, order: Tensor, n_labels: int) -> Tensor:
    """Return, for each of N labels, how many equal ones come before it when they are taken in `order` (N,)."""
    taken = order[labels[order].argsort(stable=True)]  # by label, then by `order`
    counts = torch.bincount(labels, minlength=n_labels)
    starts = counts.cumsum(0) - counts
    ranks = torch.empty_like(labels)
    ranks[taken] = torch.arange(len(labels), device=labels.device) - starts[labels[taken]]
    return ranks
