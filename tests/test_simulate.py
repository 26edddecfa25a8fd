"""Rows that cross between nodes, against a walk of every token; and the time they take, against arithmetic."""

import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_lite.errors import InputError
from dsmoe_lite.parallel.placement import in_order
from dsmoe_lite.parallel.simulate import LayerTime, Machine, layer_time
from dsmoe_lite.parallel.traffic import Crossings, crossings, rows_between


def draw(T: int, E: int, K: int, D: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    ids = torch.rand(T, E, generator=source).argsort(dim=1)[:, :K]
    return ids, torch.rand(T, K, generator=source) < 0.8, torch.randint(0, D, (T,), generator=source)


@given(T=st.integers(0, 20), K=st.integers(1, 4), node=st.sampled_from([1, 2, 3, 6]), seed=st.integers(0, 99))
def test_a_token_crosses_once_to_a_node_and_is_handed_on(T: int, K: int, node: int, seed: int) -> None:
    D = 6
    ids, kept, home = draw(T, 12, K, D, seed)
    found = crossings(ids, kept, home, in_order(12, D), node)
    wanted = {name: [0] * D for name in vars(found)}
    for t in range(T):
        of_choices = [int(ids[t, k]) // 2 for k in range(K) if kept[t, k]]
        for device in of_choices:
            wanted["choices"][device] += 1
        start = int(home[t])
        at = {start // node: start}
        for there in sorted({device // node for device in of_choices} - {start // node}):
            at[there] = there * node + start % node
            wanted["sent_across"][start] += 1
            wanted["received_across"][at[there]] += 1
        for device in set(of_choices) - set(at.values()):
            wanted["sent_inside"][at[device // node]] += 1
            wanted["received_inside"][device] += 1
    assert {name: value.tolist() for name, value in vars(found).items()} == wanted


@given(seed=st.integers(0, 99))
def test_one_node_or_nodes_of_one_send_directly(seed: int) -> None:
    ids, kept, home = draw(30, 12, 3, 4, seed)
    direct = rows_between(ids, kept, home, in_order(12, 4)).fill_diagonal_(0)
    one, single = (crossings(ids, kept, home, in_order(12, 4), node) for node in (4, 1))
    for sent, received in ((one.sent_inside, one.received_inside), (single.sent_across, single.received_across)):
        assert torch.equal(sent, direct.sum(dim=1))
        assert torch.equal(received, direct.sum(dim=0))
    assert not one.sent_across.any()
    assert not single.sent_inside.any()


def test_the_slowest_device_and_the_slower_link_are_waited_for() -> None:
    rows = Crossings(*(torch.tensor(row) for row in ([3, 1], [1, 3], [0, 8], [4, 4], [10, 6])))
    machine = Machine(flops=6e6, inside=1e3, across=1e2, latency=0.5)
    found = layer_time(rows, machine, d_model=100, expert_width=50, bytes_sent=1, bytes_returned=2)
    assert found.dispatch == pytest.approx(0.5 + 100 * (3 / 1e2 + 8 / 1e3))
    assert found.combine == pytest.approx(0.5 + 2 * 100 * (3 / 1e2 + 8 / 1e3))
    assert found.compute == pytest.approx(10 * 6 * 100 * 50 / 6e6)
    assert found.apart == pytest.approx(found.dispatch + found.compute + found.combine)


@pytest.mark.parametrize(("compute", "hidden"), [(5.0, 5.0), (1.0, 3.0)])
def test_overlap_leaves_the_longer_of_the_two(compute: float, hidden: float) -> None:
    assert LayerTime(1.0, compute, 2.0).overlapped == hidden


def test_fewer_groups_mean_fewer_bytes_between_nodes() -> None:
    T, E, node, D = 4000, 64, 4, 32
    source = torch.Generator().manual_seed(0)
    home, kept = torch.arange(T) * D // T, torch.ones(T, 8, dtype=torch.bool)
    for reached in (2, 4, 8):  # nodes that a token may reach, of 8
        nodes = torch.rand(T, 8, generator=source).argsort(dim=1)[:, :reached]
        allowed = torch.zeros(T, 8, dtype=torch.bool).scatter(1, nodes, True).repeat_interleave(E // 8, dim=1)
        ids = torch.rand(T, E, generator=source).masked_fill(~allowed, -1).topk(8).indices
        sent = int(crossings(ids, kept, home, in_order(E, D), node).sent_across.sum())
        missed = math.comb(8 * reached - 8, 8) / math.comb(8 * reached, 8)  # a node in reach of which none is chosen
        assert sent / T == pytest.approx(reached * (1 - missed) * 7 / 8, rel=0.02)  # a node in eight is one's own


def test_four_thousand_devices_and_a_million_tokens(slowness: float) -> None:
    T, D = 1_000_000, 4096
    ids = torch.randint(0, D, (T, 8), generator=torch.Generator().manual_seed(0))
    began = time.process_time()
    rows = crossings(ids, torch.ones(T, 8, dtype=torch.bool), torch.arange(T) * D // T, in_order(D, D), 8)
    layer_time(rows, Machine(4e14, 1.6e11, 5e10), 7168, 2048)
    assert time.process_time() - began < 2 * 10 * slowness


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Machine(0, 1, 1), "flops = 0: must be a finite number above 0"),
        (lambda: Machine(1, 1, float("inf")), "across = inf: must be a finite number"),
        (lambda: crossings(*draw(3, 4, 1, 4, 0), in_order(4, 4), 3), "node = 3: must divide the number of devices, 4"),
    ],
)
def test_what_cannot_be_is_named(call, said: str) -> None:
    with pytest.raises(InputError, match=said):
        call()
