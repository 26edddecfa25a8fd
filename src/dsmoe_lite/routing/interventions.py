"""Ablations of a trained model: copies with experts removed, masked or exchanged, to measure what they were worth."""

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsmoe_lite.common.errors import require, require_int, require_number
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.layers.router import Routing
from dsmoe_lite.layers.selection import ordered_topk
from dsmoe_lite.model import Transformer


def swap_shared(model: Transformer, more_routed: int) -> Transformer:
    """Return a copy of `model` without its shared experts and with top_k raised by `more_routed`.

    With `more_routed` = n_shared_experts a token uses as many expert weights as before: DeepSeekMoE
    (arXiv:2401.06066), Section 4.5. Raises InputError if there are no shared experts or too few routed ones.
    """
    moe = model.config.moe
    shared = 0 if moe is None else moe.n_shared_experts
    require(shared > 0, "n_shared_experts", shared, "the model has no shared experts to remove")
    assert moe is not None
    return _rebuilt(model, replace(moe, n_shared_experts=0, top_k=moe.top_k + more_routed))


def silence(model: Transformer, *, shared: bool = False, ranks: Collection[int] = ()) -> Transformer:
    """Zero-ablation: return a copy of `model` in which shared experts, or chosen experts of these ranks, add nothing.

    Rank 0 is a token's best expert. No other expert is chosen instead, and the other gates keep their values: in every
    MoE layer the sum of DeepSeekMoE Eq 9 (arXiv:2401.06066) lacks these terms. Raises InputError if there are no shared
    experts to silence, or if a rank is not below top_k.
    """
    moe = model.config.moe
    require(moe is not None, "moe", moe, "the model has no experts to silence")
    assert moe is not None
    for rank in ranks:
        require_int("rank", rank, 0, moe.top_k - 1)
    changed = swap_shared(model, 0) if shared else deepcopy(model)
    for layer in changed.moe_layers:
        layer.router.register_forward_hook(partial(_drop_ranks, sorted(ranks)))
    return changed


def switch_off(model: Transformer, experts: Mapping[int, Collection[int]]) -> Transformer:
    """Return a copy of `model` in which no token may choose these experts; the next best experts replace them.

    experts: {MoE layer: experts}, layers counted from 0 over the MoE layers. Scores are not normalised again over the
    remaining experts. Raises InputError for a layer or an expert that does not exist, if fewer than top_k experts would
    be left, or if experts are not chosen by score.
    """
    moe, changed = _chosen_by_score(model), deepcopy(model)
    E = moe.n_routed_experts
    for layer, disabled in experts.items():
        require_int("layer", layer, 0, len(changed.moe_layers) - 1)
        for e in disabled:
            require_int("expert", e, 0, E - 1)
        left = E - len(set(disabled))
        require(left >= moe.top_k, "experts left", left, f"must be at least top_k = {moe.top_k}: switch fewer off")
        forbidden = torch.zeros(E, dtype=torch.bool)
        forbidden[sorted(disabled)] = True
        changed.moe_layers[layer].router.forbidden = partial(_forbid_these, forbidden)
    return changed


def mask_top(model: Transformer, share: float) -> Transformer:
    """Return a copy of `model` in which each token may not choose the `share` of experts it scores highest.

    In every MoE layer it takes the K best of the rest (DeepSeekMoE, arXiv:2401.06066, Section 4.5 and Figure 4);
    share * E is rounded. Raises InputError if fewer than top_k experts would be left, or if experts are not chosen by
    score.
    """
    moe, changed = _chosen_by_score(model), deepcopy(model)
    require_number("share", share, 0.0, 1.0)
    masked = round(share * moe.n_routed_experts)
    left = moe.n_routed_experts - masked
    require(left >= moe.top_k, "share", share, f"leaves {left} experts, fewer than top_k = {moe.top_k}")
    for layer in changed.moe_layers:
        layer.router.forbidden = partial(_forbid_top, masked)
    return changed


def with_active(model: Transformer, top_k: int) -> Transformer:
    """Return a copy of `model` in which a token uses `top_k` routed experts (DeepSeekMoE Figure 5, at inference).

    Raises InputError, from the config, if a token cannot use that many.
    """
    moe = _chosen_by_score(model)
    second = moe.second_choice if top_k == moe.top_k else "all"
    return _rebuilt(model, replace(moe, top_k=top_k, second_choice=second))


def _rebuilt(model: Transformer, moe: MoEConfig) -> Transformer:
    """Return a model of another config with those weights of `model` that it uses; torch's random state stays."""
    with torch.random.fork_rng(devices=[]):
        changed = Transformer(replace(model.config, moe=moe)).to(model.embed.weight)
    weights = model.state_dict()
    changed.load_state_dict({name: weights[name] for name in changed.state_dict()})
    return changed.train(model.training)


def _chosen_by_score(model: Transformer) -> MoEConfig:
    moe = model.config.moe
    require(moe is not None, "moe", moe, "the model has no experts to choose from")
    assert moe is not None
    require(moe.scoring_func != "hash", "scoring_func", moe.scoring_func, "hash routing has no next best expert")
    require(moe.chooser == "token", "chooser", moe.chooser, "under expert choice a token has no next best expert")
    return moe


def _forbid_these(forbidden: Tensor, scores: Tensor) -> Tensor:
    return forbidden.to(scores.device).expand_as(scores)


def _forbid_top(n: int, scores: Tensor) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, ordered_topk(scores, n), True)


def _drop_ranks(ranks: list[int], router: Any, inputs: Any, routing: Routing) -> Routing:
    kept = routing.kept.clone()
    kept[:, ranks] = False
    return replace(routing, kept=kept)
