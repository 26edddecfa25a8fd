"""Every way to run the experts against a loop over rows, forward and backward, in float64 where the way has it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import needs_gxx

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.layers import batched
from dsmoe_lite.layers.dispatch import Dispatched, combine, dispatch
from dsmoe_lite.layers.experts import Experts, choose_backend
from dsmoe_lite.layers.router import Routing

D, F_WIDTH = 12, 8
IMPLEMENTATIONS = [("loop", torch.float64), ("padded", torch.float64), ("auto", torch.float64)]
IMPLEMENTATIONS += [("grouped", torch.float32), ("auto", torch.float32), ("padded", torch.float32)]
WITH_LIMIT = tuple(IMPLEMENTATIONS)
IMPLEMENTATIONS += [pytest.param("cuda", torch.float32, marks=needs_gxx)]
CLOSE = {torch.float64: {"rtol": 1e-10, "atol": 1e-11}, torch.float32: {"rtol": 1e-4, "atol": 1e-5}}


def a_routing(ids: torch.Tensor, n_experts: int, kept: torch.Tensor | None = None, seed: int = 0) -> Routing:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(len(ids), n_experts, dtype=torch.float64, generator=draw)
    gates = torch.rand(ids.shape, dtype=torch.float64, generator=draw).requires_grad_()
    kept = torch.ones_like(ids, dtype=torch.bool) if kept is None else kept
    return Routing(scores, scores, ids, gates, kept, (1, len(ids)))


def some_experts(
    n_experts: int, backend: str, dtype: torch.dtype, seed: int = 0, limit: float | None = None
) -> Experts:
    torch.manual_seed(seed)
    experts = Experts(n_experts, D, F_WIDTH, backend, limit).double()
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return experts.to(dtype)


def output(experts: Experts, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Dispatch, run the experts, combine."""
    dispatched = experts.dispatch(x, routing)
    return experts.combine(experts(dispatched), dispatched)


def by_hand(experts: Experts, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """y_t = sum over its kept choices of g W_down (silu(W_gate x) * W_up x), one choice at a time."""
    rows = [0 * row for row in x]
    for t in range(len(x)):
        for k in range(routing.topk_ids.shape[1]):
            if routing.kept[t, k]:
                e = routing.topk_ids[t, k]
                a, b = experts.gate[e] @ x[t], experts.up[e] @ x[t]
                if experts.limit is not None:
                    a = torch.where(a > experts.limit, experts.limit, a)
                    b = torch.where(b.abs() > experts.limit, experts.limit * b.sign(), b)
                rows[t] = rows[t] + routing.gates[t, k] * (experts.down[e] @ (a * torch.sigmoid(a) * b))
    return torch.stack(rows) if rows else x.new_zeros(0, D)


def agree(backend: str, dtype: torch.dtype, routing: Routing, seed: int = 0, limit: float | None = None) -> None:
    """Compare output and all gradients with the loop over rows in float64."""
    exact = some_experts(routing.n_experts, "loop", torch.float64, seed, limit)
    experts = some_experts(routing.n_experts, backend, dtype, seed, limit)
    draw = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(len(routing.topk_ids), D, dtype=torch.float64, generator=draw).requires_grad_()
    dy = torch.randn(x.shape, dtype=torch.float64, generator=draw)
    mine = output(experts, x.to(dtype), routing)
    theirs = by_hand(exact, x, routing)
    assert mine.dtype == dtype
    torch.testing.assert_close(mine.double(), theirs, **CLOSE[dtype])
    if not len(x):
        grads = torch.autograd.grad(mine.sum(), [*experts.parameters(), x, routing.gates])
        assert not any(grad.any() for grad in grads)
        return
    grads = torch.autograd.grad(mine, [*experts.parameters(), x, routing.gates], dy.to(dtype))
    leaves = [*exact.parameters(), x, routing.gates]
    expected = torch.autograd.grad(theirs, leaves, dy, materialize_grads=True, allow_unused=True)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a.double(), b, **CLOSE[dtype])


def every_token_one_of(ids: list[int], n_tokens: int, top_k: int) -> torch.Tensor:
    rows = [[ids[(t + k) % len(ids)] for k in range(top_k)] for t in range(n_tokens)]
    return torch.tensor(rows).view(n_tokens, top_k)


CASES = {
    "even": (every_token_one_of([0, 1, 2, 3], 8, 2), 4),
    "empty experts": (every_token_one_of([1, 3], 9, 2), 5),
    "all on one expert": (every_token_one_of([2], 20, 1), 4),
    "one token": (every_token_one_of([3, 0], 1, 2), 4),
    "K = E": (every_token_one_of([0, 1, 2], 7, 3), 3),
    "one expert": (every_token_one_of([0], 5, 1), 1),
    "no tokens": (torch.zeros(0, 2, dtype=torch.int64), 4),
    "a busy expert": (torch.cat([every_token_one_of([1], 70, 1), every_token_one_of([0, 1, 2, 3, 4, 5], 12, 1)]), 6),
}


@pytest.mark.parametrize(("backend", "dtype"), IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_every_way_equals_the_loop_over_rows(case: str, backend: str, dtype: torch.dtype) -> None:
    ids, n_experts = CASES[case]
    for seed in range(3):
        agree(backend, dtype, a_routing(ids, n_experts, seed=seed), seed)


@pytest.mark.parametrize(("backend", "dtype"), WITH_LIMIT)
@pytest.mark.parametrize("case", ["even", "a busy expert", "no tokens"])
def test_numbers_beyond_the_limit_are_clamped_and_get_no_gradient(case: str, backend: str, dtype: torch.dtype) -> None:
    ids, n_experts = CASES[case]
    for seed, limit in enumerate((0.3, 1.0, 100.0)):
        agree(backend, dtype, a_routing(ids, n_experts, seed=seed), seed, limit)


@pytest.mark.parametrize(("backend", "dtype"), IMPLEMENTATIONS)
def test_choices_that_are_not_kept_leave_no_trace(backend: str, dtype: torch.dtype) -> None:
    ids = torch.tensor([[0, 1], [2, -1], [-1, -1], [1, 3], [3, 2]])
    kept = ids >= 0
    kept[3, 0] = False
    agree(backend, dtype, a_routing(ids, 4, kept))
    agree(backend, dtype, a_routing(ids, 4, torch.zeros_like(kept)))


@pytest.mark.parametrize(("backend", "dtype"), IMPLEMENTATIONS)
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**31), st.data())
def test_any_routing(backend: str, dtype: torch.dtype, T: int, E: int, seed: int, data: st.DataObject) -> None:
    K = data.draw(st.integers(1, E))
    draw = torch.Generator().manual_seed(seed)
    popularity = torch.rand(E, generator=draw) ** data.draw(st.sampled_from([0, 1, 8])) + 1e-3
    ids = torch.multinomial(popularity.expand(T, -1), K, generator=draw)
    agree(backend, dtype, a_routing(ids, E, torch.rand(T, K, generator=draw) < 0.9, seed), seed)


@pytest.mark.parametrize("limit", [1, 8 * F_WIDTH, 64 * F_WIDTH])
def test_padded_is_the_same_in_any_blocks(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "BLOCK", limit)
    for ids, n_experts in CASES.values():
        agree("padded", torch.float64, a_routing(ids, n_experts))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(1, 5000))
def test_blocks_cover_all_experts_and_pad_little(counts: list[int], width: int) -> None:
    blocks = batched.cut_blocks(counts, width)
    assert [e for block in blocks for e in range(block.experts.start, block.experts.stop)] == list(range(len(counts)))
    row = slot = 0
    for block in blocks:
        own = counts[block.experts]
        n, rows = block.shape
        assert (n, rows) == (len(own), max(own))
        assert block.counts == own
        assert (block.rows.start, block.rows.stop) == (row, row + sum(own))
        assert (block.slots.start, block.slots.stop) == (slot, slot + n * rows)
        assert n == 1 or (n * rows <= batched.WASTE * sum(own) + 16 and n * rows * width <= batched.BLOCK)
        row, slot = block.rows.stop, block.slots.stop


def test_a_bad_token_stays_alone() -> None:
    """A token that overflows must not reach others through padding rows."""
    ids = torch.tensor([[0], [1], [1], [1], [2]])
    x = torch.ones(5, D, dtype=torch.float64)
    x[0] = torch.inf
    experts = some_experts(4, "padded", torch.float64)
    y = output(experts, x, a_routing(ids, 4))
    assert not y[0].isfinite().any()
    assert y[1:].isfinite().all()
    y.sum().backward()
    for weight in experts.parameters():
        assert weight.grad[1:].isfinite().all()


@pytest.mark.parametrize("backend", ["loop", "padded", "grouped"])
def test_autocast_multiplies_in_bfloat16(backend: str) -> None:
    ids, n_experts = torch.randint(0, 4, (30, 1), generator=torch.Generator().manual_seed(0)), 4
    experts = Experts(n_experts, 16, 8, backend)
    torch.nn.init.normal_(experts.gate, std=0.5)
    x, routing = torch.randn(30, 16, requires_grad=True), a_routing(ids, n_experts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = output(experts, x, routing)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == experts.gate.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), output(experts, x, routing).float(), rtol=0.05, atol=2e-4)


def test_a_sum_can_be_differentiated() -> None:
    """Its gradient has stride 0, which F.grouped_mm does not take."""
    experts = some_experts(4, "grouped", torch.float32)
    output(experts, torch.randn(6, D), a_routing(torch.tensor([[0, 1]] * 6), 4)).sum().backward()
    assert all(weight.grad is not None for weight in experts.parameters())


def test_grouped_says_what_it_does_not_take() -> None:
    dispatched = dispatch(torch.randn(6, D, dtype=torch.float64), a_routing(torch.tensor([[0, 1]] * 6), 4))
    with pytest.raises(InputError, match=r"backend: 'grouped' needs .* got torch.float64 .* use 'padded'"):
        some_experts(4, "grouped", torch.float64)(dispatched)
    odd = Experts(2, 6, 4, "grouped")
    with pytest.raises(InputError, match="multiple of 16 bytes"):
        odd(Dispatched(torch.randn(3, 6), 1, torch.arange(3), torch.ones(3), torch.tensor([1, 3], dtype=torch.int32)))


def test_auto_groups_where_torch_can() -> None:
    for dtype, width, chosen in (
        (torch.float32, 8, "grouped"),
        (torch.float64, 8, "padded"),
        (torch.float32, 7, "padded"),
    ):
        assert choose_backend(torch.randn(6, D, dtype=dtype), torch.empty(4, width, D)) == chosen


def test_only_two_tensors_of_hidden_width_are_kept() -> None:
    """Counted by what autograd saves: a and b, of N * F numbers each."""
    ids, sizes = every_token_one_of([0, 1, 2, 3], 50, 2), []
    for backend in ("padded", "grouped", "loop"):
        experts, numbers = some_experts(4, backend, torch.float32), []
        known = {weight.data_ptr() for weight in experts.parameters()}

        def pack(tensor: torch.Tensor, known: set = known, numbers: list = numbers) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in known and tensor.is_floating_point():
                numbers.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output(experts, torch.randn(50, D, requires_grad=True), a_routing(ids, 4))
        sizes.append(sum(numbers))
    N, padded, grouped, loop = 100, *sizes
    few = 51 * D + 3 * N  # x and the gates
    assert grouped <= 2 * N * F_WIDTH + few
    assert padded <= 2 * N * F_WIDTH + few
    assert loop >= 5 * N * F_WIDTH


def test_a_gradient_check() -> None:
    """Against finite differences, which know nothing of the formula."""
    experts, ids = some_experts(3, "padded", torch.float64), torch.tensor([[0, 2], [2, 1], [2, 0]])
    routing = a_routing(ids, 3)

    def of(x: torch.Tensor, gates: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        dispatched = dispatch(x, Routing(routing.scores, routing.scores, ids, gates, routing.kept, (1, 3)))
        return combine(batched.run_padded(dispatched, *weights), dispatched)

    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(of, (x, routing.gates, *experts.parameters()))
