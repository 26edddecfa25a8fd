"""Routing against token-by-token loops written from the papers."""

import math
from dataclasses import replace

import pytest
import torch
from routing_by_hand import decide

from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.config import AttentionConfig, ModelConfig, MoEConfig
from dsmoe_lite.layers.balance import load_loss
from dsmoe_lite.layers.router import Router, hash_table
from dsmoe_lite.model import Transformer

GSHARD = MoEConfig(
    n_routed_experts=8,
    top_k=2,
    expert_width=16,
    norm_topk_prob=True,
    second_choice="random",
    capacity_factor=1.0,
    eval_capacity_factor=1.5,
)


def make_router(config: MoEConfig, d_model: int = 12, spread: float = 1.0) -> Router:
    router = Router(d_model, config, vocab_size=64).double()
    if config.scoring_func != "hash":
        torch.nn.init.normal_(router.weight, std=spread)
    return router


# Every design against the loop: experts, gates, and the gradient of the gates

V2 = MoEConfig(n_routed_experts=16, top_k=4, expert_width=16, n_group=4, topk_group=2, routed_scaling_factor=16.0)
V3 = MoEConfig(
    n_routed_experts=16,
    top_k=4,
    expert_width=16,
    scoring_func="sigmoid",
    expert_bias=True,
    norm_topk_prob=True,
    n_group=4,
    topk_group=2,
    group_score="top2",
    routed_scaling_factor=2.5,
)
V4 = MoEConfig(
    n_routed_experts=16,
    top_k=6,
    expert_width=16,
    scoring_func="sqrtsoftplus",
    expert_bias=True,
    norm_topk_prob=True,
    routed_scaling_factor=1.5,
    swiglu_limit=10.0,
)
DESIGNS = {
    "switch": MoEConfig(n_routed_experts=8, top_k=1, expert_width=16),
    "mixtral": MoEConfig(n_routed_experts=8, top_k=2, expert_width=16, norm_topk_prob=True),
    "deepseekmoe": MoEConfig(n_routed_experts=16, top_k=4, expert_width=16),
    "deepseek-v2": V2,
    "deepseek-v2, normalised as its code": replace(V2, norm_topk_prob=True, scale_normalised=False),
    "deepseek-v2, scale_normalised without normalising": replace(V2, scale_normalised=False),
    "deepseek-v3": V3,
    "deepseek-v4": V4,
    "deepseek-v4, hash layer": V4.for_hash_layer(),
    "a table and a capacity of V3's scores": replace(V3.for_hash_layer(), routed_scaling_factor=1.0),
    "sigmoid": MoEConfig(n_routed_experts=16, top_k=4, expert_width=16, scoring_func="sigmoid"),
    "softmax with a bias": MoEConfig(n_routed_experts=16, top_k=4, expert_width=16, expert_bias=True),
    "every expert": MoEConfig(n_routed_experts=4, top_k=4, expert_width=16, norm_topk_prob=True),
    "expert choice": MoEConfig(
        n_routed_experts=8, top_k=2, expert_width=16, chooser="expert", routed_scaling_factor=2.0
    ),
    "expert choice, sigmoid": MoEConfig(
        n_routed_experts=8, top_k=3, expert_width=16, chooser="expert", scoring_func="sigmoid"
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", DESIGNS)
def test_a_design_is_the_loop_over_tokens(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    config = DESIGNS[name]
    router, x = make_router(config), torch.randn(30, 12, dtype=torch.float64)
    bias = None
    if config.expert_bias:
        bias = router.expert_bias.normal_(std=0.5).tolist()  # negative ones too
    token_ids = torch.randint(64, (30,))
    tabled = router.hash_table[token_ids].tolist() if config.chooser == "hash" else None
    routing = router.train(seed > 0)(x, (3, 10), token_ids)  # neither mode changes anything here
    logits = torch.stack([router.weight @ row for row in x])
    expected = decide(config, logits, (3, 10), training=seed > 0, bias=bias, tabled=tabled)
    most = max(map(len, expected.chosen))
    assert routing.topk_ids.tolist() == [ids + [-1] * (most - len(ids)) for ids in expected.chosen]
    scores = torch.stack([torch.stack(row) for row in expected.scores])
    gates = torch.stack([torch.stack(row + [torch.zeros(()).double()] * (most - len(row))) for row in expected.gates])
    torch.testing.assert_close(routing.logits, logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(routing.scores, scores, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(routing.gates, gates, rtol=1e-12, atol=1e-15)
    assert routing.kept.tolist() == (routing.topk_ids >= 0).tolist()
    assert routing.batch_shape == (3, 10)
    assert routing.clean_logits is routing.noise_scale is None
    there = routing.to("meta")
    assert {there.scores.device.type, there.topk_ids.device.type, there.kept.device.type} == {"meta"}
    assert (there.batch_shape, there.clean_logits) == (routing.batch_shape, None)
    target = torch.randn_like(gates)
    (mine,) = torch.autograd.grad((routing.gates * target).sum(), router.weight)
    (theirs,) = torch.autograd.grad((gates * target).sum(), router.weight)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    counts = [sum(e in ids for ids in expected.chosen) for e in range(config.n_routed_experts)]
    assert routing.counts.tolist() == counts


@pytest.mark.parametrize("seed", range(3))
def test_normalised_gates_are_the_softmax_over_the_kept_logits(seed: int) -> None:
    """Mixtral's order, top-k then softmax, is GShard's normalisation: exp(x_i) / sum over the kept of exp(x_j)."""
    torch.manual_seed(seed)
    router, x = make_router(DESIGNS["mixtral"], spread=3.0), torch.randn(30, 12, dtype=torch.float64)
    routing = router(x, (1, 30))
    kept = torch.full((30, 8), -math.inf, dtype=torch.float64)
    kept.scatter_(1, routing.topk_ids, routing.logits.gather(1, routing.topk_ids))
    torch.testing.assert_close(routing.gates, kept.softmax(dim=1).gather(1, routing.topk_ids), rtol=1e-12, atol=0)


def test_the_bias_chooses_and_is_in_no_gate() -> None:
    torch.manual_seed(0)
    router, x = make_router(V3), torch.randn(200, 12, dtype=torch.float64)
    router.expert_bias.zero_()
    before = router(x, (1, 200))
    router.expert_bias += 7.0  # the same for all: nothing changes
    same = router(x, (1, 200))
    assert torch.equal(before.topk_ids, same.topk_ids)
    assert torch.equal(before.gates, same.gates)
    router.expert_bias[5] += 10.0
    after = router(x, (1, 200))
    assert (after.topk_ids[:, 0] == 5).all()
    torch.testing.assert_close(after.gates.sum(dim=1), torch.full((200,), 2.5, dtype=torch.float64))
    assert torch.equal(after.scores, before.scores)
    assert not router.expert_bias.requires_grad
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert "expert_bias" in router.state_dict()


def test_a_group_with_negative_biased_scores_is_left_for_none_that_is_masked() -> None:
    torch.manual_seed(0)
    router, x = make_router(V3), torch.randn(50, 12, dtype=torch.float64)
    router.expert_bias.fill_(-3.0)  # every biased score is below 0, the value that some code masks with
    groups = router(x, (1, 50)).topk_ids // 4
    assert all(len(set(row)) <= 2 for row in groups.tolist())


# Noise


NOISY = MoEConfig(n_routed_experts=8, top_k=3, expert_width=16, noisy_gating=True, norm_topk_prob=True)


@pytest.mark.parametrize("seed", range(3))
def test_noisy_top_k_is_shazeers(seed: int) -> None:
    torch.manual_seed(seed)
    router, x = make_router(NOISY).train(), torch.randn(30, 12, dtype=torch.float64)
    torch.nn.init.normal_(router.noise)
    torch.manual_seed(seed + 100)
    routing = router(x, (1, 30))
    torch.manual_seed(seed + 100)
    epsilon = torch.randn(30, 8, dtype=torch.float64)
    for t in range(30):
        clean = [(router.weight[e] @ x[t]).item() for e in range(8)]
        scale = [math.log1p(math.exp((router.noise[e] @ x[t]).item())) for e in range(8)]
        noisy = [c + float(n) * s for c, n, s in zip(clean, epsilon[t], scale, strict=True)]
        best = sorted(range(8), key=lambda e: -noisy[e])[:3]
        total = sum(math.exp(noisy[e]) for e in best)
        assert routing.topk_ids[t].tolist() == best
        assert routing.gates[t].tolist() == pytest.approx([math.exp(noisy[e]) / total for e in best], rel=1e-10)
        assert routing.clean_logits[t].tolist() == pytest.approx(clean, rel=1e-10)
        assert routing.noise_scale[t].tolist() == pytest.approx(scale, rel=1e-10)
        assert routing.logits[t].tolist() == pytest.approx(noisy, rel=1e-10)
    routing.gates.square().sum().backward()
    assert router.noise.grad.abs().sum() > 0


def test_noise_is_in_the_scores_of_a_sigmoid_too() -> None:
    torch.manual_seed(0)
    router = make_router(replace(NOISY, scoring_func="sigmoid")).train()
    routing = router(torch.randn(30, 12, dtype=torch.float64), (1, 30))
    assert not torch.equal(routing.logits, routing.clean_logits)
    torch.testing.assert_close(routing.scores, 1 / (1 + torch.exp(-routing.logits)), rtol=1e-12, atol=0)


def test_noise_is_for_training() -> None:
    torch.manual_seed(0)
    router, x = make_router(NOISY), torch.randn(30, 12, dtype=torch.float64)
    assert not torch.equal(router.train()(x, (1, 30)).logits, router(x, (1, 30)).logits)
    routing = router.eval()(x, (1, 30))
    assert torch.equal(routing.logits, torch.nn.functional.linear(x, router.weight))
    assert routing.clean_logits is routing.noise_scale is None


def test_noise_starts_at_the_same_size_for_all() -> None:
    model = Transformer(
        ModelConfig(
            vocab_size=50,
            d_model=12,
            n_layers=2,
            attention=AttentionConfig(n_heads=2, head_dim=6),
            ffn_width=16,
            moe=NOISY,
        )
    ).train()
    for routing in model(torch.randint(0, 50, (2, 9))).routings:
        torch.testing.assert_close(routing.noise_scale, torch.full((18, 8), math.log(2)))


# Numbers that are no numbers


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight", "noise"])
def test_logits_that_are_not_finite_name_the_layer(where: str, value: float) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=50,
        d_model=12,
        n_layers=4,
        attention=AttentionConfig(n_heads=2, head_dim=6),
        ffn_width=16,
        moe=NOISY,
        n_dense_layers=1,
    )
    model = Transformer(config).train()
    with torch.no_grad():
        getattr(model.moe_layers[1].router, where)[3, 2] = value
    with pytest.raises(RunError, match="router logits of layer 2: NaN or infinite; check the input") as error:
        model(torch.randint(0, 50, (2, 9)))
    assert "\n" not in str(error.value)


def test_expert_choice_looks_at_later_tokens() -> None:
    torch.manual_seed(0)
    router = make_router(MoEConfig(n_routed_experts=4, top_k=1, expert_width=16, chooser="expert"))
    x = torch.randn(12, 12, dtype=torch.float64)
    before = router(x, (1, 12))
    x[6:] *= 8
    after = router(x, (1, 12))
    assert torch.equal(before.scores[:6], after.scores[:6])
    assert not torch.equal(before.topk_ids[:6], after.topk_ids[:6])
    assert before.counts.tolist() == after.counts.tolist() == [3, 3, 3, 3]


# GShard, Switch and hash routing


def gshard_by_hand(scores: list[list[float]], slots: int, draws: list[float]) -> dict[tuple[int, int], float]:
    """GShard's Algorithm 1, a token at a time: {(token, expert): gate} of what is sent."""
    count = [0] * len(scores[0])
    sent, chosen = {}, []
    for token, row in enumerate(scores):
        first = row.index(max(row))
        second = row.index(max(value for e, value in enumerate(row) if e != first))
        g1, g2 = row[first], row[second]
        chosen.append((second, g2 / (g1 + g2)))
        if count[first] < slots:
            sent[token, first] = g1 / (g1 + g2)
        count[first] += 1
    for token, (second, g2) in enumerate(chosen):
        if count[second] < slots and 2 * g2 > draws[token]:
            sent[token, second] = g2
        count[second] += 1
    return sent


@pytest.mark.parametrize("seed", range(5))
def test_gshard_sends_what_algorithm_1_sends(seed: int) -> None:
    torch.manual_seed(seed)
    router, x = make_router(GSHARD, spread=2.0).train(), torch.randn(40, 12, dtype=torch.float64)
    torch.manual_seed(seed + 100)
    routing = router(x, (1, 40))
    torch.manual_seed(seed + 100)
    draws = torch.rand(40, dtype=torch.float64).tolist()
    scores = (x @ router.weight.T).softmax(dim=-1).tolist()
    expected = gshard_by_hand(scores, slots=math.ceil(40 * 2 / 8), draws=draws)
    got = {
        (t, int(routing.topk_ids[t, k])): float(routing.gates[t, k].detach())
        for t in range(40)
        for k in range(2)
        if routing.kept[t, k]
    }
    assert got.keys() == expected.keys()
    assert len(got) < 80, "the case should drop something"
    for pair, gate in expected.items():
        assert got[pair] == pytest.approx(gate, rel=1e-12)


def test_evaluation_uses_its_own_capacity_and_every_second_choice() -> None:
    torch.manual_seed(0)
    config = replace(GSHARD, eval_capacity_factor=None)
    router, x = make_router(config, spread=2.0), torch.randn(40, 12, dtype=torch.float64)
    assert not router.train()(x, (1, 40)).kept.all()
    assert router.eval()(x, (1, 40)).kept.all()


def test_random_second_choice_is_kept_with_probability_twice_its_gate() -> None:
    config = MoEConfig(n_routed_experts=2, top_k=2, expert_width=16, norm_topk_prob=True, second_choice="random")
    router = make_router(config)
    gate = 0.2  # of the second expert
    with torch.no_grad():
        router.weight.zero_()
        router.weight[0, 0] = math.log((1 - gate) / gate)
    x = torch.zeros(20_000, 12, dtype=torch.float64)
    x[:, 0] = 1
    torch.manual_seed(3)
    kept = router.train()(x, (1, 20_000)).kept
    assert kept[:, 0].all()
    share = float(kept[:, 1].double().mean())
    assert abs(share - 2 * gate) < 4 * math.sqrt(2 * gate * (1 - 2 * gate) / 20_000)


def test_switch_gate_is_the_probability_itself() -> None:
    torch.manual_seed(0)
    router, x = (
        make_router(MoEConfig(n_routed_experts=8, top_k=1, expert_width=16)),
        torch.randn(30, 12, dtype=torch.float64),
    )
    routing = router(x, (1, 30))
    p = (x @ router.weight.T).softmax(dim=-1)
    torch.testing.assert_close(routing.gates[:, 0], p.max(dim=-1).values)
    routing.gates.sum().backward()
    assert router.weight.grad is not None
    assert router.weight.grad.abs().sum() > 0


def test_deepseekmoe_gates_are_not_renormalised() -> None:
    torch.manual_seed(0)
    router, x = (
        make_router(MoEConfig(n_routed_experts=16, top_k=4, expert_width=16)),
        torch.randn(30, 12, dtype=torch.float64),
    )
    routing = router(x, (1, 30))
    p = (x @ router.weight.T).softmax(dim=-1)
    torch.testing.assert_close(routing.gates, p.sort(dim=-1, descending=True).values[:, :4])


def test_hash_routing_reads_only_the_token_id_and_spreads_the_vocabulary_evenly() -> None:
    router = make_router(MoEConfig(n_routed_experts=8, top_k=1, expert_width=16, scoring_func="hash"))
    ids = torch.arange(64)
    first = router(torch.randn(64, 12), (1, 64), ids)
    second = router(torch.randn(64, 12), (1, 64), ids)
    assert torch.equal(first.topk_ids, second.topk_ids)
    assert torch.equal(first.topk_ids[:, 0].bincount(), torch.full((8,), 8))
    assert torch.equal(first.gates, torch.ones(64, 1))
    assert list(router.parameters()) == []
    table = Router(
        12, MoEConfig(n_routed_experts=16, top_k=1, expert_width=16, scoring_func="hash"), vocab_size=1003
    ).hash_table
    assert set(table.bincount().tolist()) == {1003 // 16, 1003 // 16 + 1}
    for wrong in (None, ids[:-1], ids[None]):
        with pytest.raises(InputError, match=r"token_ids = .*: hash routing needs the id of each of 64 tokens"):
            router(torch.randn(64, 12), (1, 64), wrong)
    with pytest.raises(InputError, match="vocab_size = 15: must be at least n_routed_experts = 16"):
        Router(12, MoEConfig(n_routed_experts=16, top_k=1, expert_width=16, scoring_func="hash"), vocab_size=15)


@pytest.mark.parametrize(("V", "E", "K"), [(1003, 16, 6), (1024, 64, 6), (5, 8, 8), (100, 7, 3), (3, 16, 1)])
def test_a_table_gives_every_token_id_k_different_experts_and_every_expert_its_share(V: int, E: int, K: int) -> None:
    table = hash_table(V, E, K, seed=0)
    assert table.shape == (V, K)
    assert all(len(set(row)) == K for row in table.tolist())
    assert 0 <= int(table.min()) <= int(table.max()) < E
    rounds = -(-V // (E // K))
    counts = table.flatten().bincount(minlength=E)
    assert int(counts.max()) <= rounds
    if E % K == 0:
        assert int(counts.min()) >= rounds - 1
    assert torch.equal(table, hash_table(V, E, K, seed=0))
    assert K == E or V < 10 or not torch.equal(table, hash_table(V, E, K, seed=1))


def test_a_hash_layer_chooses_by_token_id_and_weighs_by_input() -> None:
    torch.manual_seed(0)
    router = make_router(V4.for_hash_layer())
    ids = torch.arange(64)
    first, second = (router(torch.randn(64, 12, dtype=torch.float64), (8, 8), ids) for _ in range(2))
    table = router.hash_table.sort(dim=1).values
    assert torch.equal(first.topk_ids.sort(dim=1).values, table)
    assert torch.equal(second.topk_ids.sort(dim=1).values, table)
    assert not torch.equal(first.gates, second.gates)
    torch.testing.assert_close(first.gates.sum(dim=1), torch.full((64,), 1.5, dtype=torch.float64))
    assert torch.equal(first.gates, first.gates.sort(dim=1, descending=True).values)  # best first
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert "expert_bias" not in router.state_dict()
    with pytest.raises(InputError, match="token_ids = None: hash routing needs the id of each of 64 tokens"):
        router(torch.randn(64, 12), (8, 8))


def test_the_root_of_softplus_has_a_gradient_everywhere() -> None:
    router = Router(1, replace(V4, n_routed_experts=2, top_k=2), 8)
    for x in (-200.0, -60.0, -1.0, 0.0, 30.0, 200.0):
        router.zero_grad()
        torch.nn.init.ones_(router.weight)
        routing = router(torch.tensor([[x]]), (1, 1))
        assert (routing.scores > 0).all()
        routing.gates[0, 0].backward()
        assert router.weight.grad is not None
        assert router.weight.grad.isfinite().all(), x
    exact = math.sqrt(math.log1p(math.exp(-1.0)))
    assert router(torch.tensor([[-1.0]]), (1, 1)).scores[0, 0].item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(("E", "K", "scale", "mass"), [(64, 6, 1.0, 0.094), (160, 6, 16.0, 0.6)])
def test_gate_mass_of_a_fresh_router_in_16b_and_v2(E: int, K: int, scale: float, mass: float) -> None:
    router = Router(12, MoEConfig(n_routed_experts=E, top_k=K, expert_width=16, routed_scaling_factor=scale), 64).eval()
    gates = router(torch.zeros(5, 12), (1, 5)).gates  # all logits are 0
    assert gates.sum(dim=1).tolist() == pytest.approx([mass] * 5, abs=5e-4)


def test_a_router_that_has_lost_its_noise_still_has_a_load_gradient() -> None:
    router = Router(
        4, MoEConfig(n_routed_experts=8, top_k=2, expert_width=4, noisy_gating=True, norm_topk_prob=True), 16
    )
    torch.nn.init.constant_(router.noise, -100.0)  # softplus(-400) is 0 in float32
    load_loss(router(torch.ones(6, 4), (1, 6))).backward()
    for weight in router.parameters():
        assert weight.grad is not None
        assert weight.grad.isfinite().all()


def test_logits_are_float32_even_for_bfloat16_input() -> None:
    router = Router(12, MoEConfig(n_routed_experts=8, top_k=2, expert_width=16), 64).bfloat16()
    assert router(torch.randn(4, 12, dtype=torch.bfloat16), (1, 4)).logits.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        routing = Router(12, MoEConfig(n_routed_experts=8, top_k=2, expert_width=16), 64)(torch.randn(4, 12), (1, 4))
    assert routing.logits.dtype == routing.scores.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("E", [3, 7, 11, 16, 33])
def test_equal_logits_tie_wherever_they_are_in_the_batch(E: int, scoring_func: str, dtype: torch.dtype) -> None:
    router = Router(1, MoEConfig(n_routed_experts=E, top_k=2, expert_width=4, scoring_func=scoring_func), 8).to(dtype)
    torch.nn.init.ones_(router.weight)
    for T in (1, 3, 5, 64, 4001):
        for x in (-0.48216742, 0.1, 1.7, -3.3):
            routing = router(torch.full((T, 1), x, dtype=dtype), (1, T))
            assert torch.equal(routing.topk_ids, torch.tensor([[0, 1]]).expand(T, 2))
            assert (routing.gates == routing.gates[0, 0]).all()


def test_hash_routing_names_an_input_that_is_not_finite() -> None:
    router = Router(2, MoEConfig(n_routed_experts=2, top_k=1, expert_width=4, scoring_func="hash"), 8, layer=3)
    with pytest.raises(RunError, match="router input of layer 3: NaN or infinite"):
        router(torch.tensor([[1.0, float("nan")]]), (1, 1), torch.tensor([1]))
