"""Ablated models, and the contributions of experts, against a loop over tokens in float64."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import AttentionConfig, ModelConfig, MoEConfig
from dsmoe_lite.model import Transformer
from dsmoe_lite.routing.contributions import contributions
from dsmoe_lite.routing.interventions import mask_top, silence, swap_shared, switch_off, with_active

E, K, D, WIDTH, V = 6, 3, 8, 4, 50
MOE = MoEConfig(n_routed_experts=E, top_k=K, expert_width=WIDTH, n_shared_experts=2, routed_scaling_factor=3.0)
CONFIG = ModelConfig(
    vocab_size=V,
    d_model=D,
    n_layers=2,
    attention=AttentionConfig(n_heads=2, head_dim=4),
    ffn_width=16,
    moe=MOE,
    init_std=0.5,
)
SEEDS = pytest.mark.parametrize("seed", range(3))


def made(seed: int, config: ModelConfig = CONFIG) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(config).double().eval()


def layer_by_hand(layer, x, *, shared=True, left_out=(), top_k=K, disabled=(), masked=0):
    """Eq 9 token by token with the weights of `layer`; x (T, D).

    `left_out` are ranks among the chosen; `disabled` experts and a token's `masked` best experts cannot be chosen.
    """
    w, rows = layer.experts, []
    for u in x:
        scores = F.softmax(layer.router.weight @ u, dim=0).tolist()
        y = layer.shared(u) if shared else torch.zeros(D, dtype=x.dtype)
        ranked = sorted(range(E), key=lambda e: -scores[e])[masked:]
        for rank, e in enumerate([e for e in ranked if e not in disabled][:top_k]):
            if rank not in left_out:
                y = y + 3.0 * scores[e] * (w.down[e] @ (F.silu(w.gate[e] @ u) * (w.up[e] @ u)))
        rows.append(y)
    return torch.stack(rows)


@SEEDS
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("ranks", [(), (0,), (2,), (0, 2), (0, 1, 2)])
def test_silenced_experts_add_nothing(seed, shared, ranks):
    model = made(seed)
    changed = silence(model, shared=shared, ranks=ranks)
    x = torch.randn(1, 12, D, dtype=torch.float64)
    for layer, before in zip(changed.moe_layers, model.moe_layers, strict=True):
        torch.testing.assert_close(layer(x)[0][0], layer_by_hand(before, x[0], shared=not shared, left_out=ranks))


@SEEDS
@pytest.mark.parametrize("more", [0, 1, 3])
def test_more_routed_experts_in_place_of_the_shared_ones(seed, more):
    model = made(seed)
    changed = swap_shared(model, more)
    assert changed.config.moe == replace(MOE, n_shared_experts=0, top_k=K + more)
    x = torch.randn(1, 12, D, dtype=torch.float64)
    for layer, before in zip(changed.moe_layers, model.moe_layers, strict=True):
        torch.testing.assert_close(layer(x)[0][0], layer_by_hand(before, x[0], shared=False, top_k=K + more))


@SEEDS
@pytest.mark.parametrize("disabled", [(), (0,), (1, 4), (0, 2, 5)])
def test_experts_switched_off_are_replaced_by_the_next_best(seed, disabled):
    model = made(seed)
    changed = switch_off(model, {1: disabled})
    x = torch.randn(1, 12, D, dtype=torch.float64)
    for number, (layer, before) in enumerate(zip(changed.moe_layers, model.moe_layers, strict=True)):
        y, routing = layer(x)
        expected = disabled if number == 1 else ()
        torch.testing.assert_close(y[0], layer_by_hand(before, x[0], disabled=expected))
        assert not set(routing.topk_ids.flatten().tolist()) & set(expected)


@SEEDS
@pytest.mark.parametrize(("share", "masked"), [(0.0, 0), (0.2, 1), (1 / 3, 2), (0.5, 3)])
def test_the_best_experts_masked(seed, share, masked):
    model = made(seed)
    changed = mask_top(model, share)
    x = torch.randn(1, 12, D, dtype=torch.float64)
    for layer, before in zip(changed.moe_layers, model.moe_layers, strict=True):
        torch.testing.assert_close(layer(x)[0][0], layer_by_hand(before, x[0], masked=masked))


@SEEDS
@pytest.mark.parametrize("top_k", [1, 2, 3, E])
def test_other_numbers_of_active_experts(seed, top_k):
    model = made(seed)
    changed = with_active(model, top_k)
    x = torch.randn(1, 12, D, dtype=torch.float64)
    for layer, before in zip(changed.moe_layers, model.moe_layers, strict=True):
        torch.testing.assert_close(layer(x)[0][0], layer_by_hand(before, x[0], top_k=top_k))


def test_interventions_do_not_advance_the_random_state():
    model = made(0)
    before = torch.get_rng_state()
    for change in (lambda: with_active(model, 1), lambda: swap_shared(model, 1), lambda: silence(model, shared=True)):
        change()
        assert torch.equal(torch.get_rng_state(), before)


def test_masks_apply_before_group_limits_and_to_biased_choices():
    moe = replace(MOE, scoring_func="sigmoid", expert_bias=True, n_group=3, topk_group=2, norm_topk_prob=True)
    model = made(0, replace(CONFIG, moe=moe))
    for layer in model.moe_layers:
        layer.router.expert_bias.copy_(torch.tensor([5.0, 5.0, 0.0, 0.0, 0.0, 0.0]))
    x = torch.randn(1, 20, D, dtype=torch.float64)
    ids = switch_off(model, {0: (0, 1)}).moe_layers[0](x)[1].topk_ids
    assert set(ids.flatten().tolist()) == {2, 3, 4, 5}  # the group of 0 and 1 can no longer be chosen


@pytest.mark.parametrize("change", [partial(switch_off, experts={0: (1,)}), partial(mask_top, share=0.1),
                                    partial(with_active, top_k=2)])  # fmt: skip
def test_only_experts_chosen_by_score_have_a_next_best(change):
    hashed = Transformer(
        replace(CONFIG, moe=MoEConfig(n_routed_experts=E, top_k=1, expert_width=WIDTH, scoring_func="hash"))
    )
    choosing = Transformer(
        replace(CONFIG, moe=MoEConfig(n_routed_experts=E, top_k=2, expert_width=WIDTH, chooser="expert"))
    )
    for model, message in ((hashed, "scoring_func = 'hash'"), (choosing, "chooser = 'expert'"),
                           (Transformer(replace(CONFIG, moe=None)), "moe = None")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            change(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [(partial(switch_off, experts={2: (0,)}), "layer = 2: must be"),
     (partial(switch_off, experts={0: (E,)}), f"expert = {E}: must be"),
     (partial(switch_off, experts={0: range(E - K + 1)}), f"experts left = {K - 1}: must be"),
     (partial(mask_top, share=0.51), None), (partial(mask_top, share=0.7), "share = 0.7: leaves 2 experts"),
     (partial(mask_top, share=-0.1), "share = -0.1: must be"),
     (partial(with_active, top_k=E + 1), f"top_k = {E + 1}"), (partial(with_active, top_k=0), "top_k = 0")],
)  # fmt: skip
def test_out_of_range_arguments_are_refused(change, message):
    if message is None:
        change(made(0))
        return
    with pytest.raises(InputError, match=message):
        change(made(0))


@SEEDS
@pytest.mark.parametrize("training", [False, True])
def test_the_original_model_is_unchanged(seed, training):
    model = made(seed).train(training)
    tokens = torch.randint(V, (2, 9))
    with torch.no_grad():
        before = model(tokens).logits
        copies = [silence(model, shared=True), silence(model, ranks=(1,)), swap_shared(model, 2),
                  switch_off(model, {0: range(E - K)}), mask_top(model, 0.5), with_active(model, K + 1)]  # fmt: skip
        contributions(model, tokens)
        for changed in copies:
            assert changed.training == model.training == training
            assert not torch.allclose(changed(tokens).logits, before)
            for weight in changed.parameters():
                weight.zero_()  # the copies do not share weights with the model
        assert torch.equal(model(tokens).logits, before)
    assert not any(module._forward_hooks for module in model.modules())


@SEEDS
def test_contributions_are_the_two_sums_of_eq_9(seed):
    model = made(seed, replace(CONFIG, n_layers=3, n_dense_layers=1))
    tokens = torch.randint(V, (2, 9))
    inputs = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
             for layer in model.moe_layers]  # fmt: skip
    sums = contributions(model, tokens)
    for hook in hooks:
        hook.remove()
    assert len(sums) == len(inputs) == 2
    for (shared, routed), x, layer in zip(sums, inputs, model.moe_layers, strict=True):
        torch.testing.assert_close(shared, layer.shared(x))
        torch.testing.assert_close(routed, layer_by_hand(layer, x, shared=False))


def test_models_without_the_experts_in_question_are_refused():
    dense = Transformer(replace(CONFIG, moe=None))
    routed_only = Transformer(replace(CONFIG, moe=replace(MOE, n_shared_experts=0)))
    with pytest.raises(InputError, match="no experts"):
        silence(dense, ranks=(0,))
    for refused in (
        lambda: swap_shared(dense, 1),
        lambda: swap_shared(routed_only, 1),
        lambda: silence(routed_only, shared=True),
        lambda: contributions(routed_only, torch.zeros(1, 4, dtype=torch.long)),
        lambda: contributions(dense, torch.zeros(1, 4, dtype=torch.long)),
    ):
        with pytest.raises(InputError, match="n_shared_experts = 0"):
            refused()
    for rank in (-1, K, 1.0):
        with pytest.raises(InputError, match="rank"):
            silence(made(0), ranks=(rank,))
    with pytest.raises(InputError, match=f"top_k = {E + 1}"):
        swap_shared(made(0), E + 1 - K)


# Interventions compose: the layer by hand with both


def both_ways(first, second):
    return [lambda model: second(first(model)), lambda model: first(second(model))]


OFF, OFF_TOO = partial(switch_off, experts={0: (0, 2), 1: (0, 2)}), partial(switch_off, experts={0: (5,), 1: (5,)})
PAIRS = {
    "off, off": (OFF, OFF_TOO, {"disabled": (0, 2, 5)}),
    "off, active": (OFF, partial(with_active, top_k=2), {"disabled": (0, 2), "top_k": 2}),
    "masked, active": (partial(mask_top, share=1 / 6), partial(with_active, top_k=2), {"masked": 1, "top_k": 2}),
    "masked, masked": (partial(mask_top, share=1 / 6), partial(mask_top, share=1 / 3), {"masked": 2}),
    "off, silent": (OFF, partial(silence, ranks=(1,)), {"disabled": (0, 2), "left_out": (1,)}),
    "silent, silent": (partial(silence, ranks=(0,)), partial(silence, ranks=(2,)), {"left_out": (0, 2)}),
    "silent, without shared": (
        partial(silence, ranks=(0,)), partial(silence, shared=True), {"left_out": (0,), "shared": False}
    ),
    "off, swapped": (OFF, partial(swap_shared, more_routed=1), {"disabled": (0, 2), "shared": False, "top_k": 4}),
    "silent, swapped": (
        partial(silence, ranks=(0,)),
        partial(swap_shared, more_routed=2),
        {"left_out": (0,), "shared": False, "top_k": 5},
    ),
    "silent, fewer": (partial(silence, ranks=(0,)), partial(with_active, top_k=2), {"left_out": (0,), "top_k": 2}),
}  # fmt: skip


@SEEDS
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("name", PAIRS)
def test_two_interventions_both_hold(seed, order, name):
    *changes, expected = PAIRS[name]
    model = made(seed)
    changed = both_ways(*changes)[order](model)
    x = torch.randn(1, 12, D, dtype=torch.float64)
    for layer, before in zip(changed.moe_layers, model.moe_layers, strict=True):
        torch.testing.assert_close(layer(x)[0][0], layer_by_hand(before, x[0], **expected))


def test_a_masked_expert_that_is_off_counts_among_the_best():
    model = made(0)
    x = torch.randn(1, 30, D, dtype=torch.float64)
    ids = mask_top(OFF(model), 1 / 6).moe_layers[0](x)[1].topk_ids
    best = model.moe_layers[0](x)[1].topk_ids[:, :1]
    assert not (ids == best).any()
    assert not torch.isin(ids, torch.tensor([0, 2])).any()


def test_silencing_a_rank_that_no_token_has_left_changes_nothing_more():
    model, x = made(0), torch.randn(1, 12, D, dtype=torch.float64)
    fewer = with_active(silence(model, ranks=(2,)), 2)
    torch.testing.assert_close(fewer.moe_layers[0](x)[0], with_active(model, 2).moe_layers[0](x)[0])


def test_a_copy_keeps_what_a_user_set():
    model, calls = made(0), []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    model.blocks[0].attention.query.weight.requires_grad_(False)
    model.moe_layers[0].experts.backend = "loop"
    for change in (partial(with_active, top_k=2), partial(swap_shared, more_routed=0), OFF):
        changed = change(model)
        changed(torch.zeros(1, 3, dtype=torch.int64))
        assert calls.pop()
        assert not changed.blocks[0].attention.query.weight.requires_grad
        assert changed.moe_layers[0].experts.backend == "loop"
        assert not model.moe_layers[0].router.forbidden


def test_too_few_experts_left_by_two_interventions_are_refused():
    with pytest.raises(InputError, match=f"experts left = {K - 1}: must be"):
        switch_off(OFF(made(0)), {0: (1, 3)})
    masked = mask_top(switch_off(made(0), {0: (0, 1, 2)}), 0.5)
    with pytest.raises(InputError, match="experts left = "):
        masked(torch.arange(40).view(1, -1))


def test_numpy_numbers_name_experts():
    x, model = torch.randn(1, 12, D, dtype=torch.float64), made(0)
    named = switch_off(model, {np.int64(0): np.array([0, 2])})
    assert torch.equal(named.moe_layers[0](x)[0], OFF(model).moe_layers[0](x)[0])
