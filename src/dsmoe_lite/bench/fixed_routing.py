"""Routing that is recorded, not learnt: every contender gets the same expert ids, from a fixed seed."""

from dataclasses import replace

import torch
from torch import Tensor, nn

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
    others = uniform_ids(n_tokens, n_experts - 1, top_k)
    crowd = round((1 + violation) * n_tokens * top_k / n_experts)
    others[:crowd, 0] = n_experts - 1
    return others


def max_violation(ids: Tensor, n_experts: int) -> float:
    """Return MaxVio = max load / mean load - 1 (arXiv:2408.15664)."""
    load = torch.bincount(ids.flatten(), minlength=n_experts).double()
    return float(load.max() / load.mean() - 1)


class RecordedRouter(nn.Module):
    """A router that does all its work, whose choice is then replaced by the recorded one."""

    ids: Tensor

    def __init__(self, router: Router, ids: Tensor) -> None:
        super().__init__()
        self.router = router
        self.register_buffer("ids", ids)

    def forward(self, x: Tensor, batch_shape: tuple[int, int], token_ids: Tensor | None = None) -> Routing:
        """As Router.forward; the gates are the scores of the recorded ids (T, K)."""
        routing = self.router(x, batch_shape, token_ids)
        return replace(routing, topk_ids=self.ids, gates=routing.scores.gather(1, self.ids))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
