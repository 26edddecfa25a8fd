"""Bugs that are in published code: our code has a property, and the bug, written out here, does not have it.

Each is named as in data/published.json, under "discrepancies".
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsmoe_lite.config import AttentionConfig, ModelConfig, MoEConfig
from dsmoe_lite.layers.balance import expert_loss, switch_loss
from dsmoe_lite.layers.router import Router, Routing
from dsmoe_lite.layers.selection import limit_groups, ordered_topk
from dsmoe_lite.model import Output
from dsmoe_lite.study.published import load
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.objective import balance_terms

NAMES = {"hf-aux-layer-concat", "group-mask-fill", "bias-leak", "double-softmax"}


def test_each_is_a_recorded_discrepancy() -> None:
    assert {entry["id"] for entry in load()["discrepancies"]} >= NAMES


# hf-aux-layer-concat: counts of all layers are joined before they meet the probabilities


def collapsed_layers(E: int = 8, K: int = 2, T: int = 16) -> tuple[Routing, ...]:
    """Each layer sends every token to the same K experts, another K in each layer."""
    layers = []
    for start in range(0, E, K):
        logits = torch.full((T, E), -100.0, dtype=torch.float64)
        logits[:, start : start + K] = 0
        scores, ids = logits.softmax(dim=1), torch.arange(start, start + K).expand(T, K)
        layers.append(Routing(logits, scores, ids, scores.gather(1, ids), ids >= 0, (1, T)))
    return tuple(layers)


def per_layer(routings: tuple[Routing, ...]) -> float:
    model = ModelConfig(
        vocab_size=8,
        d_model=4,
        n_layers=len(routings),
        attention=AttentionConfig(n_heads=2, head_dim=2),
        ffn_width=4,
        moe=MoEConfig(n_routed_experts=8, top_k=2, expert_width=4),
    )
    config = TrainConfig(steps=1, balance={"expert": 1.0})
    return float(balance_terms(Output(torch.zeros(1), routings), model, config.balance)) / len(routings)


def joined(routings: tuple[Routing, ...]) -> float:
    scores, ids = torch.cat([r.scores for r in routings]), torch.cat([r.topk_ids for r in routings])
    return float(expert_loss(Routing(scores, scores, ids, scores, ids >= 0, (1, len(ids)))))


def sees_collapse(loss: Callable[[tuple[Routing, ...]], float]) -> bool:
    """Layers that collapsed, each on experts of its own, are not worth what balanced layers are."""
    return loss(collapsed_layers()) == pytest.approx(8 / 2)  # N / K; 1 at balance


def test_layers_are_taken_one_by_one() -> None:
    assert sees_collapse(per_layer)
    assert not sees_collapse(joined)
    assert joined(collapsed_layers()) == pytest.approx(1.0)  # as if all were balanced


def test_transformers_joins_its_layers() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layers = collapsed_layers()
    theirs = load_balancing_loss_func(tuple(r.logits for r in layers), num_experts=8, top_k=2)
    assert float(theirs) == pytest.approx(2 * joined(layers))


# group-mask-fill: groups out of reach are masked with 0.0, which wins against negative biased scores


def fill_with_zero(scores: Tensor) -> Tensor:
    allowed = limit_groups(scores, 4, 2, "top2") > -math.inf
    return ordered_topk(scores.masked_fill(~allowed, 0.0), 4)


def fill_with_minus_infinity(scores: Tensor) -> Tensor:
    return ordered_topk(limit_groups(scores, 4, 2, "top2"), 4)


def stays_in_reach(choose: Callable[[Tensor], Tensor], bias: float) -> bool:
    torch.manual_seed(0)
    scores = torch.rand(200, 16) + bias
    best = scores.view(200, 4, 4).topk(2, dim=-1).values.sum(dim=-1).topk(2, dim=1).indices  # (T, 2) groups
    return all(set(row) <= set(reach) for row, reach in zip((choose(scores) // 4).tolist(), best.tolist(), strict=True))


def test_no_expert_out_of_reach_is_chosen() -> None:
    assert stays_in_reach(fill_with_minus_infinity, bias=-1.0)
    assert not stays_in_reach(fill_with_zero, bias=-1.0)
    allowed = limit_groups(torch.rand(50, 16) - 1, 4, 2, "top2")
    wrong = fill_with_zero(allowed.nan_to_num(neginf=-5.0))  # the same groups are the best ones
    assert torch.isneginf(allowed.gather(1, wrong)).all()  # every one of them is out of reach
    assert stays_in_reach(fill_with_zero, bias=0.5)  # where the bug hides: biases of 0 and more


def test_the_router_stays_in_reach() -> None:
    torch.manual_seed(0)
    config = MoEConfig(
        n_routed_experts=16,
        top_k=4,
        expert_width=4,
        scoring_func="sigmoid",
        expert_bias=True,
        norm_topk_prob=True,
        n_group=4,
        topk_group=2,
        group_score="top2",
    )
    router, x = Router(8, config, 16), torch.randn(200, 8)
    router.expert_bias.fill_(-1.0)
    ids = router(x, (1, 200)).topk_ids
    assert torch.equal(ids, fill_with_minus_infinity((x @ router.weight.T).sigmoid() - 1))
    assert not torch.equal(ids, fill_with_zero((x @ router.weight.T).sigmoid() - 1))


# bias-leak: gates are gathered from the biased scores


def our_gates(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    config = MoEConfig(
        n_routed_experts=8, top_k=2, expert_width=4, scoring_func="sigmoid", expert_bias=True, norm_topk_prob=True
    )
    router = Router(6, config, 16)
    router.load_state_dict({"weight": weight, "expert_bias": bias})
    return router(x, (1, len(x))).gates


def leaking_gates(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    biased = (x @ weight.T).sigmoid() + bias
    gates = biased.topk(2, dim=1).values
    return gates / gates.sum(dim=1, keepdim=True)


def bias_only_chooses(gates: Callable[[Tensor, Tensor, Tensor], Tensor]) -> bool:
    """A bias that is equal for all changes no choice, and so may change no gate."""
    torch.manual_seed(0)
    x, weight = torch.randn(50, 6), torch.randn(8, 6)
    return torch.equal(gates(x, weight, torch.zeros(8)), gates(x, weight, torch.full((8,), 0.5)))


def test_the_bias_leaks_into_no_gate() -> None:
    assert bias_only_chooses(our_gates)
    assert not bias_only_chooses(leaking_gates)


# double-softmax: a loss takes the softmax of what the router's softmax already gave


def our_loss(logits: Tensor) -> Tensor:
    return switch_loss(routed(logits, logits.softmax(dim=1)))


def double_softmax_loss(logits: Tensor) -> Tensor:
    return switch_loss(routed(logits, logits.softmax(dim=1).softmax(dim=1)))


def routed(logits: Tensor, scores: Tensor) -> Routing:
    ids = ordered_topk(scores.detach(), 1)
    return Routing(logits, scores, ids, scores.gather(1, ids), ids >= 0, (1, len(ids)))


def collapse_costs_n(loss: Callable[[Tensor], Tensor], E: int = 64) -> bool:
    logits = torch.zeros(32, E, dtype=torch.float64)
    logits[:, 5] = 20
    return float(loss(logits)) == pytest.approx(E, rel=1e-3)


def gradient_is_switchs(loss: Callable[[Tensor], Tensor], E: int = 8, T: int = 32) -> bool:
    """d loss / d logit_tj = E / T * p_j (f_j - sum_i f_i p_i), with f the shares of first choices."""
    torch.manual_seed(0)
    logits = (2 * torch.randn(T, E, dtype=torch.float64)).requires_grad_()
    (got,) = torch.autograd.grad(loss(logits), logits)
    p = logits.detach().softmax(dim=1)
    f = torch.stack([(p.argmax(dim=1) == e).double().mean() for e in range(E)])
    return torch.allclose(got, E / T * p * (f - (p @ f).unsqueeze(1)), rtol=1e-9, atol=1e-12)


def test_probabilities_are_softmaxed_once() -> None:
    assert collapse_costs_n(our_loss)
    assert not collapse_costs_n(double_softmax_loss)
    assert gradient_is_switchs(our_loss)
    assert not gradient_is_switchs(double_softmax_loss)
    even = torch.zeros(32, 8, dtype=torch.float64)
    assert float(our_loss(even)) == pytest.approx(float(double_softmax_loss(even)))  # where the bug hides: balance
