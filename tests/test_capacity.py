"""What full experts and full groups drop, against loops written from GShard and DeepSeek-V2."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_by_hand import decide, within_experts

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.layers.capacity import capacity, exempt_tokens, group_budget, place_in_expert, within_budget
from dsmoe_lite.layers.router import Router, Routing
from dsmoe_lite.presets import preset

SWITCH = MoEConfig(n_routed_experts=8, top_k=1, expert_width=4, capacity_factor=1.25, eval_capacity_factor=2.0)
V2 = MoEConfig(
    n_routed_experts=12,
    top_k=3,
    expert_width=4,
    n_group=4,
    topk_group=2,
    group_capacity_factor=1.0,
    never_drop_share=0.25,
)


def routed(config: MoEConfig, batch_shape: tuple[int, int], seed: int, *, training: bool) -> tuple[Routing, Router]:
    torch.manual_seed(seed)
    router = Router(6, config, 64).double().train(training)
    torch.nn.init.normal_(router.weight, std=1.5)
    return router(torch.randn(math.prod(batch_shape), 6, dtype=torch.float64), batch_shape), router


def pairs(routing: Routing) -> set[tuple[int, int]]:
    rows, kept = routing.topk_ids.tolist(), routing.kept.tolist()
    return {(t, e) for t, ids in enumerate(rows) for k, e in enumerate(ids) if kept[t][k]}


def test_capacity_is_gshards_2n_over_ge_at_factor_one() -> None:
    assert capacity(n_tokens=1024, top_k=2, n_experts=16, factor=1.0) == 2 * 1024 // 16
    assert capacity(n_tokens=100, top_k=1, n_experts=16, factor=1.25) == 8  # 7.8125, rounded up
    assert capacity(n_tokens=0, top_k=2, n_experts=16, factor=1.25) == 0


def test_group_budget_is_the_mean_load_rounded_down() -> None:
    assert group_budget(n_tokens=160, top_k=6, n_group=8, factor=1.0) == 160 * 6 // 8
    assert group_budget(n_tokens=10, top_k=1, n_group=4, factor=1.0) == 2  # 2.5, rounded down


def test_factors_are_decimals_as_written() -> None:
    assert 1.1 * 50 > 55
    assert capacity(n_tokens=25, top_k=2, n_experts=1, factor=1.1) == 55
    assert 0.58 * 50 < 29
    assert group_budget(n_tokens=50, top_k=2, n_group=2, factor=0.58) == 29
    assert capacity(n_tokens=70, top_k=1, n_experts=1, factor=1e-5) == 1  # prints with an exponent


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 9), st.data())
def test_place_counts_all_first_choices_before_any_second(T: int, E: int, data: st.DataObject) -> None:
    K = data.draw(st.integers(1, E))
    rows = [data.draw(st.permutations(range(E)))[:K] for _ in range(T)]
    expected, seen = [[0] * K for _ in range(T)], [0] * E
    for k in range(K):
        for t in range(T):
            expected[t][k] = seen[rows[t][k]]
            seen[rows[t][k]] += 1
    ids = torch.tensor(rows, dtype=torch.int64).view(T, K)
    assert place_in_expert(ids, E).tolist() == expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_training_and_evaluation_have_their_own_factor(seed: int, training: bool) -> None:
    routing, _ = routed(SWITCH, (2, 25), seed, training=training)
    slots = 8 if training else 13  # ceil(1.25 * 50 / 8) and ceil(2 * 50 / 8)
    counts = routing.counts.tolist()
    left = [sum(e == expert for _, e in pairs(routing)) for expert in range(8)]
    assert left == [min(slots, n) for n in counts]
    assert pairs(routing) == within_experts(routing.topk_ids.tolist(), 8, slots * 8.0)
    assert max(counts) > 8, "the case should drop something in training"


def test_course_presets_take_st_moes_factors() -> None:
    for name in ("course-gshard", "course-switch"):
        moe = preset(name).moe
        assert moe is not None
        assert (moe.capacity_factor, moe.eval_capacity_factor) == (1.25, 2.0)


# DeepSeek-V2's groups


def drop_by_hand(rows: list[list[int]], worth: list[list[float]], n_group: int, budget: int, safe: list[bool]):
    """Drop a group's lowest affinity until it fits or only exempt tokens are left; of equal ones the later."""
    stay = [[True] * len(row) for row in rows]
    for group in range(n_group):
        while True:
            here = [(t, k) for t, row in enumerate(rows) for k, g in enumerate(row) if g == group and stay[t][k]]
            free = [(worth[t][k], -t, -k) for t, k in here if not safe[t]]
            if len(here) <= budget or not free:
                break
            _, t, k = min(free)
            stay[-t][-k] = False
    return stay


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 16), st.integers(1, 4), st.integers(1, 4), st.integers(0, 12), st.data())
def test_groups_drop_their_lowest_affinities(T: int, K: int, D: int, budget: int, data: st.DataObject) -> None:
    cells = st.lists(st.lists(st.integers(0, D - 1), min_size=K, max_size=K), min_size=T, max_size=T)
    rows = data.draw(cells)
    worth = data.draw(st.lists(st.lists(st.integers(0, 5), min_size=K, max_size=K), min_size=T, max_size=T))  # ties
    safe = data.draw(st.lists(st.booleans(), min_size=T, max_size=T))
    groups = torch.tensor(rows, dtype=torch.int64).view(T, K)
    affinity = torch.tensor(worth, dtype=torch.float64).view(T, K)
    stay = within_budget(groups, affinity, D, budget, torch.tensor(safe, dtype=torch.bool))
    assert stay.tolist() == drop_by_hand(rows, worth, D, budget, safe)


@pytest.mark.parametrize("seed", range(4))
def test_v2_drops_by_affinity_in_training_only(seed: int) -> None:
    routing, router = routed(V2, (8, 6), seed, training=True)
    expected = decide(V2, routing.logits, (8, 6), training=True)
    assert pairs(routing) == expected.kept
    assert not routing.kept.all(), "the case should drop something"
    assert routing.kept[: 2 * 6].all()  # a quarter of 8 sequences
    ids = routing.topk_ids // 3
    in_group = [int((ids[routing.kept] == g).sum()) for g in range(4)]
    exempt = [int((ids[:12] == g).sum()) for g in range(4)]
    budget = 8 * 6 * 3 // 4
    assert all(n <= max(budget, free) for n, free in zip(in_group, exempt, strict=True))
    assert router.eval()(torch.randn(48, 6, dtype=torch.float64), (8, 6)).kept.all()


def test_both_limits_hold_together() -> None:
    both = replace(V2, capacity_factor=1.0)
    routing, _ = routed(both, (8, 6), 0, training=True)
    experts, _ = routed(replace(both, group_capacity_factor=None), (8, 6), 0, training=True)
    groups, _ = routed(replace(both, capacity_factor=None), (8, 6), 0, training=True)
    assert torch.equal(routing.kept, experts.kept & groups.kept)
    assert not torch.equal(routing.kept, experts.kept)
    assert not torch.equal(routing.kept, groups.kept)


def test_exempt_sequences_are_whole_and_the_same_in_every_layer() -> None:
    assert exempt_tokens((10, 3), 0.1, torch.device("cpu")).tolist() == [True] * 3 + [False] * 27
    assert exempt_tokens((10, 3), 0.26, torch.device("cpu")).tolist() == [True] * 9 + [False] * 21
    assert exempt_tokens((10, 3), 0.24, torch.device("cpu")).tolist() == [True] * 6 + [False] * 24
    assert not exempt_tokens((10, 3), 0.0, torch.device("cpu")).any()
    assert exempt_tokens((10, 3), 1.0, torch.device("cpu")).all()
    tight = replace(V2, group_capacity_factor=0.05)  # far more is exempt than fits
    for seed in range(3):  # three layers
        routing, _ = routed(tight, (8, 6), seed, training=True)
        assert routing.kept.all(dim=1).tolist() == [True] * 12 + [False] * 36


GROUPED = {
    "capacity": MoEConfig(n_routed_experts=8, top_k=2, expert_width=16, capacity_factor=1.0),
    "devices": MoEConfig(
        n_routed_experts=8,
        top_k=2,
        expert_width=16,
        n_group=4,
        topk_group=2,
        group_capacity_factor=1.0,
        never_drop_share=0.5,
    ),
    "expert choice": MoEConfig(n_routed_experts=8, top_k=2, expert_width=16, chooser="expert"),
    "hash": MoEConfig(n_routed_experts=8, top_k=1, expert_width=16, scoring_func="hash", capacity_factor=1.0),
}


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("B", [2, 7])
def test_a_routing_group_is_a_batch_of_its_own(name: str, B: int) -> None:
    S, groups, config = 9, 3, GROUPED[name]
    router = Router(12, config, vocab_size=40)
    x, ids = torch.randn(B * S, 12), torch.randint(0, 40, (B * S,))
    router.groups = groups
    whole = router(x, (B, S), ids)
    router.groups = 1
    first = 0
    for part in range(groups):
        n = len(range(part, B, groups))
        rows = slice(first * S, (first + n) * S)
        alone = router(x[rows], (n, S), ids[rows])
        K = alone.topk_ids.shape[1]
        assert torch.equal(whole.topk_ids[rows, :K], alone.topk_ids)
        assert torch.equal(whole.kept[rows, :K], alone.kept)
        assert torch.equal(whole.gates[rows, :K], alone.gates)
        assert not whole.kept[rows, K:].any()
        assert (whole.topk_ids[rows, K:] == -1).all()
        first += n
    assert first == B


def test_routing_groups_need_something_to_compete_for() -> None:
    with pytest.raises(InputError, match="routing_groups = 2: must be 1 if tokens do not compete for slots"):
        MoEConfig(n_routed_experts=8, top_k=2, expert_width=16, routing_groups=2)
