"""Routing against token-by-token loops written from the papers."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_lite.config import MoEConfig
from dsmoe_lite.errors import InputError
from dsmoe_lite.layers.capacity import capacity, place_in_expert
from dsmoe_lite.layers.router import Router
from dsmoe_lite.layers.selection import ordered_topk

GSHARD = MoEConfig(8, 2, 16, norm_topk_prob=True, second_choice="random", capacity_factor=1.0, eval_capacity_factor=1.5)


def make_router(config: MoEConfig, d_model: int = 12, spread: float = 1.0) -> Router:
    router = Router(d_model, config, vocab_size=64).double()
    if config.scoring_func == "softmax":
        torch.nn.init.normal_(router.weight, std=spread)
    return router


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
    config = MoEConfig(2, 2, 16, norm_topk_prob=True, second_choice="random")
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
    router, x = make_router(MoEConfig(8, 1, 16)), torch.randn(30, 12, dtype=torch.float64)
    routing = router(x, (1, 30))
    p = (x @ router.weight.T).softmax(dim=-1)
    torch.testing.assert_close(routing.gates[:, 0], p.max(dim=-1).values)
    routing.gates.sum().backward()
    assert router.weight.grad is not None
    assert router.weight.grad.abs().sum() > 0


def test_deepseekmoe_gates_are_not_renormalised() -> None:
    torch.manual_seed(0)
    router, x = make_router(MoEConfig(16, 4, 16)), torch.randn(30, 12, dtype=torch.float64)
    routing = router(x, (1, 30))
    p = (x @ router.weight.T).softmax(dim=-1)
    torch.testing.assert_close(routing.gates, p.sort(dim=-1, descending=True).values[:, :4])


def test_hash_routing_reads_only_the_token_id_and_spreads_the_vocabulary_evenly() -> None:
    router = make_router(MoEConfig(8, 1, 16, scoring_func="hash"))
    ids = torch.arange(64)
    first = router(torch.randn(64, 12), (1, 64), ids)
    second = router(torch.randn(64, 12), (1, 64), ids)
    assert torch.equal(first.topk_ids, second.topk_ids)
    assert torch.equal(first.topk_ids[:, 0].bincount(), torch.full((8,), 8))
    assert torch.equal(first.gates, torch.ones(64, 1))
    assert list(router.parameters()) == []
    with pytest.raises(InputError, match="the id of every token"):
        router(torch.randn(64, 12), (1, 64))


def test_ties_go_to_the_lower_id() -> None:
    assert ordered_topk(torch.zeros(5, 32), 3).tolist() == [[0, 1, 2]] * 5
    assert ordered_topk(torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]]), 4).tolist() == [[1, 2, 4, 3]]


def test_logits_are_float32_even_for_bfloat16_input() -> None:
    router = Router(12, MoEConfig(8, 2, 16), 64).bfloat16()
    assert router(torch.randn(4, 12, dtype=torch.bfloat16), (1, 4)).logits.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        routing = Router(12, MoEConfig(8, 2, 16), 64)(torch.randn(4, 12), (1, 4))
    assert routing.logits.dtype == routing.scores.dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.data())
def test_place_counts_all_first_choices_before_any_second(T: int, E: int, data: st.DataObject) -> None:
    K = data.draw(st.integers(1, E))
    rows = [data.draw(st.permutations(range(E)))[:K] for _ in range(T)]
    expected, seen = [[0] * K for _ in range(T)], [0] * E
    for k in range(K):
        for t in range(T):
            expected[t][k] = seen[rows[t][k]]
            seen[rows[t][k]] += 1
    assert place_in_expert(torch.tensor(rows), E).tolist() == expected


def test_capacity_is_gshards_2n_over_ge_at_factor_one() -> None:
    assert capacity(n_tokens=1024, top_k=2, n_experts=16, factor=1.0) == 2 * 1024 // 16
    assert capacity(n_tokens=100, top_k=1, n_experts=16, factor=1.25) == 8  # 7.8125, rounded up
