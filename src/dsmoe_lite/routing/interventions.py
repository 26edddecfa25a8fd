"""A trained model with one thing about its experts changed, to see what that thing was worth."""

from collections.abc import Collection
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

from dsmoe_lite.errors import require, require_whole
from dsmoe_lite.layers.router import Routing
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
    config = replace(model.config, moe=replace(moe, n_shared_experts=0, top_k=moe.top_k + more_routed))
    changed = Transformer(config).to(model.embed.weight)
    changed.load_state_dict({name: value for name, value in model.state_dict().items() if ".shared." not in name})
    return changed.train(model.training)


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


def _leave_out(ranks: list[int], router: Any, inputs: Any, routing: Routing) -> Routing:
    kept = routing.kept.clone()
    kept[:, ranks] = False
    return replace(routing, kept=kept)
