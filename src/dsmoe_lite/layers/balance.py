"""Losses that keep the experts busy, as pure functions of a Routing. Each says what it is worth at perfect balance."""

import torch
from torch import Tensor

from dsmoe_lite.layers.router import Routing


def gshard_loss(routing: Routing) -> Tensor:
    """Return l_aux = 1/E sum_e (c_e / S) m_e (GShard, arXiv:2006.16668, Algorithm 1), a scalar: 1/E^2 at balance.

    c_e counts first choices and carries no gradient; m_e is the mean score of expert e over the S = T tokens.
    """
    first, mean_scores = _first_choice_share(routing), routing.scores.mean(dim=0)
    return (first * mean_scores).mean()


def switch_loss(routing: Routing) -> Tensor:
    """Return E sum_i f_i P_i (Switch Transformer, arXiv:2101.03961, without alpha), a scalar: 1 at balance.

    f_i is the share of tokens whose best expert is i (no gradient), P_i the mean probability of i. It is E^2 times
    GShard's loss.
    """
    first, mean_scores = _first_choice_share(routing), routing.scores.mean(dim=0)
    return routing.n_experts * (first * mean_scores).sum()


def z_loss(routing: Routing) -> Tensor:
    """Return the mean over tokens of (log sum_j exp x_j)^2 (ST-MoE, arXiv:2202.08906), (ln E)^2 at zero logits."""
    return torch.logsumexp(routing.logits, dim=-1).square().mean()


def _first_choice_share(routing: Routing) -> Tensor:
    counts = torch.bincount(routing.topk_ids[:, 0], minlength=routing.n_experts)
    return counts / routing.topk_ids.shape[0]  # (E,)
