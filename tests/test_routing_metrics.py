"""Routing metrics against loops over tokens, their null baselines against all permutations, and bad input."""

import math
from collections import Counter
from itertools import permutations
from types import SimpleNamespace

import pytest
import torch
from routing_samples import EMPTY, NOBODY, in_turn, line_of, random_choices, rows, seeded
from torch import Tensor

from dsmoe_lite.routing.metrics import (
    drop_rate,
    groups_reached,
    load,
    max_vio,
    overflow,
)
from dsmoe_lite.routing.positions import drop_rate_by_position
from dsmoe_lite.routing.saturation import saturation, saturation_null
from dsmoe_lite.routing.specialization import (
    null_specialization,
    shuffled,
    specialization,
    uncertainty_coefficient,
    vocabulary_specialization,
)

SEEDS = range(6)


def trace_of(topk_ids: Tensor, n_experts: int) -> SimpleNamespace:
    """The fields that the load metrics read, and nothing more."""
    counts = torch.bincount(topk_ids[topk_ids >= 0], minlength=n_experts)
    return SimpleNamespace(topk_ids=topk_ids, kept=topk_ids >= 0, counts=counts, n_experts=n_experts)


# Loads


@pytest.mark.parametrize(("E", "K"), [(8, 2), (16, 1), (4, 3)])
def test_loads_at_balance_and_at_collapse(E: int, K: int) -> None:
    even = trace_of(in_turn(5 * E, E, K), E)
    odd = trace_of(torch.arange(K).expand(5 * E, K), E)
    assert load(even).tolist() == [1] * E
    assert max_vio(even) == 0
    assert max_vio(odd) == pytest.approx(E / K - 1)


def test_loads_by_hand() -> None:
    trace = trace_of(torch.tensor([[0, 1], [0, 2], [0, -1], [0, -1]]), 4)  # 4, 1, 1, 0
    assert load(trace).tolist() == pytest.approx([8 / 3, 2 / 3, 2 / 3, 0])
    assert drop_rate(trace) == 0
    assert overflow(trace, 1.0) == pytest.approx(2 / 6)  # two slots per expert


def test_groups_reached_by_hand() -> None:
    devices = torch.tensor([0, 0, 1, 1, 2, 2])
    trace = trace_of(torch.tensor([[0, 1, 2], [4, 0, 2], [5, -1, -1], [-1, -1, -1]]), 6)
    assert groups_reached(trace, devices) == (2 + 3 + 1 + 0) / 4
    trace.kept = trace.kept & (trace.topk_ids != 2)
    assert groups_reached(trace, devices) == (1 + 2 + 1 + 0) / 4


@pytest.mark.parametrize("ids", [EMPTY, NOBODY])
def test_loads_without_choices_are_zero(ids: Tensor) -> None:
    trace = trace_of(ids, 4)
    assert (max_vio(trace), drop_rate(trace)) == (0, 0)
    assert load(trace).tolist() == [0.0] * 4


# Labels: domains and token types


@pytest.mark.parametrize("seed", SEEDS)
def test_specialization_counts_tokens(seed: int) -> None:
    ids, labels = random_choices(seed), torch.randint(4, (40,), generator=seeded(seed + 100))
    table = specialization(ids, labels, 5, 6)  # label 4 has no tokens
    for label in range(5):
        of_label = [row for row, its in zip(rows(ids), labels.tolist(), strict=True) if its == label]
        for e in range(6):
            expected = sum(e in row for row in of_label) / len(of_label) if of_label else 0
            assert table[label, e] == pytest.approx(expected)
    assert null_specialization(ids, 6).tolist() == pytest.approx(
        [sum(e in row for row in rows(ids)) / 40 for e in range(6)]
    )


def test_specialization_by_hand() -> None:
    ids = torch.tensor([[0, 1], [0, 2], [1, 2], [1, -1]])
    assert specialization(ids, torch.tensor([0, 0, 1, 1]), 3, 3).tolist() == [
        [1.0, 0.5, 0.5],
        [0.0, 1.0, 0.5],
        [0.0, 0.0, 0.0],
    ]
    assert specialization(ids[:3], torch.tensor([0, 0, 1]), 2, 3).sum(dim=1).tolist() == [2, 2]  # K


def test_the_null_is_the_load_and_k_over_e_only_at_balance() -> None:
    even = in_turn(24, 8, 2)
    assert null_specialization(even, 8).tolist() == [2 / 8] * 8
    skewed, labels = random_choices(0, 4000, 8, 2, padded=False), torch.arange(4000) % 2
    null = null_specialization(skewed, 8)
    assert null[0] > 2 * 2 / 8
    torch.testing.assert_close(specialization(skewed, labels, 2, 8), null.expand(2, 8), atol=0.04, rtol=0)


def test_shuffling_rows_gives_the_null_on_average() -> None:
    ids, labels = random_choices(3), (torch.arange(40) >= 20).long()
    drawn = shuffled(lambda i: specialization(i, labels, 2, 6), ids, seeded(0), draws=400)
    assert drawn.shape == (400, 2, 6)
    torch.testing.assert_close(drawn.mean(dim=0), null_specialization(ids, 6).expand(2, 6), atol=0.02, rtol=0)
    again = shuffled(lambda i: specialization(i, labels, 2, 6), ids, seeded(0), draws=2)
    assert torch.equal(again, drawn[:2])
    assert not torch.equal(drawn[0], drawn[1])


def test_shuffling_keeps_the_choices_of_a_token_together() -> None:
    ids, seen = random_choices(4), []
    shuffled(lambda i: seen.append(i.tolist()) or 0.0, ids, seeded(0), draws=3)
    assert all(sorted(i) == sorted(ids.tolist()) for i in seen)
    assert len({str(i) for i in [ids.tolist(), *seen]}) == 4


# Token ids


def peaks(ids: Tensor, tokens: Tensor, min_count: int) -> list[tuple[float, int]]:
    """For each token id, its largest share and the expert that has it; ties go to the lower id."""
    result = []
    for token, times in Counter(tokens.tolist()).items():
        chosen = Counter(e for row, its in zip(rows(ids), tokens.tolist(), strict=True) if its == token for e in row)
        if times >= min_count and chosen:
            e, n = min(chosen.items(), key=lambda item: (-item[1], item[0]))
            result.append((n / times, e))
    return result


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("min_count", [1, 3])
def test_vocabulary_specialization_against_a_loop(seed: int, min_count: int) -> None:
    ids, tokens = random_choices(seed), 7 * torch.randint(12, (40,), generator=seeded(seed + 200))
    expected = peaks(ids, tokens, min_count)
    assert vocabulary_specialization(ids, tokens, 6, min_count) == pytest.approx(
        sum(p for p, _ in expected) / len(expected)
    )


def test_vocabulary_specialization_of_a_table_is_one() -> None:
    tokens = torch.randint(50, (400,), generator=seeded(0))
    table = torch.arange(50) % 6
    assert vocabulary_specialization(table[tokens].unsqueeze(1), tokens, 6) == 1
    assert uncertainty_coefficient(table[tokens].unsqueeze(1), tokens, 6) == pytest.approx(1)


@pytest.mark.parametrize(("T", "published"), [(20_000, 0.84), (200_000, 0.67), (870_000, 0.40)])
def test_random_choices_look_specialized_until_ids_are_common(T: int, published: float) -> None:
    weights = 1 / torch.arange(1, 50_305, dtype=torch.double)  # Zipf ids of a vocabulary as large as OLMoE's
    drawn = torch.rand(T, dtype=torch.double, generator=seeded(1))
    tokens = torch.searchsorted((weights / weights.sum()).cumsum(0), drawn)
    first = torch.randint(64, (T, 1), generator=seeded(2))
    assert vocabulary_specialization(first, tokens, 64) == pytest.approx(published, abs=0.01)  # not 1 / 64
    assert vocabulary_specialization(first, tokens, 64, min_count=10) == pytest.approx(0.11, abs=0.01)
    null = shuffled(lambda i: vocabulary_specialization(i, tokens, 64), first, seeded(3), draws=1)
    assert float(null) == pytest.approx(published, abs=0.01)
    assert uncertainty_coefficient(first, tokens, 64) > 0.15  # and so does mutual information


def entropy(values: list) -> float:
    return -sum(n / len(values) * math.log(n / len(values)) for n in Counter(values).values())


@pytest.mark.parametrize("seed", SEEDS)
def test_uncertainty_coefficient_against_a_loop(seed: int) -> None:
    ids, tokens = random_choices(seed), torch.randint(9, (40,), generator=seeded(seed + 300))
    pairs = [(row[0], token) for row, token in zip(ids.tolist(), tokens.tolist(), strict=True) if row[0] >= 0]
    experts, seen = [e for e, _ in pairs], [token for _, token in pairs]
    expected = (entropy(experts) + entropy(seen) - entropy(pairs)) / entropy(experts)
    assert uncertainty_coefficient(ids, tokens, 6) == pytest.approx(expected)
    assert 0 < expected < 1


def test_uncertainty_coefficient_of_choices_that_ignore_the_id() -> None:
    every_pair = torch.cartesian_prod(torch.arange(5), torch.arange(4))
    assert uncertainty_coefficient(every_pair[:, 1:], every_pair[:, 0], 4) == pytest.approx(0, abs=1e-12)
    assert uncertainty_coefficient(torch.zeros(9, 1, dtype=torch.long), torch.arange(9), 4) == 0  # one expert takes all


# Checkpoints


@pytest.mark.parametrize("seed", SEEDS)
def test_saturation_against_a_loop(seed: int) -> None:
    then, final = random_choices(seed), random_choices(seed + 50, K=2)
    shared = sum(len({*a} & {*b}) for a, b in zip(rows(then), rows(final), strict=True))
    assert saturation(then, final) == pytest.approx(shared / sum(map(len, rows(final))))
    assert saturation(final.flip(1), final) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_saturation_null_is_the_mean_over_all_orders(seed: int) -> None:
    then, final = random_choices(seed, 5, 4, 2), random_choices(seed + 50, 5, 4, 2, padded=seed % 2 == 0)
    every = [saturation(then[list(order)], final) for order in permutations(range(5))]
    assert saturation_null(then, final, 4) == pytest.approx(sum(every) / len(every))


def test_saturation_null_at_balance() -> None:
    even = in_turn(64, 64, 8)
    assert saturation_null(even, even, 64) == pytest.approx(8 / 64)
    skewed = random_choices(0, 500, 64, 8, padded=False)
    assert saturation_null(skewed, even[:20].repeat(25, 1), 64) > 1.2 * 8 / 64
    assert saturation_null(skewed, skewed, 64) > 1.5 * 8 / 64


# Positions


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bins", [1, 3, 8])
def test_drop_rate_by_position_against_a_loop(seed: int, bins: int) -> None:
    ids = random_choices(seed)
    kept = (torch.rand(40, 3, generator=seeded(seed)) < 0.6) & (ids >= 0)
    total, dropped = [0] * bins, [0] * bins
    for t in range(40):
        for k in range(3):
            if ids[t, k] >= 0:
                total[t % 8 * bins // 8] += 1
                dropped[t % 8 * bins // 8] += not kept[t, k]
    rates = drop_rate_by_position(kept, ids, (5, 8), bins)
    assert rates.tolist() == pytest.approx([d / max(1, n) for d, n in zip(dropped, total, strict=True)])
    if bins == 1:
        assert float(rates) == pytest.approx(drop_rate(SimpleNamespace(**{**vars(trace_of(ids, 6)), "kept": kept})))


def test_drops_at_the_end_of_the_batch_and_of_the_sequence() -> None:
    ids = torch.zeros(8, 1, dtype=torch.long)
    kept = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]).bool().unsqueeze(1)
    assert drop_rate_by_position(kept, ids, (2, 4), 2).tolist() == [0.5, 0.5]
    assert drop_rate_by_position(kept, ids, (1, 8), 2).tolist() == [0, 1]


# No tokens, no choices, bad input


@pytest.mark.parametrize("ids", [EMPTY, NOBODY])
def test_no_choices_give_zeros(ids: Tensor) -> None:
    tokens = torch.arange(len(ids))
    assert specialization(ids, tokens, 3, 4).tolist() == [[0.0] * 4] * 3
    assert null_specialization(ids, 4).tolist() == [0.0] * 4
    assert vocabulary_specialization(ids, tokens, 4) == 0
    assert uncertainty_coefficient(ids, tokens, 4) == 0
    assert saturation(ids, ids) == 0
    assert saturation_null(ids, ids, 4) == 0
    assert drop_rate_by_position(ids >= 0, ids, (1, len(ids)), 1).tolist() == [0.0]
    assert shuffled(lambda i: vocabulary_specialization(i, tokens, 4), ids, seeded(0), 2).tolist() == [0.0, 0.0]


def test_bad_input_is_one_line() -> None:
    ids, tokens = torch.tensor([[0, 1], [2, -1], [1, 3]]), torch.arange(3)
    lines = {
        "labels = (2,): must be one label per token, (3,)": lambda: specialization(ids, tokens[:2], 3, 4),
        "labels = 2: must be at least 0 and below 2": lambda: specialization(ids, tokens, 2, 4),
        "labels = -1: must be at least 0 and below 3": lambda: specialization(ids, tokens - 1, 3, 4),
        "n_labels = 0: must be a whole number of at least 1": lambda: specialization(ids, tokens, 0, 4),
        "topk_ids = 3: must be an expert id, 0 to 2, or -1 for no expert": lambda: null_specialization(ids, 3),
        "topk_ids = -2: must be an expert id, 0 to 3, or -1 for no expert": lambda: null_specialization(ids - 1, 4),
        "topk_ids = (3,): must be (tokens, choices)": lambda: uncertainty_coefficient(ids[:, 0], tokens, 4),
        "n_experts = 0: must be a whole number of at least 1": lambda: null_specialization(ids, 0),
        "token_ids = -1: must be at least 0": lambda: vocabulary_specialization(ids, tokens - 1, 4),
        "labels = (3, 1): must be one label per token, (3,)": lambda: uncertainty_coefficient(ids, tokens[:, None], 4),
        "min_count = 0: must be a whole number of at least 1": lambda: vocabulary_specialization(ids, tokens, 4, 0),
        "draws = 0: must be a whole number of at least 1": lambda: shuffled(len, ids, seeded(0), 0),
        "topk_ids_then = 2: must be of the same 3 tokens": lambda: saturation(ids[:2], ids),
        "topk_ids_final = (3,): must be (tokens, choices)": lambda: saturation(ids, ids[:, 0]),
        "topk_ids_final = 3: must be an expert id, 0 to 2, or -1 for no expert": lambda: saturation_null(
            NOBODY, ids, 3
        ),
        "kept = (3, 1): must have the shape of topk_ids, (3, 2)": lambda: drop_rate_by_position(
            ids[:, :1] > 0, ids, (1, 3), 1
        ),
        "bins = 0: must be a whole number of at least 1 and at most 3": lambda: drop_rate_by_position(
            ids >= 0, ids, (1, 3), 0
        ),
        "bins = 4: must be a whole number of at least 1 and at most 3": lambda: drop_rate_by_position(
            ids >= 0, ids, (1, 3), 4
        ),
        "batch_shape = (2, 2): must be (sequences, tokens per sequence) of 3 tokens in all": lambda: (
            drop_rate_by_position(ids >= 0, ids, (2, 2), 1)
        ),
    }
    for line, call in lines.items():
        assert line_of(call) == line
