"""Co-activation against loops, its null model against every arrangement with the same loads, and seriation."""

from itertools import combinations, pairwise, product

import pytest
import torch
from routing_samples import EMPTY, NOBODY, in_turn, line_of, random_choices, rows, seeded
from torch import Tensor

from dsmoe_lite.routing import coactivation as module
from dsmoe_lite.routing.coactivation import coactivation, coactivation_null, pair_counts, seriate, trade

SEEDS = range(6)


def loads(topk_ids: Tensor, n_experts: int) -> list[int]:
    return torch.bincount(topk_ids[topk_ids >= 0], minlength=n_experts).tolist()


def off_diagonal(matrix: Tensor) -> Tensor:
    """The entries off the diagonal."""
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("K", [1, 2, 4])
def test_coactivation_against_a_loop(seed: int, K: int) -> None:
    ids = random_choices(seed, K=K)
    pairs, table = pair_counts(ids, 6), coactivation(ids, 6)
    for i in range(6):
        of_i = [row for row in rows(ids) if i in row]
        for j in range(6):
            both = sum(j in row for row in of_i) if i != j else 0
            assert pairs[i, j] == both
            assert table[i, j] == pytest.approx(both / max(1, len(of_i)))


def test_rows_sum_to_the_other_choices() -> None:
    table = coactivation(random_choices(0, 200, 8, 3, padded=False), 9)  # expert 8 is never chosen
    assert table.sum(dim=1).tolist() == pytest.approx([2.0] * 8 + [0.0])


def test_pairs_of_adjacent_ranks_are_four_times_fewer_at_eight_choices() -> None:
    ids = random_choices(0, 1000, 64, 8, padded=False, skew=0)
    adjacent = torch.zeros(64, 64)
    for row in ids.tolist():  # OLMoE's published script
        for a, b in pairwise(row):
            adjacent[[a, b], [b, a]] += 1
    assert pair_counts(ids, 64).sum() == 4 * adjacent.sum()
    assert off_diagonal(coactivation(ids, 64)).mean() == pytest.approx(7 / 63, rel=0.02)
    script = adjacent / torch.tensor(loads(ids, 64)).unsqueeze(1)
    assert off_diagonal(script).mean() == pytest.approx(7 / 63 / 4, rel=0.02)


# The null


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("T", "K", "padded"), [(41, 3, True), (40, 5, False), (7, 6, True), (40, 1, False)])
def test_trade_keeps_loads_and_experts_per_token(seed: int, T: int, K: int, padded: bool) -> None:
    ids = random_choices(seed, T, 6, K, padded=padded)
    before = ids.clone()
    traded = trade(ids, seeded(seed), 12)
    assert torch.equal(ids, before)
    assert loads(traded, 6) == loads(ids, 6)
    assert torch.equal((traded >= 0).sum(dim=1), (ids >= 0).sum(dim=1))
    assert torch.equal(traded < 0, ids < 0)  # -1 still fills the ends
    assert all(len(set(row)) == len(row) for row in rows(traded))
    if T > 7:  # few tokens with nested experts have only one arrangement
        assert [sorted(row) for row in rows(traded)] != [sorted(row) for row in rows(ids)]
    assert torch.equal(traded, trade(ids, seeded(seed), 12))


@pytest.mark.parametrize("ids", [EMPTY, NOBODY, torch.tensor([[0, 1]]), torch.zeros(4, 0, dtype=torch.long)])
def test_trade_without_a_partner_changes_nothing(ids: Tensor) -> None:
    assert torch.equal(trade(ids, seeded(0), 3), ids)
    assert coactivation_null(ids, 3, seeded(0), 2).shape == (2, 3, 3)


def test_trades_make_every_arrangement_equally_likely() -> None:
    ids = torch.tensor([[0, 1, 2], [0, 1, -1], [0, -1, -1], [2, 3, -1]])
    sizes, load = [len(row) for row in rows(ids)], loads(ids, 4)
    choices = [list(combinations(range(4), size)) for size in sizes]
    allowed = [
        arrangement
        for arrangement in product(*choices)
        if [sum(e in row for row in arrangement) for e in range(4)] == load
    ]
    assert len(allowed) > 10
    seen, g, draws = dict.fromkeys(allowed, 0), seeded(0), 700
    for _ in range(draws):
        ids = trade(ids, g, 3)
        seen[tuple(tuple(sorted(row)) for row in rows(ids))] += 1
    expected = draws / len(allowed)
    chi2 = sum((n - expected) ** 2 / expected for n in seen.values())
    free = len(allowed) - 1
    assert chi2 < free + 6 * (2 * free) ** 0.5  # consecutive draws are not quite independent


def test_null_at_balance_is_the_closed_form_however_the_choices_were() -> None:
    partners = torch.arange(400).unsqueeze(1) % 4 * 2 + torch.arange(2)  # 0 with 1, 2 with 3, ...
    assert coactivation(partners, 8)[0, 1] == 1
    null = coactivation_null(partners, 8, seeded(0), draws=60)
    assert null.shape == (60, 8, 8)
    torch.testing.assert_close(off_diagonal(null.mean(dim=0)), torch.full((56,), 1 / 7).double(), atol=0.02, rtol=0)
    assert null.std(dim=0)[0, 1] > 0.01  # draws differ
    assert torch.equal(null[:2], coactivation_null(partners, 8, seeded(0), draws=2))


def test_the_null_is_burnt_in_before_its_first_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "THINNING", 0)
    partners = torch.arange(4000).unsqueeze(1) % 4 * 2 + torch.arange(2)
    first = coactivation_null(partners, 8, seeded(0), draws=1)[0]
    torch.testing.assert_close(off_diagonal(first), torch.full((56,), 1 / 7).double(), atol=0.05, rtol=0)


def test_null_at_a_skewed_load_is_not_the_closed_form() -> None:
    ids = random_choices(0, 2000, 8, 2, padded=False)
    null = coactivation_null(ids, 8, seeded(0), draws=5).mean(dim=0)
    assert null[7, 0] > 2.5 / 7  # whichever expert fires, the busiest one fires too
    assert null[0, 7] < 0.6 / 7
    assert (coactivation(ids, 8) - null).abs().max() < 0.1  # independent choices agree with chance


# An order of experts


def test_seriation_finds_hidden_groups() -> None:
    hidden = torch.randperm(32, generator=seeded(1))
    group = torch.randint(8, (3000, 1), generator=seeded(2))
    noisy = torch.rand(3000, 1, generator=seeded(3)) < 0.4
    inside = torch.stack([torch.randperm(4, generator=seeded(t))[:2] for t in range(3000)]) + 4 * group
    ids = hidden[inside.where(~noisy, random_choices(5, 3000, 32, 2, padded=False, skew=0))]
    order = seriate(coactivation(ids, 32))
    assert sorted(order) == list(range(32))
    original = hidden.argsort()  # an expert's number before the permutation
    for start in range(0, 32, 4):
        assert len({int(original[e]) // 4 for e in order[start : start + 4]}) == 1


def test_seriation_recovers_a_chain() -> None:
    hidden = torch.randperm(16, generator=seeded(0))
    near = torch.exp(-(hidden.unsqueeze(0) - hidden.unsqueeze(1)).abs().double())
    order = [int(hidden[e]) for e in seriate(near)]
    assert order in (list(range(16)), list(range(15, -1, -1)))


def test_seriation_joins_by_the_average() -> None:
    near = torch.zeros(5, 5)
    for i, j, value in [(0, 1, 0.9), (2, 3, 0.8), (1, 2, 0.5), (0, 4, 0.4), (1, 4, 0.4)]:
        near[i, j] = 2 * value  # in one direction only
    assert seriate(near) == [
        0,
        1,
        4,
        2,
        3,
    ]  # on average 4 is closer to {0, 1} than {2, 3} is, despite the one strong link


def test_seriation_is_a_fixed_order_of_every_expert() -> None:
    assert seriate(torch.zeros(1, 1)) == [0]
    assert seriate(torch.zeros(5, 5)) == list(range(5))
    dead = coactivation(in_turn(40, 6, 2), 8)  # 6 and 7 are never chosen
    assert sorted(seriate(dead)) == list(range(8))
    blank = dead.clone().fill_diagonal_(float("nan"))
    assert seriate(blank) == seriate(dead) == seriate(dead.T)
    assert sorted(seriate(dead)[-2:]) == [6, 7] or sorted(seriate(dead)[:2]) == [6, 7]


def test_bad_input_is_one_line() -> None:
    ids = torch.tensor([[0, 1], [2, -1]])
    missing = torch.zeros(2, 2)
    missing[0, 1] = float("nan")
    lines = {
        "topk_ids = 2: must be an expert id, 0 to 1, or -1 for no expert": lambda: coactivation(ids, 2),
        "topk_ids = (2,): must be (tokens, choices)": lambda: pair_counts(ids[0], 3),
        "draws = 0: must be a whole number of at least 1": lambda: coactivation_null(ids, 3, seeded(0), 0),
        "rounds = -1: must be a whole number of at least 0": lambda: trade(ids, seeded(0), -1),
        "matrix = (2, 3): must be square, experts by experts": lambda: seriate(torch.zeros(2, 3)),
        "matrix = 'not finite': must be finite off its diagonal": lambda: seriate(missing),
    }
    for line, call in lines.items():
        assert line_of(call) == line
