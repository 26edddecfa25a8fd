"""How the experts were used, as pure functions of choices. Each says what chance, or perfect balance, would give."""

from typing import Protocol

from torch import Tensor

from dsmoe_lite.layers.capacity import capacity
from dsmoe_lite.layers.load import relative_load


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
    return relative_load(routing.counts)


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


def groups_reached(routing: Choices, group_of: Tensor) -> float:
    """Return how many groups of experts (devices, nodes) a token's kept experts sit in, the mean over tokens.

    group_of (E,): the group of each expert, from 0. At most K or the number of groups; 1 or more if nothing is dropped.
    """
    groups = group_of[routing.topk_ids.clamp(min=0)]  # (T, K)
    reached = groups.new_zeros(len(groups), int(group_of.max()) + 1).scatter_reduce(
        1, groups, routing.kept.long(), "amax"
    )
    return float(reached.sum()) / max(1, len(groups))
