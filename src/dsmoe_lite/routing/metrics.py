"""How the experts were used, as pure functions of choices. Each says what chance, or perfect balance, would give."""

import math
from typing import Protocol

import torch
from torch import Tensor

from dsmoe_lite.errors import require_number
from dsmoe_lite.layers.capacity import capacity


class Choices(Protocol):
    """What these functions read: a Routing has it, and so has a recorded trace."""

    @property
    def n_experts(self) -> int: ...

    @property
    def topk_ids(self) -> Tensor: ...  # (T, K), -1 for no expert

    @property
    def kept(self) -> Tensor: ...  # (T, K) bool

    @property
    def counts(self) -> Tensor: ...  # (E,) int64


def load(routing: Choices) -> Tensor:
    """Return assignments per expert over their mean, (E,): 1 everywhere at balance. Dropped ones count too."""
    counts = routing.counts.float()
    return counts * routing.n_experts / counts.sum().clamp(min=1)


def max_vio(routing: Choices) -> float:
    """Return max_i load_i / mean load - 1 (Wang et al. 2024, arXiv:2408.15664): 0 at balance, E/K - 1 at collapse."""
    return max(0.0, float(load(routing).max()) - 1)  # 0 also where there are no tokens


def drop_rate(routing: Choices) -> float:
    """Return the share of the assignments that were not kept; 0 where there are none."""
    assigned = int(routing.counts.sum())
    return 1 - int(routing.kept.sum()) / assigned if assigned else 0.0


def overflow(routing: Choices, factor: float) -> float:
    """Return the share of assignments that a capacity factor would drop, first choices first; 0 at balance."""
    counts = routing.counts
    assigned = int(counts.sum())  # T * K, or what the experts chose
    slots = capacity(assigned, 1, routing.n_experts, factor)
    return float((counts - slots).clamp(min=0).sum() / max(1, assigned))


def load_cv(routing: Choices) -> float:
    """Return the standard deviation of the loads over their mean (arXiv:1701.06538, there squared).

    0 at balance, sqrt(E / K - 1) at collapse.
    """
    counts = routing.counts.double()
    return float(counts.std(correction=0) / counts.mean()) if counts.any() else 0.0


def load_entropy(routing: Choices) -> float:
    """Return the entropy of the loads over ln E: 1 at balance, ln K / ln E at collapse; 0 where there are no tokens."""
    counts = routing.counts.double()
    if routing.n_experts == 1:
        return float(counts.sum() > 0)
    share = counts / counts.sum().clamp(min=1)
    return max(0.0, float(torch.special.entr(share).sum()) / math.log(routing.n_experts))


def dead_share(routing: Choices, below: float = 0.0) -> float:
    """Return the share of experts with a load of at most `below` times the mean: those without a token, or nearly so.

    0 at balance, 1 - K / E at collapse. Chance leaves experts empty when tokens are few: (1 - 1 / E)^T for K = 1.
    0 where there are no tokens.
    """
    require_number("below", below, 0)
    return float((load(routing) <= below).double().mean()) if int(routing.counts.sum()) else 0.0


def groups_reached(routing: Choices, group_of: Tensor) -> float:
    """Return how many groups of experts (devices, nodes) a token's kept experts sit in, the mean over tokens.

    group_of (E,): the group of each expert, from 0. At most K or the number of groups; 1 or more if nothing is dropped.
    """
    groups = group_of[routing.topk_ids.clamp(min=0)]  # (T, K)
    reached = groups.new_zeros(len(groups), int(group_of.max()) + 1).scatter_reduce(
        1, groups, routing.kept.long(), "amax"
    )
    return float(reached.sum()) / max(1, len(groups))
