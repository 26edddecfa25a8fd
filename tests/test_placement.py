"""Placements of experts and traffic between devices, against counts by hand."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.simulate.placement import Placement, balanced_placement, consecutive_placement
from dsmoe_lite.simulate.traffic import rows_between

LOADS = st.lists(st.integers(0, 50), min_size=1, max_size=7)


@given(load=LOADS, devices=st.integers(1, 4), spare=st.integers(0, 6))
def test_every_expert_has_a_slot_and_devices_have_equally_many(load: list[int], devices: int, spare: int) -> None:
    n_slots = -(-(len(load) + spare) // devices) * devices
    placement = balanced_placement(torch.tensor(load), devices, n_slots)
    assert placement.slots.shape == (devices, n_slots // devices)
    assert (placement.copies >= 1).all()
    assert int(placement.copies.sum()) == n_slots
    loads = placement.loads(torch.tensor(load))
    assert float(loads.sum()) == pytest.approx(sum(load))


@given(load=st.lists(st.integers(1, 50), min_size=1, max_size=4), spare=st.integers(0, 4))
def test_copies_minimise_the_load_of_the_busiest(load: list[int], spare: int) -> None:
    n_slots = len(load) + spare
    copies = balanced_placement(torch.tensor(load), 1, n_slots).copies.tolist()
    choices = itertools.product(range(1, n_slots + 1), repeat=len(load))
    best = min(max(n / c for n, c in zip(load, choice, strict=True)) for choice in choices if sum(choice) == n_slots)
    assert max(n / c for n, c in zip(load, copies, strict=True)) == pytest.approx(best)


@given(load=st.lists(st.integers(0, 50), min_size=6, max_size=6))
def test_pairs_are_packed_optimally(load: list[int]) -> None:
    busiest = float(balanced_placement(torch.tensor(load), 3, 6).loads(torch.tensor(load)).max())
    best = min(max(load[o[i]] + load[o[i + 1]] for i in (0, 2, 4)) for o in itertools.permutations(range(6)))
    assert busiest == pytest.approx(best)


def test_a_few_copies_balance_zipf_loads() -> None:
    load = 1000 / torch.arange(1, 65)
    before, after = consecutive_placement(64, 8).imbalance(load), balanced_placement(load, 8, 72).imbalance(load)
    assert before > 4
    assert after < 1.1
    assert balanced_placement(load, 8, 64).imbalance(load) > after


def test_copies_of_an_expert_are_on_different_devices() -> None:
    slots = balanced_placement(torch.tensor([90, 1, 1, 1, 1, 1]), 3, 9).slots.tolist()
    assert [0 in device for device in slots] == [True] * 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: consecutive_placement(8, 3), "n_devices = 3: must divide n_experts = 8"),
        (lambda: balanced_placement(torch.ones(4), 3, 7), "n_slots = 7: must be a multiple of n_devices = 3"),
        (lambda: balanced_placement(torch.ones(4), 2, 2), "n_slots = 2: must be a whole number of at least 4"),
        (lambda: balanced_placement(torch.tensor([1.0, float("nan")]), 1, 2), "load = .*: must be counts of tokens"),
        (lambda: rows_between(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1, dtype=torch.bool),
                              torch.tensor([0, 2]), consecutive_placement(2, 2)),
         r"home = \[0, 2\]: must be devices from 0 to 1"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


@given(T=st.integers(0, 20), K=st.integers(1, 3), devices=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_token_is_sent_once_to_each_device(T: int, K: int, devices: int, seed: int) -> None:
    draw, E = torch.Generator().manual_seed(seed), 6
    ids = torch.rand(T, E, generator=draw).argsort(dim=1)[:, :K]
    kept = torch.rand(T, K, generator=draw) < 0.8
    home = torch.randint(0, devices, (T,), generator=draw)
    placement = consecutive_placement(E, devices)
    expected = torch.zeros(devices, devices, dtype=torch.int64)
    for t in range(T):
        for device in {int(ids[t, k]) // (E // devices) for k in range(K) if kept[t, k]}:
            expected[home[t], device] += 1
    assert torch.equal(rows_between(ids, kept, home, placement), expected)


def test_copies_take_turns() -> None:
    placement = Placement(torch.tensor([[0, 1], [0, 2]]), 3)
    ids, kept = torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1, dtype=torch.bool)
    rows = rows_between(ids, kept, torch.zeros(6, dtype=torch.int64), placement)
    assert rows.tolist() == [[3, 3], [0, 0]]
