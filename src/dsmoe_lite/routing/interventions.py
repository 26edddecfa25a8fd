"""A trained model with one thing about its experts changed, to see what that thing was worth."""

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsmoe_lite.common.errors import require, require_number, require_whole
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.layers.router import Routing
from dsmoe_lite.layers.selection import ordered_topk
from dsmoe_lite.model import Transformer


def swap_shared(model: Transformer, more_routed: int) -> Transformer:
    """Return a copy of `model` without its shared experts and with top_k raised by `more_routed`.

    With `more_routed` = n_shared_experts a token meets as many expert weights as before: DeepSeekMoE
    (arXiv:2401.06066), Section 4.5. InputError without shared experts, or where top_k + more_routed is out of reach.
    """
    moe = model.config.moe
    shared = 0 if moe is None else moe.n_shared_experts
    require(shared > 0, "n_shared_experts", shared, "there is no shared expert to take away")
    assert moe is not None
    return _rebuilt(model, replace(moe, n_shared_experts=0, top_k=moe.top_k + more_routed))


def silence(model: Transformer, *, shared: bool = False, ranks: Collection[int] = ()) -> Transformer:
    """Return a copy of `model` in which shared experts, or a token's chosen experts of these ranks, add nothing.

    Rank 0 is the expert a router puts first. Nothing is chosen instead, and the other gates stay as they were: in every
    MoE layer the sum of DeepSeekMoE Eq 9 (arXiv:2401.06066) lacks these terms. InputError without shared experts to
    silence, or for a rank that is not below top_k.
    """
    moe = model.config.moe
    require(moe is not None, "moe", moe, "the model has no experts to silence")
    assert moe is not None
    for rank in ranks:
        require_whole("rank", rank, 0, moe.top_k - 1)
    changed = swap_shared(model, 0) if shared else deepcopy(model)
    for layer in changed.moe_layers:
        layer.router.register_forward_hook(partial(_leave_out, sorted(ranks)))
    return changed


def switch_off(model: Transformer, experts: Mapping[int, Collection[int]]) -> Transformer:
    """Return a copy of `model` in which nobody may choose these experts, {MoE layer: experts}; the next best step in.

    Layers count from 0 over the MoE layers. Gates are those that the scores make, as if nothing were missing.
    InputError for a layer or an expert that is not there, where fewer than top_k would be left, or where experts are
    not chosen by score.
    """
    moe, changed = _chosen_by_score(model), deepcopy(model)
    E = moe.n_routed_experts
    for layer, gone in experts.items():
        require_whole("layer", layer, 0, len(changed.moe_layers) - 1)
        for e in gone:
            require_whole("expert", e, 0, E - 1)
        left = E - len(set(gone))
        require(left >= moe.top_k, "experts left", left, f"must be at least top_k = {moe.top_k}: switch fewer off")
        closed = torch.zeros(E, dtype=torch.bool)
        closed[sorted(gone)] = True
        changed.moe_layers[layer].router.forbidden = partial(_always, closed)
    return changed


def mask_top(model: Transformer, share: float) -> Transformer:
    """Return a copy of `model` in which each token may not choose the `share` of experts it scores highest.

    The K best of the rest are taken (DeepSeekMoE, arXiv:2401.06066, Section 4.5 and Figure 4), in every MoE layer;
    share * E is rounded. InputError where fewer than top_k would be left, or where experts are not chosen by score.
    """
    moe, changed = _chosen_by_score(model), deepcopy(model)
    require_number("share", share, 0.0, 1.0)
    masked = round(share * moe.n_routed_experts)
    left = moe.n_routed_experts - masked
    require(left >= moe.top_k, "share", share, f"leaves {left} experts, fewer than top_k = {moe.top_k}")
    for layer in changed.moe_layers:
        layer.router.forbidden = partial(_the_best, masked)
    return changed


def with_active(model: Transformer, top_k: int) -> Transformer:
    """Return a copy of `model` in which a token takes `top_k` experts (DeepSeekMoE Figure 5, at inference).

    InputError where that many cannot be: the config says which field.
    """
    moe = _chosen_by_score(model)
    second = moe.second_choice if top_k == moe.top_k else "all"
    return _rebuilt(model, replace(moe, top_k=top_k, second_choice=second))


def _rebuilt(model: Transformer, moe: MoEConfig) -> Transformer:
    """The weights of `model` under another config, without those it has no place for; torch's random state stays."""
    with torch.random.fork_rng(devices=[]):
        changed = Transformer(replace(model.config, moe=moe)).to(model.embed.weight)
    weights = model.state_dict()
    changed.load_state_dict({name: weights[name] for name in changed.state_dict()})
    return changed.train(model.training)


def _chosen_by_score(model: Transformer) -> MoEConfig:
    moe = model.config.moe
    require(moe is not None, "moe", moe, "the model has no experts to choose from")
    assert moe is not None
    require(moe.scoring_func != "hash", "scoring_func", moe.scoring_func, "a table has no next best expert")
    require(moe.chooser == "token", "chooser", moe.chooser, "experts choose here: no token has a next best one")
    return moe


def _always(closed: Tensor, scores: Tensor) -> Tensor:
    return closed.to(scores.device).expand_as(scores)


def _the_best(n: int, scores: Tensor) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, ordered_topk(scores, n), True)


def _leave_out(ranks: list[int], router: Any, inputs: Any, routing: Routing) -> Routing:
    kept = routing.kept.clone()
    kept[:, ranks] = False
    return replace(routing, kept=kept)
