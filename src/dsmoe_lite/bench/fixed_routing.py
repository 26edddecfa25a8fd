"""Fixed routing for benchmarks: every contender gets the same expert ids, drawn from a fixed seed."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from dsmoe_lite.layers.load import expert_counts, relative_load
from dsmoe_lite.layers.router import Router, Routing


def uniform_ids(n_tokens: int, n_experts: int, top_k: int) -> Tensor:
    """Draw K distinct experts for each token, all equally likely, (T, K)."""
    return torch.rand(n_tokens, n_experts, generator=_generator()).topk(top_k).indices


def zipf_ids(n_tokens: int, n_experts: int, top_k: int) -> Tensor:
    """Draw K distinct experts for each token, the r-th most popular with weight 1 / r, (T, K)."""
    popularity = 1 / (1 + torch.randperm(n_experts, generator=_generator()))
    return torch.multinomial(popularity.expand(n_tokens, -1), top_k, generator=_generator())


def skewed_ids(n_tokens: int, n_experts: int, top_k: int, violation: float) -> Tensor:
    """Draw K distinct experts for each token, one of them so often that MaxVio is `violation`, (T, K)."""
    ids = uniform_ids(n_tokens, n_experts - 1, top_k)
    n_busy = round((1 + violation) * n_tokens * top_k / n_experts)
    ids[:n_busy, 0] = n_experts - 1
    return ids


def max_violation(ids: Tensor, n_experts: int) -> float:
    """Return MaxVio = max load / mean load - 1 (arXiv:2408.15664)."""
    return float(relative_load(expert_counts(ids, n_experts).double()).max() - 1)


class FixedRouter(nn.Module):
    """A router that does all its work, and whose choices are then replaced by fixed ones."""

    ids: Tensor

    def __init__(self, router: Router, ids: Tensor) -> None:
        super().__init__()
        self.router = router
        self.register_buffer("ids", ids)

    def forward(self, x: Tensor, batch_shape: tuple[int, int], token_ids: Tensor | None = None) -> Routing:
        """As Router.forward; the gates are the scores of the fixed ids (T, K)."""
        routing = self.router(x, batch_shape, token_ids)
        return replace(routing, topk_ids=self.ids, gates=routing.scores.gather(1, self.ids))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
