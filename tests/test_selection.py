"""Choosing from scores alone: ties, groups, and experts that choose their tokens, against loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_by_hand import best_experts, experts_choose

from dsmoe_lite.config import MoEConfig
from dsmoe_lite.layers.selection import expert_choice, group_of, limit_groups, ordered_topk


def test_ties_go_to_the_lower_id() -> None:
    assert ordered_topk(torch.zeros(5, 32), 3).tolist() == [[0, 1, 2]] * 5
    assert ordered_topk(torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]]), 4).tolist() == [[1, 2, 4, 3]]


def test_groups_are_neighbours() -> None:
    assert group_of(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert group_of(6, 2).tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("group_score", ["max", "top2"])
@pytest.mark.parametrize("seed", range(3))
def test_limited_choice_is_the_loop_over_tokens(group_score: str, seed: int) -> None:
    torch.manual_seed(seed)
    config = MoEConfig(n_routed_experts=12, top_k=3, expert_width=4, n_group=4, topk_group=2, group_score=group_score)
    scores = torch.randn(60, 12, dtype=torch.float64)  # negative ones too, as a bias makes them
    scores[:20] = scores[:20].round()  # many ties, of experts and of groups
    limited = limit_groups(scores, 4, 2, group_score)
    assert ordered_topk(limited, 3).tolist() == [best_experts(row, config) for row in scores.tolist()]
    inside = limited > -math.inf
    assert torch.equal(limited[inside], scores[inside])
    groups = inside.view(60, 4, 3)
    assert torch.equal(groups.any(dim=2), groups.all(dim=2))  # a group is in or out as a whole
    assert groups.any(dim=2).sum(dim=1).tolist() == [2] * 60


def test_the_best_single_score_and_the_best_two_choose_different_groups() -> None:
    scores = torch.tensor([[0.9, 0.0, 0.6, 0.5]])
    assert ordered_topk(limit_groups(scores, 2, 1, "max"), 2).tolist() == [[0, 1]]
    assert ordered_topk(limit_groups(scores, 2, 1, "top2"), 2).tolist() == [[2, 3]]


def test_groups_of_one_expert_are_its_scores() -> None:
    scores = torch.randn(9, 5)
    assert torch.equal(ordered_topk(limit_groups(scores, 5, 2, "max"), 2), ordered_topk(scores, 2))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20), st.integers(1, 8), st.booleans(), st.data())
def test_expert_choice_is_the_loop_over_experts(T: int, E: int, ties: bool, data: st.DataObject) -> None:
    slots = data.draw(st.integers(0, T))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    scores = torch.randn(T, E, dtype=torch.float64)
    scores = scores.round() if ties else scores
    ids = expert_choice(scores, slots)
    expected = experts_choose(scores.tolist(), slots)
    most = max(map(len, expected), default=0)
    assert ids.tolist() == [row + [-1] * (most - len(row)) for row in expected]
    taken = torch.bincount(ids[ids >= 0], minlength=E)
    assert taken.tolist() == [slots] * E  # balanced exactly
