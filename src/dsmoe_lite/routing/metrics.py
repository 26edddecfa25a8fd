"""How the experts were used, as pure functions of a Routing. Each says what chance, or perfect balance, would give."""

import torch
from torch import Tensor

from dsmoe_lite.layers.capacity import capacity
from dsmoe_lite.layers.router import Routing


def load(routing: Routing) -> Tensor:
    """Return assignments per expert over their mean, (E,): 1 everywhere at balance. Dropped ones count too."""
    counts = routing.counts.float()
    return counts * routing.n_experts / counts.sum().clamp(min=1)


def max_vio(routing: Routing) -> float:
    """Return max_i load_i / mean load - 1 (Wang et al. 2024, arXiv:2408.15664): 0 at balance, E/K - 1 at collapse."""
    return max(0.0, float(load(routing).max()) - 1)  # 0 also where there are no tokens


def drop_rate(routing: Routing) -> float:
    """Return the share of the assignments that were not kept; 0 where there are none."""
    assigned = int(routing.counts.sum())
    return 1 - int(routing.kept.sum()) / assigned if assigned else 0.0


def overflow(routing: Routing, factor: float) -> float:
    """Return the share of assignments that a capacity factor would drop, first choices first; 0 at balance."""
    counts = routing.counts
    assigned = int(counts.sum())  # T * K, or what the experts chose
    slots = capacity(assigned, 1, routing.n_experts, factor)
    return float((counts - slots).clamp(min=0).sum() / max(1, assigned))


def domain_share(routing: Routing, labels: Tensor, n_domains: int) -> Tensor:
    """Return, for each domain, the share of its assignments that each expert takes, (n_domains, E).

    labels (T,) hold each token's domain. Rows sum to 1; a domain without tokens gives zeros. The null is the expert's
    overall share of assignments, not 1/E: an overloaded expert is chosen often by every domain.
    """
    T, K = routing.topk_ids.shape
    cell = labels.long().unsqueeze(1).expand(T, K) * routing.n_experts + routing.topk_ids
    counts = (
        torch.bincount(cell[routing.topk_ids >= 0], minlength=n_domains * routing.n_experts).view(n_domains, -1).float()
    )
    return counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
