"""Ablations of a trained model: copies with experts removed, masked or exchanged, to measure what they were worth.

Interventions compose: each keeps those of the model it is given. `save_model` refuses a model with experts switched
off, masked or silenced, or with a frozen gate norm, because its file could not record them.
"""

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsmoe_lite.common.errors import require, require_int, require_number
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.layers.selection import ordered_topk
from dsmoe_lite.model import Transformer


@dataclass(frozen=True)
class SwitchedOff:
    """Forbid these experts to every token."""

    experts: frozenset[int]

    def __call__(self, scores: Tensor) -> Tensor:
        """scores (T, E) -> which experts are forbidden, bool (T, E)."""
        forbidden = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
        forbidden[sorted(self.experts)] = True
        return forbidden.expand_as(scores)


@dataclass(frozen=True)
class MaskedTop:
    """Forbid each token the n experts that it scores highest."""

    n: int

    def __call__(self, scores: Tensor) -> Tensor:
        """scores (T, E) -> which experts are forbidden, bool (T, E)."""
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, ordered_topk(scores, self.n), True)


def swap_shared(model: Transformer, more_routed: int) -> Transformer:
    """Return a copy of `model` without its shared experts and with top_k raised by `more_routed`.

    With `more_routed` = n_shared_experts a token uses as many expert weights as before: DeepSeekMoE
    (arXiv:2401.06066), Section 4.5. Raises InputError if there are no shared experts or too few routed ones.
    """
    moe = model.config.moe
    shared = 0 if moe is None else moe.n_shared_experts
    require(shared > 0, "n_shared_experts", shared, "the model has no shared experts to remove")
    assert moe is not None
    changed = _with_config(model, replace(moe, n_shared_experts=0, top_k=moe.top_k + more_routed))
    for layer in changed.all_moe_layers:
        layer.shared = None
    return changed


def silence(
    model: Transformer,
    *,
    shared: bool | Collection[int] = False,
    ranks: Collection[int] = (),
    experts: Mapping[int, Collection[int]] | None = None,
) -> Transformer:
    """Zero-ablation: return a copy of `model` in which some experts add nothing, as if their gates were 0.

    shared: the shared experts, of all MoE layers or of these. ranks: each token's chosen experts of these ranks, 0 the
    best, in every MoE layer. experts: {MoE layer: routed experts}, layers counted from 0 over the MoE layers. No other
    expert is chosen instead, and the other gates keep their values: the sum of DeepSeekMoE Eq 9 (arXiv:2401.06066)
    lacks these terms. Raises InputError if there are no shared experts to silence, if a rank is not below top_k, or for
    a layer or an expert that does not exist.
    """
    moe = model.config.moe
    require(moe is not None, "moe", moe, "the model has no experts to silence")
    assert moe is not None
    for rank in ranks:
        require_int("rank", rank, 0, moe.top_k - 1)
    changed = swap_shared(model, 0) if shared is True else deepcopy(model)
    for number in () if isinstance(shared, bool) else shared:
        require_int("layer", number, 0, len(changed.moe_layers) - 1)
        require(moe.n_shared_experts > 0, "n_shared_experts", 0, "the model has no shared experts to remove")
        changed.moe_layers[number].shared = None
    for layer in changed.moe_layers:
        layer.router.silenced |= set(ranks)
    for number, silenced in (experts or {}).items():
        _require_experts(changed, number, silenced)
        changed.moe_layers[number].router.silenced_experts |= set(map(int, silenced))
    return changed


def switch_off(model: Transformer, experts: Mapping[int, Collection[int]]) -> Transformer:
    """Return a copy of `model` in which no token may choose these experts; the next best experts replace them.

    experts: {MoE layer: experts}, layers counted from 0 over the MoE layers. Scores are not normalised again over the
    remaining experts, but gates are, in a model with `norm_topk_prob`: see `freeze_gate_norm`. Raises InputError for a
    layer or an expert that does not exist, if fewer than top_k experts would be left, or if experts are not chosen by
    score.
    """
    moe = _chosen_by_score(model.config.moe)
    changed, E = deepcopy(model), moe.n_routed_experts
    for layer, disabled in experts.items():
        _require_experts(changed, layer, disabled)
        router = changed.moe_layers[layer].router
        _chosen_by_score(router.config)
        router.forbidden += (SwitchedOff(frozenset(disabled)),)
        off = set().union(*(forbid.experts for forbid in router.forbidden if isinstance(forbid, SwitchedOff)))
        left = E - len(off)
        require(left >= moe.top_k, "experts left", left, f"must be at least top_k = {moe.top_k}: switch fewer off")
    return changed


def freeze_gate_norm(model: Transformer) -> Transformer:
    """Return a copy of `model` in which no gate grows because other experts are switched off or masked.

    A model with `norm_topk_prob` divides the K chosen scores by their sum. Forbidding experts lowers the sum, so the
    experts that stay, and those that replace the forbidden ones, get more weight than in a model that does not divide.
    The copy divides by the sum of the scores that the token would have chosen if nothing were forbidden: experts that
    stay keep their gates, a replacement gets its own score on the same scale, and a token that had chosen no forbidden
    expert gets exactly the same output from the layer. Without `norm_topk_prob` all of this holds already. Gates (T, K)
    may then sum to less than before. Apply it before or after `switch_off` and `mask_top`. Raises InputError if experts
    are not chosen by score.
    """
    _chosen_by_score(model.config.moe)
    changed = deepcopy(model)
    for layer in changed.moe_layers:
        layer.router.frozen_norm = True
    return changed


def mask_top(model: Transformer, share: float) -> Transformer:
    """Return a copy of `model` in which each token may not choose the `share` of experts it scores highest.

    In every MoE layer it takes the K best of the rest (DeepSeekMoE, arXiv:2401.06066, Section 4.5 and Figure 4);
    share * E is rounded. Experts that are switched off count among those it scores highest. Raises InputError if fewer
    than top_k experts would be left, or if experts are not chosen by score.
    """
    masked, changed = n_masked(model.config.moe, share), deepcopy(model)
    for layer in changed.moe_layers:
        _chosen_by_score(layer.router.config)
        layer.router.forbidden += (MaskedTop(masked),)
    return changed


def with_active(model: Transformer, top_k: int) -> Transformer:
    """Return a copy of `model` in which a token uses `top_k` routed experts (DeepSeekMoE Figure 5, at inference).

    Raises InputError, from the config, if a token cannot use that many.
    """
    return _with_config(model, active_config(model.config.moe, top_k))


def without_capacity(model: Transformer) -> Transformer:
    """Return a copy of `model` that drops no choice: in a short text a few slots per expert are soon full.

    Raises InputError for a dense model.
    """
    moe = model.config.moe
    require(moe is not None, "moe", moe, "the model has no experts with a capacity")
    assert moe is not None
    return _with_config(model, replace(moe, capacity_factor=None, eval_capacity_factor=None))


def n_masked(moe: MoEConfig | None, share: float) -> int:
    """How many experts `mask_top` masks. Raises its errors, without a model."""
    moe = _chosen_by_score(moe)
    require_number("share", share, 0.0, 1.0)
    masked = round(share * moe.n_routed_experts)
    left = moe.n_routed_experts - masked
    require(left >= moe.top_k, "share", share, f"leaves {left} experts, fewer than top_k = {moe.top_k}")
    return masked


def active_config(moe: MoEConfig | None, top_k: int) -> MoEConfig:
    """The config that `with_active` gives its model. Raises its errors, without a model."""
    moe = _chosen_by_score(moe)
    return replace(moe, top_k=top_k, second_choice=moe.second_choice if top_k == moe.top_k else "all")


def _with_config(model: Transformer, moe: MoEConfig) -> Transformer:
    """Return a copy of `model` with the routing config `moe`."""
    changed = deepcopy(model)
    changed.config = replace(model.config, moe=moe)
    for layer, config in zip(changed.all_moe_layers, changed.config.all_moe_layers, strict=True):
        fixed = config.chooser == "hash" and config.top_k != layer.router.config.top_k
        require(not fixed, "top_k", config.top_k, "must stay as it is: a table names the experts of a token")
        layer.router.config = config
    return changed


def _require_experts(model: Transformer, layer: int, experts: Collection[int]) -> None:
    """Require that this MoE layer, and these routed experts in it, exist."""
    assert model.config.moe is not None
    require_int("layer", layer, 0, len(model.moe_layers) - 1)
    for e in experts:
        require_int("expert", e, 0, model.config.moe.n_routed_experts - 1)


def _chosen_by_score(moe: MoEConfig | None) -> MoEConfig:
    require(moe is not None, "moe", moe, "the model has no experts to choose from")
    assert moe is not None
    require(moe.scoring_func != "hash", "scoring_func", moe.scoring_func, "hash routing has no next best expert")
    require(moe.chooser == "token", "chooser", moe.chooser, "a token has a next best expert only if its scores choose")
    return moe
