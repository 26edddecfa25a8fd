"""Rows that cross between nodes, against a walk of every token; and the time they take, against arithmetic."""

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from dsmoe_lite.accounting import parameters
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import AttentionConfig, ModelConfig, MoEConfig
from dsmoe_lite.layers.dispatch import dispatch
from dsmoe_lite.layers.experts import Experts
from dsmoe_lite.layers.router import Routing
from dsmoe_lite.model import Transformer
from dsmoe_lite.parallel.dispatch import plan_send
from dsmoe_lite.parallel.mesh import make_mesh
from dsmoe_lite.parallel.shard import ParallelExperts, parallelize
from dsmoe_lite.simulate.placement import consecutive_placement
from dsmoe_lite.simulate.time import LayerTime, Machine, layer_time, step_time, weight_bytes
from dsmoe_lite.simulate.traffic import Traffic, count_traffic, rows_between


def draw(T: int, E: int, K: int, D: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    ids = torch.rand(T, E, generator=source).argsort(dim=1)[:, :K]
    return ids, torch.rand(T, K, generator=source) < 0.8, torch.randint(0, D, (T,), generator=source)


@given(T=st.integers(0, 20), K=st.integers(1, 4), node=st.sampled_from([1, 2, 3, 6]), seed=st.integers(0, 99))
def test_a_token_crosses_once_to_a_node_and_is_handed_on(T: int, K: int, node: int, seed: int) -> None:
    D = 6
    ids, kept, home = draw(T, 12, K, D, seed)
    found = count_traffic(ids, kept, home, consecutive_placement(12, D), node)
    wanted = {name: [0] * D for name in vars(found)}
    edges: set[tuple[int, int]] = set()
    for t in range(T):
        of_choices = [int(ids[t, k]) // 2 for k in range(K) if kept[t, k]]
        for device in of_choices:
            wanted["choices"][device] += 1
        start = int(home[t])
        at = {start // node: start}
        for there in sorted({device // node for device in of_choices} - {start // node}):
            at[there] = there * node + start % node
            edges.add((start, at[there]))
            wanted["sent_inter_node"][start] += 1
            wanted["received_inter_node"][at[there]] += 1
        for device in set(of_choices) - set(at.values()):
            wanted["sent_intra_node"][at[device // node]] += 1
            wanted["received_intra_node"][device] += 1
            edges.add((at[device // node], device))
    for start, _ in edges:
        wanted["messages"][start] += 1
    assert {name: value.tolist() for name, value in vars(found).items()} == wanted


@given(seed=st.integers(0, 99))
def test_one_node_or_nodes_of_one_send_directly(seed: int) -> None:
    ids, kept, home = draw(30, 12, 3, 4, seed)
    direct = rows_between(ids, kept, home, consecutive_placement(12, 4)).fill_diagonal_(0)
    one, single = (count_traffic(ids, kept, home, consecutive_placement(12, 4), node) for node in (4, 1))
    for sent, received in (
        (one.sent_intra_node, one.received_intra_node),
        (single.sent_inter_node, single.received_inter_node),
    ):
        assert torch.equal(sent, direct.sum(dim=1))
        assert torch.equal(received, direct.sum(dim=0))
    assert not one.sent_inter_node.any()
    assert not single.sent_intra_node.any()


def test_the_slowest_device_and_the_slower_link_are_waited_for() -> None:
    rows = Traffic(*(torch.tensor(row) for row in ([3, 1], [1, 3], [0, 8], [4, 4], [10, 6], [1, 3])))
    machine = Machine(flops=6e6, intra_node=1e3, inter_node=1e2, latency=0.5)
    found = layer_time(rows, machine, d_model=100, expert_width=50, dispatch_bytes=1, combine_bytes=2)
    assert found.dispatch == pytest.approx(3 * 0.5 + 100 * (3 / 1e2 + 8 / 1e3))
    assert found.combine == pytest.approx(3 * 0.5 + 2 * 100 * (3 / 1e2 + 8 / 1e3))
    assert found.compute == pytest.approx(10 * 6 * 100 * 50 / 6e6)
    assert found.sequential == pytest.approx(found.dispatch + found.compute + found.combine)


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
        sent = int(count_traffic(ids, kept, home, consecutive_placement(E, D), node).sent_inter_node.sum())
        missed = math.comb(8 * reached - 8, 8) / math.comb(8 * reached, 8)  # a node in reach of which none is chosen
        assert sent / T == pytest.approx(reached * (1 - missed) * 7 / 8, rel=0.02)  # a node in eight is one's own


def test_four_thousand_devices_and_a_million_tokens(slowness: float) -> None:
    T, D = 1_000_000, 4096
    ids = torch.randint(0, D, (T, 8), generator=torch.Generator().manual_seed(0))
    began = time.process_time()
    kept, home = torch.ones(T, 8, dtype=torch.bool), torch.arange(T) * D // T
    rows = count_traffic(ids, kept, home, consecutive_placement(D, D), 8)
    layer_time(rows, Machine(4e14, 1.6e11, 5e10), 7168, 2048)
    assert time.process_time() - began < 2 * 10 * slowness


def test_a_step_is_its_parts() -> None:
    moe = MoEConfig(n_routed_experts=64, top_k=4, expert_width=64, n_shared_experts=1)
    config = ModelConfig(
        vocab_size=128,
        d_model=64,
        n_layers=3,
        attention=AttentionConfig(n_heads=4, head_dim=16),
        ffn_width=128,
        moe=moe,
        n_dense_layers=1,
        max_seq_len=32,
    )
    machine, layer = Machine(flops=1e6, intra_node=1e4, inter_node=1e3), LayerTime(1.0, 2.0, 3.0)
    found = step_time(config, layer, machine, tokens=64, seq_len=32, devices=64, expert_parallel=16, bytes_per_weight=2)
    assert found.experts == 2 * 3 * 2.0  # two layers; backward costs twice forward
    assert found.exchange == 2 * 2 * 4.0
    weights = parameters(config)
    active = weights.active_all - weights.embed_in.active - weights.norms.active - weights.routed_experts.active
    scores = 6 * 3 * 32 * 4 * 2 * 16  # of a token, layers by heads by both products
    assert found.rest == pytest.approx(64 * (6 * active + scores) / 1e6)
    assert found.weights == weight_bytes(config, 64, 16, 2) / 1e3
    assert found.sequential == pytest.approx(12 + 16 + found.rest + found.weights)
    assert found.overlapped == max(12 + found.rest, 16 + found.weights)


# Against what 64 processes would send: torch's fake group has their sizes and none of their wires.


class Wire(TorchDispatchMode):
    """Takes every exchange of one of 64 processes, and counts what it would send; zeros arrive, or `arriving`."""

    def __init__(self, rank: int, arriving: torch.Tensor | None = None) -> None:
        super().__init__()
        self.rank, self.arriving = rank, arriving
        self.rows: Counter[tuple[tuple[int, ...], torch.dtype]] = Counter()  # to others, by the shape of a row
        self.bytes = 0.0  # of weights and gradients, received

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "all_to_all_single":
            tensor, incoming, outgoing, _ = args
            self.rows[tuple(tensor.shape[1:]), tensor.dtype] += sum(outgoing) - outgoing[self.rank]
            numbers = tensor.shape[1:] == (2,)  # of rows, and of the one local expert's choices
            if numbers and self.arriving is not None:
                return self.arriving
            return tensor.new_zeros(sum(incoming), *tensor.shape[1:])
        if name in ("_allgather_base_", "_reduce_scatter_base_"):
            whole, part = sorted((args[0].nbytes, args[1].nbytes), reverse=True)
            self.bytes += whole - part
        if name == "allreduce_":
            size = dist.ProcessGroup.unbox(args[1]).size()
            self.bytes += 2 * args[0][0].nbytes * (size - 1) / size
        return func(*args, **(kwargs or {}))


@contextmanager
def one_of(world: int, rank: int = 0) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_sixty_four_processes_send_the_rows_that_are_counted() -> None:
    world, T, K, D = 64, 20, 4, 8
    source = torch.Generator().manual_seed(0)
    ids = torch.rand(world, T, world, generator=source).argsort(dim=2)[..., :K]
    routings = [
        Routing(torch.zeros(T, world), torch.zeros(T, world), own, torch.ones(T, K), torch.ones(T, K).bool(), (1, T))
        for own in ids
    ]
    tokens = [torch.randn(T, D, generator=source) for _ in routings]
    ways = [plan_send(dispatch(x, routing), world) for x, routing in zip(tokens, routings, strict=True)]
    numbers = torch.stack([torch.cat([way.rows.unsqueeze(1), way.counts], dim=1) for way in ways])  # (from, to, 2)
    home = torch.arange(world).repeat_interleave(T)
    routing = ids.flatten(0, 1), torch.ones(world * T, K).bool(), home, consecutive_placement(world, world)
    between = rows_between(*routing).fill_diagonal_(0)
    direct = count_traffic(*routing, 1)
    for rank in (0, 17, 63):
        with one_of(world, rank):
            experts = Experts(world, D, 12, "padded")
            spread = ParallelExperts(
                experts, make_mesh("cpu", MoEConfig(n_routed_experts=world, top_k=K, expert_width=12))["expert"]
            )
            with Wire(rank, numbers[:, rank].contiguous()) as wire:
                dispatched = spread.dispatch(tokens[rank], routings[rank])
                spread.combine(spread(dispatched), dispatched)
        there, back = int(between[rank].sum()), int(between[:, rank].sum())
        choices = int((ids[rank] != rank).sum())
        assert wire.rows == {
            ((D,), torch.float32): there + back,  # the payload
            ((2,), torch.int64): world - 1,  # counts
            ((), torch.int64): choices,  # which row each choice reads
            ((), torch.float32): choices,  # gates
        }
        assert int(direct.sent_inter_node[rank]) == there
        assert int(direct.messages[rank]) == int((between[rank] > 0).sum())


@pytest.mark.parametrize("expert", [64, 16])
def test_sixty_four_processes_gather_the_weights_that_are_counted(expert: int) -> None:
    moe = MoEConfig(n_routed_experts=64, top_k=4, expert_width=64, n_shared_experts=1, backend="padded")
    config = ModelConfig(
        vocab_size=128,
        d_model=64,
        n_layers=3,
        attention=AttentionConfig(n_heads=4, head_dim=16),
        ffn_width=128,
        moe=moe,
        n_dense_layers=1,
        max_seq_len=32,
    )
    with one_of(64):
        model = Transformer(config)
        parallelize(model, make_mesh("cpu", moe, expert))
        with Wire(0) as wire:
            model(torch.zeros(2, 32, dtype=torch.int64)).logits.square().mean().backward()
    assert wire.bytes == pytest.approx(weight_bytes(config, 64, expert, 4))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Machine(0, 1, 1), "flops = 0: must be a finite number above 0"),
        (lambda: Machine(1, 1, float("inf")), "inter_node = inf: must be a finite number"),
        (
            lambda: count_traffic(*draw(3, 4, 1, 4, 0), consecutive_placement(4, 4), 3),
            "node = 3: must divide the number of devices, 4",
        ),
    ],
)
def test_what_cannot_be_is_named(call, said: str) -> None:
    with pytest.raises(InputError, match=said):
        call()
