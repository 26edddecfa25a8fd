"""A trained model with one thing about its experts changed, to see what that thing was worth."""

from dataclasses import replace

from dsmoe_lite.errors import require
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
