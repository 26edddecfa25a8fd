"""How evenly were the experts used? Each docstring gives the value at perfect balance."""

from typing import Protocol

from torch import Tensor

from dsmoe_lite.layers.capacity import capacity
from dsmoe_lite.layers.load import relative_load


class Choices(Protocol):
    """What these functions read of one layer: `Routing` and the `LayerTrace` of a recorded trace both have it."""

    @property
    def n_experts(self) -> int: ...

    @property
    def topk_ids(self) -> Tensor: ...  # (T, K), -1 for no expert

    @property
    def kept(self) -> Tensor: ...  # (T, K) bool

    @property
    def counts(self) -> Tensor: ...  # (E,) int64


def load(routing: Choices) -> Tensor:
    """Return the relative load (E,), choices per expert over their mean: 1 everywhere at balance. Drops count too."""
    return relative_load(routing.counts)


def max_vio(routing: Choices) -> float:
    """Return max_i load_i / mean load - 1 (Wang et al. 2024, arXiv:2408.15664): 0 at balance, E/K - 1 at collapse."""
    return max(0.0, float(load(routing).max()) - 1)  # without tokens the load is 0 everywhere


def drop_rate(routing: Choices) -> float:
    """Return the share of choices that were dropped; 0 if there are no choices."""
    n_choices = int(routing.counts.sum())
    return 1 - int(routing.kept.sum()) / n_choices if n_choices else 0.0


def overflow(routing: Choices, factor: float) -> float:
    """Return the share of choices that this capacity factor would drop; 0 at balance with a factor of at least 1."""
    counts = routing.counts
    n_choices = int(counts.sum())  # T * K; under expert choice, as many as the experts took
    slots = capacity(n_choices, 1, routing.n_experts, factor)
    return float((counts - slots).clamp(min=0).sum() / max(1, n_choices))


def groups_reached(routing: Choices, group_of: Tensor) -> float:
    """Return the mean number of expert groups (devices, nodes) that a token's kept choices reach.

    group_of (E,): the group of each expert, from 0. At most K and at most the number of groups; at least 1 if nothing
    is dropped.
    """
    groups = group_of[routing.topk_ids.clamp(min=0)]  # (T, K)
    reached = groups.new_zeros(len(groups), int(group_of.max()) + 1).scatter_reduce(
        1, groups, routing.kept.long(), "amax"
    )
    return float(reached.sum()) / max(1, len(groups))
