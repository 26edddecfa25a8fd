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
from dsmoe_lite.routing.interventions import (
    freeze_gate_norm,
    mask_top,
    silence,
    swap_shared,
    switch_off,
    with_active,
)

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


def layer_by_hand(
    layer, x, *, shared=True, left_out=(), mute=(), top_k=K, disabled=(), masked=0, norm="none", factor=3.0
):
    """Eq 9 token by token with the weights of `layer`; x (T, D).

    `left_out` are ranks among the chosen, `mute` experts; `disabled` experts and a token's `masked` best experts cannot
    be chosen. Gates are divided by the sum of the chosen scores with norm "chosen", and by the sum of the `top_k` best
    of all scores with norm "frozen".
    """
    w, rows = layer.experts, []
    for u in x:
        scores = F.softmax(layer.router.weight @ u, dim=0).tolist()
        y = layer.shared(u) if shared else torch.zeros(D, dtype=x.dtype)
        ranked = sorted(range(E), key=lambda e: -scores[e])
        chosen = [e for e in ranked[masked:] if e not in disabled][:top_k]
        divisor = sum(scores[e] for e in {"none": [], "chosen": chosen, "frozen": ranked[:top_k]}[norm]) or 1.0
        for rank, e in enumerate(chosen):
            if rank not in left_out and e not in mute:
                gate = factor * scores[e] / divisor
                y = y + gate * (w.down[e] @ (F.silu(w.gate[e] @ u) * (w.up[e] @ u)))
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
@pytest.mark.parametrize("muted", [(), (0,), (1, 4), range(E)])
def test_experts_silenced_by_name_add_nothing_and_nobody_replaces_them(seed, muted):
    model = made(seed)
    changed = silence(model, experts={1: muted})
    x = torch.randn(1, 12, D, dtype=torch.float64)
    for number, (layer, before) in enumerate(zip(changed.moe_layers, model.moe_layers, strict=True)):
        y, routing = layer(x)
        torch.testing.assert_close(y[0], layer_by_hand(before, x[0], mute=muted if number == 1 else ()))
        assert torch.equal(routing.topk_ids, before(x)[1].topk_ids)
        assert torch.equal(routing.gates, before(x)[1].gates)


def test_experts_can_be_silenced_under_hash_routing_and_expert_choice():
    tokens = torch.randint(V, (2, 9))
    for moe in (
        MoEConfig(n_routed_experts=E, top_k=1, expert_width=WIDTH, scoring_func="hash"),
        MoEConfig(n_routed_experts=E, top_k=2, expert_width=WIDTH, chooser="expert"),
    ):
        model = made(0, replace(CONFIG, moe=moe))
        found = silence(model, experts={0: (1, 2)})(tokens).routings
        expected = model(tokens).routings[0]
        assert torch.equal(found[0].kept, expected.kept & (expected.topk_ids != 1) & (expected.topk_ids != 2))
        assert found[0].kept.any()
        assert not torch.equal(found[0].kept, expected.kept)
        if moe.chooser == "token":  # the other layer is as it was
            assert found[1].kept.all()


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


DIVIDED = replace(CONFIG, moe=replace(MOE, norm_topk_prob=True, scale_normalised=True))  # gates sum to 3
UNSCALED = replace(CONFIG, moe=replace(MOE, norm_topk_prob=True, routed_scaling_factor=1.0))


@SEEDS
@pytest.mark.parametrize(("config", "factor"), [(DIVIDED, 3.0), (UNSCALED, 1.0)])
@pytest.mark.parametrize("disabled", [(), (0,), (1, 4), (0, 2, 5)])
def test_gates_are_divided_by_the_sum_of_the_original_choice(seed, config, factor, disabled):
    model = made(seed, config)
    x = torch.randn(1, 12, D, dtype=torch.float64)
    for norm, freeze in (("chosen", lambda m: m), ("frozen", freeze_gate_norm)):
        changed = freeze(switch_off(model, {0: disabled, 1: disabled}))
        for layer, before in zip(changed.moe_layers, model.moe_layers, strict=True):
            expected = layer_by_hand(before, x[0], disabled=disabled, norm=norm, factor=factor)
            torch.testing.assert_close(layer(x)[0][0], expected)


@SEEDS
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_with_a_frozen_norm_no_gate_grows(seed, scoring_func):
    moe = replace(DIVIDED.moe, scoring_func=scoring_func)
    model = made(seed, replace(CONFIG, moe=moe)).float()
    off, x = switch_off(model, {0: (0, 3)}), torch.randn(1, 40, D)
    was, was_y = (value.squeeze(0) if isinstance(value, torch.Tensor) else value
                  for value in reversed(model.moe_layers[0](x)))  # fmt: skip

    def gate_of_each(routing):
        return torch.zeros(40, E).scatter_(1, routing.topk_ids, routing.gates)

    hit = torch.isin(was.topk_ids, torch.tensor([0, 3])).any(dim=1)
    assert 0 < hit.sum() < 40
    before = gate_of_each(was)
    stayed = (before > 0) & ~torch.isin(torch.arange(E), torch.tensor([0, 3]))
    y, routing = freeze_gate_norm(off).moe_layers[0](x)
    assert torch.equal(gate_of_each(routing)[stayed], before[stayed])
    assert (routing.gates.sum(dim=1)[hit] < 3.0 - 1e-3).all()
    assert torch.equal(y[0][~hit], was_y[~hit])  # exactly as it was
    grown = gate_of_each(off.moe_layers[0](x)[1])
    assert (grown[stayed & hit[:, None]] > before[stayed & hit[:, None]]).all()  # what it prevents


def test_a_frozen_norm_changes_nothing_without_division_or_without_forbidden_experts():
    tokens = torch.randint(V, (2, 9))
    off = switch_off(made(0), {0: (0, 3)})
    assert torch.equal(freeze_gate_norm(off)(tokens).logits, off(tokens).logits)
    divided = made(0, DIVIDED)
    assert torch.equal(freeze_gate_norm(divided)(tokens).logits, divided(tokens).logits)


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
                                    partial(with_active, top_k=2), freeze_gate_norm])  # fmt: skip
def test_only_experts_chosen_by_score_have_a_next_best(change):
    hashed = Transformer(
        replace(CONFIG, moe=MoEConfig(n_routed_experts=E, top_k=1, expert_width=WIDTH, scoring_func="hash"))
    )
    choosing = Transformer(
        replace(CONFIG, moe=MoEConfig(n_routed_experts=E, top_k=2, expert_width=WIDTH, chooser="expert"))
    )
    tabled = Transformer(replace(CONFIG, n_hash_layers=1, moe=MOE))
    if change is not freeze_gate_norm:  # which changes nothing in a hash layer
        with pytest.raises(InputError, match="top_k = 2" if change.func is with_active else "chooser = 'hash'"):
            change(tabled, **({"experts": {0: (1,)}} if change.func is switch_off else {}))
    for model, message in ((hashed, "scoring_func = 'hash'"), (choosing, "chooser = 'expert'"),
                           (Transformer(replace(CONFIG, moe=None)), "moe = None")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            change(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [(partial(switch_off, experts={2: (0,)}), "layer = 2: must be"),
     (partial(silence, experts={2: (0,)}), "layer = 2: must be"),
     (partial(silence, experts={0: (E,)}), f"expert = {E}: must be"),
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
        copies = [silence(model, shared=True), silence(model, ranks=(1,)), silence(model, experts={0: (1,)}),
                  swap_shared(model, 2), freeze_gate_norm(switch_off(model, {0: (0,)})),
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
    "mute, mute": (
        partial(silence, experts={0: (1,), 1: (1,)}),
        partial(silence, experts={0: (2,), 1: (2,)}),
        {"mute": (1, 2)},
    ),
    "off, mute": (OFF, partial(silence, experts={0: (1,), 1: (1,)}), {"disabled": (0, 2), "mute": (1,)}),
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


FROZEN_PAIRS = {
    "off": (OFF, {"disabled": (0, 2)}),
    "masked": (partial(mask_top, share=1 / 3), {"masked": 2}),
    "masked, off": (lambda model: OFF_TOO(mask_top(model, 1 / 6)), {"masked": 1, "disabled": (5,)}),
    "off, active": (lambda model: with_active(OFF(model), 2), {"disabled": (0, 2), "top_k": 2}),
    "off, silent": (lambda model: silence(OFF(model), ranks=(1,)), {"disabled": (0, 2), "left_out": (1,)}),
    "off, without shared": (lambda model: swap_shared(OFF(model), 0), {"disabled": (0, 2), "shared": False}),
}


@SEEDS
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("name", FROZEN_PAIRS)
def test_a_frozen_norm_and_another_intervention_both_hold(seed, order, name):
    change, expected = FROZEN_PAIRS[name]
    model = made(seed, DIVIDED)
    changed = both_ways(change, freeze_gate_norm)[order](model)
    x = torch.randn(1, 12, D, dtype=torch.float64)
    for layer, before in zip(changed.moe_layers, model.moe_layers, strict=True):
        torch.testing.assert_close(layer(x)[0][0], layer_by_hand(before, x[0], norm="frozen", **expected))


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
    muted = silence(model, experts={np.int64(0): np.array([0, 2])})
    assert torch.equal(muted.moe_layers[0](x)[0], silence(model, experts={0: (0, 2)}).moe_layers[0](x)[0])
