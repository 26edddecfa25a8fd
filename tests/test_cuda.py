"""The CUDA kernels against float64: every rung and product; on the CPU in three orders of the warps, and on a GPU."""

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import needs_gxx
from torch import Tensor

from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.kernels import cuda
from dsmoe_lite.kernels.build import cpu_library
from dsmoe_lite.kernels.cuda_router import Rule, route
from dsmoe_lite.kernels.launch import DTYPES
from dsmoe_lite.layers.router import Router
from dsmoe_lite.layers.selection import limit_groups

pytestmark = needs_gxx

IMPLEMENTATIONS = [("naive", torch.float32), ("tiled", torch.float32), ("tiled", torch.bfloat16)]
IMPLEMENTATIONS += [(rung, torch.bfloat16) for rung in ("naive", "wmma", "mma", "hopper")]
FULL = [way for way in IMPLEMENTATIONS if way[0] in cuda.EVERYWHERE]
COUNTS = {
    "even": [128, 128],
    "empty experts and tails": [0, 5, 0, 131, 64, 1, 0],
    "one token": [0, 1, 0],
    "skew": [300, 1, 0, 2],
    "one expert": [70],
}
WIDTHS = {"tiles": (128, 256), "tails": (72, 136)}
ODD_WIDTHS = (13, 7)  # no multiple of 8: what the tensor cores' copies do not take


ORDERS: dict[str, int | None] = {"first warp first": 0, "last warp first": 1, "shuffled": 7}
if torch.cuda.is_available():
    ORDERS["on a GPU"] = None


@pytest.fixture(params=ORDERS.values(), ids=ORDERS)
def order(request: pytest.FixtureRequest) -> Iterator[int | None]:
    """Where kernels run; on the CPU in which order warps do: a result that depends on it lacks a barrier."""
    if request.param is None:
        with torch.device("cuda"):
            yield None
        return
    schedule(request.param)
    yield request.param
    schedule(0)


def schedule(seed: int) -> None:
    cpu_library().cuda_on_cpu_schedule(ctypes.c_uint(seed))


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    return numbers.to(torch.get_default_device(), dtype)


def ends_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def by_expert(counts: list[int], product: Callable[..., Tensor], *stacked: Tensor, rows: list[Tensor]) -> list[Tensor]:
    """product(rows of e, ..., matrices of e, ...) for every expert, in float64."""
    parts = [tensor.double().split(counts) for tensor in rows]
    return [product(*(p[e] for p in parts), *(m[e].double() for m in stacked)) for e in range(len(counts))]


def assert_sums(mine: Tensor, exact: Tensor, size: Tensor) -> None:
    """float32 within 1e-6 of the summed sizes, bfloat16 by half a unit in the last place more.

    size: the same sums over absolute values, which bound what rounding can do.
    """
    half_unit = torch.ldexp(torch.ones_like(exact), exact.frexp().exponent - 9)  # bfloat16 keeps 8 bits
    rounding = half_unit if mine.dtype == torch.bfloat16 else 0.0
    excess = (mine.double() - exact).abs() - rounding - 1e-6 * size
    assert mine.isfinite().all()
    assert mine.numel() == 0 or float(excess.max()) <= 0


@pytest.mark.parametrize(("rung", "dtype"), IMPLEMENTATIONS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_every_rung_multiplies(
    rung: str, dtype: torch.dtype, counts: list[int], widths: tuple[int, int], order: int | None
) -> None:
    P, Q = widths
    rows, matrices = draw(sum(counts), P, dtype=dtype, seed=1), draw(len(counts), Q, P, dtype=dtype, seed=2)
    mine = cuda.multiply(rows, matrices, ends_of(counts), rung)
    exact = torch.cat(by_expert(counts, lambda x, w: x @ w.T, matrices, rows=[rows]))
    size = torch.cat(by_expert(counts, lambda x, w: x @ w.T, matrices.abs(), rows=[rows.abs()]))
    assert_sums(mine, exact, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rung", ["naive", "tiled"])
def test_widths_that_do_not_tile(rung: str, dtype: torch.dtype, order: int | None) -> None:
    counts, (P, Q) = [3, 0, 70], ODD_WIDTHS
    rows, matrices = draw(sum(counts), P, dtype=dtype, seed=1), draw(len(counts), Q, P, dtype=dtype, seed=2)
    exact = torch.cat(by_expert(counts, lambda x, w: x @ w.T, matrices, rows=[rows]))
    size = torch.cat(by_expert(counts, lambda x, w: x @ w.T, matrices.abs(), rows=[rows.abs()]))
    assert_sums(cuda.multiply(rows, matrices, ends_of(counts), rung), exact, size)


@pytest.mark.parametrize(("rung", "dtype"), FULL)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_swiglu_is_fused(
    rung: str, dtype: torch.dtype, counts: list[int], widths: tuple[int, int], order: int | None
) -> None:
    (D, width), N, E = widths, sum(counts), len(counts)
    rows, gates = draw(N, D, dtype=dtype, seed=1), draw(N, dtype=dtype, seed=2)
    gate, up = draw(E, width, D, dtype=dtype, seed=3) / D**0.5, draw(E, width, D, dtype=dtype, seed=4) / D**0.5
    hidden, a, b = cuda.gate_up(rows, gate, up, gates, ends_of(counts), True, rung)
    exact_a, exact_b = (torch.cat(by_expert(counts, lambda x, w: x @ w.T, m, rows=[rows])) for m in (gate, up))
    exact = F.silu(exact_a) * exact_b * gates.double().unsqueeze(1)
    size = torch.cat(by_expert(counts, lambda x, w: x @ w.T, gate.abs(), rows=[rows.abs()])) + 1
    assert a is not None
    assert b is not None
    assert_sums(a, exact_a, size)
    assert_sums(b, exact_b, size)
    assert_sums(hidden, exact, size * (1 + exact_b.abs()) * gates.double().abs().unsqueeze(1))
    alone, no_a, no_b = cuda.gate_up(rows, gate, up, gates, ends_of(counts), False, rung)
    assert (no_a, no_b) == (None, None)
    assert torch.equal(alone, hidden)


@pytest.mark.parametrize(("rung", "dtype"), FULL)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_swiglu_backward_is_fused(
    rung: str, dtype: torch.dtype, counts: list[int], widths: tuple[int, int], order: int | None
) -> None:
    """Against autograd in float64, from the same rounded a and b."""
    (D, width), N, E = widths, sum(counts), len(counts)
    dy, down = draw(N, D, dtype=dtype, seed=1), draw(E, D, width, dtype=dtype, seed=2) / D**0.5
    a, b, gates = (draw(*s, dtype=dtype, seed=n) for n, s in ((3, (N, width)), (4, (N, width)), (5, (N,))))
    wide = [tensor.double().requires_grad_() for tensor in (a, b, gates)]
    hidden = F.silu(wide[0]) * wide[1]
    d = torch.cat(by_expert(counts, lambda y, w: y @ w, down, rows=[dy]))
    size = torch.cat(by_expert(counts, lambda y, w: y @ w, down.abs(), rows=[dy.abs()]))
    exact = torch.autograd.grad(hidden * wide[2].unsqueeze(1), wide, d)
    da, db, mine, d_gates = cuda.hidden_backward(dy, down, a, b, gates, ends_of(counts), rung)
    assert da is a
    assert db is b
    scale = size * (1 + wide[0].abs().detach()) * (1 + wide[1].abs().detach()) * (1 + gates.double().abs().unsqueeze(1))
    assert_sums(da, exact[0], scale)
    assert_sums(db, exact[1], scale)
    assert_sums(mine, (hidden * wide[2].unsqueeze(1)).detach(), scale)
    assert d_gates.dtype == torch.float32
    assert_sums(d_gates, exact[2], (size * hidden.abs().detach()).sum(dim=1) + 1e-6)


@pytest.mark.parametrize(("rung", "dtype"), FULL)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_gradients_of_rows_and_of_matrices(
    rung: str, dtype: torch.dtype, counts: list[int], widths: tuple[int, int], order: int | None
) -> None:
    (D, width), N, E = widths, sum(counts), len(counts)
    da, db = draw(N, width, dtype=dtype, seed=1), draw(N, width, dtype=dtype, seed=2)
    gate, up = draw(E, width, D, dtype=dtype, seed=3), draw(E, width, D, dtype=dtype, seed=4)

    def both(a: Tensor, b: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return a @ v + b @ w

    exact = torch.cat(by_expert(counts, both, gate, up, rows=[da, db]))
    size = torch.cat(by_expert(counts, both, gate.abs(), up.abs(), rows=[da.abs(), db.abs()]))
    assert_sums(cuda.rows_backward(da, db, gate, up, ends_of(counts), rung), exact, size)
    rows = draw(N, D, dtype=dtype, seed=5)
    mine = cuda.weights_backward(da, rows, ends_of(counts), rung)
    exact = torch.stack(by_expert(counts, lambda a, x: a.T @ x, rows=[da, rows]))
    assert_sums(mine, exact, torch.stack(by_expert(counts, lambda a, x: a.T @ x, rows=[da.abs(), rows.abs()])))
    assert not mine[[e for e, count in enumerate(counts) if count == 0]].any()


@pytest.mark.parametrize("rung", ["mma", "hopper"])
def test_a_bad_row_of_the_next_expert_stays_there(rung: str, order: int | None) -> None:
    """Tiles overlap the next expert's rows: NaN times zero must not come in."""
    counts, N = [70, 60], 130
    left, right = draw(N, 64, dtype=torch.bfloat16, seed=1), draw(N, 128, dtype=torch.bfloat16, seed=2)
    left[70], right[71] = torch.nan, torch.inf
    first, second = cuda.weights_backward(left, right, ends_of(counts), rung)
    assert first.isfinite().all()
    assert not second.isfinite().any()
    out = cuda.multiply(right, draw(2, 64, 128, dtype=torch.bfloat16, seed=3), ends_of(counts), rung)
    assert out[:71].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 8, 64, 2100])
def test_permute_and_combine_move_rows(dtype: torch.dtype, width: int, order: int | None) -> None:
    token = torch.tensor([3, 0, 0, 2, 3, 1])
    x = draw(5, width, dtype=dtype, seed=0)
    rows = cuda.permute(x, token)
    assert torch.equal(rows, x[token])
    place = torch.tensor([[1, 2], [5, -1], [3, -1], [4, 0], [-1, -1]], dtype=torch.int32)
    exact = torch.zeros(5, width, dtype=torch.float64).index_add(0, token, rows.double())
    assert_sums(cuda.combine(rows, place), exact, exact.abs())


def a_rule(config: MoEConfig) -> Rule:
    return Rule(config.top_k, config.scoring_func, config.n_group, config.topk_group, config.group_score,
                config.norm_topk_prob, config.routed_scaling_factor)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.sampled_from([1, 2, 5, 16, 64, 160, 256]), st.integers(0, 2**31), st.data())
def test_the_router_is_the_layers_router(T: int, E: int, seed: int, data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([n for n in (1, 2, 8) if E % n == 0]))
    reached = data.draw(st.integers(1, groups))
    K = data.draw(st.integers(1, min(8, reached * E // groups)))
    two = data.draw(st.sampled_from(["max", "top2"] if E // groups >= 2 else ["max"]))
    normalise = K > 1 and data.draw(st.booleans())
    config = MoEConfig(
        n_routed_experts=E,
        top_k=K,
        expert_width=8,
        scoring_func=data.draw(st.sampled_from(["softmax", "sigmoid"])),
        n_group=groups,
        topk_group=reached,
        group_score=two,
        norm_topk_prob=normalise,
        routed_scaling_factor=2.5,
        expert_bias=True,
    )
    torch.manual_seed(seed)
    router = Router(12, config, vocab_size=1)
    torch.nn.init.normal_(router.weight)
    router.expert_bias.normal_(std=0.1)
    x = torch.randn(T, 12)
    theirs = router(x, (1, T))
    scores, ids, gates, counts = route(theirs.logits.detach().contiguous(), a_rule(config), router.expert_bias)
    torch.testing.assert_close(scores, theirs.scores, rtol=0, atol=1e-6)
    same = (ids == theirs.topk_ids).all(dim=1)
    is_clear = clear(theirs.scores.detach() + router.expert_bias, config)
    assert is_clear.float().mean() > 0.9 or T < 10
    assert same[is_clear].all()
    torch.testing.assert_close(gates[same], theirs.gates[same], rtol=1e-6, atol=1e-6)
    assert torch.equal(counts, torch.bincount(ids.flatten(), minlength=E).int())


def clear(ranked: Tensor, config: MoEConfig) -> Tensor:
    """Tokens (T,) whose choices all have a margin above 1e-6: between neighbours in rank down to the first left out."""
    groups, K = config.n_group, config.top_k
    worth = ranked.view(len(ranked), groups, ranked.shape[1] // groups)
    worth = worth.topk(2 if config.group_score == "top2" else 1, dim=-1).values.sum(dim=-1)
    last = worth.topk(min(config.topk_group + 1, groups)).values[:, config.topk_group - 1 :].diff().abs()
    best = limit_groups(ranked, groups, config.topk_group, config.group_score)
    best = best.topk(min(K + 1, ranked.shape[1])).values.diff().abs()
    return (last > 1e-6).all(dim=1) & (best > 1e-6).all(dim=1)


def test_equal_scores_go_to_the_lower_id() -> None:
    logits = torch.zeros(3, 16)
    logits[1, 5] = logits[1, 9] = 1.0
    ids = route(logits, Rule(top_k=3))[1]
    assert ids.tolist() == [[0, 1, 2], [5, 9, 0], [0, 1, 2]]
    grouped = route(logits, Rule(top_k=3, n_group=4, topk_group=2))[1]
    assert grouped.tolist() == [[0, 1, 2], [5, 9, 4], [0, 1, 2]]


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalise", [False, True])
def test_the_routers_gradient(scoring_func: str, normalise: bool) -> None:
    config = MoEConfig(
        n_routed_experts=40,
        top_k=4,
        expert_width=8,
        scoring_func=scoring_func,
        norm_topk_prob=normalise,
        routed_scaling_factor=1.5,
    )
    logits = draw(33, 40, dtype=torch.float32, seed=0).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    scores, ids, gates, _ = route(logits, a_rule(config))
    exact = wide.sigmoid() if scoring_func == "sigmoid" else wide.softmax(dim=1)
    chosen = exact.gather(1, ids)
    exact_gates = 1.5 * (chosen / chosen.sum(dim=1, keepdim=True) if normalise else chosen)
    d_scores, d_gates = draw(33, 40, dtype=torch.float64, seed=1), draw(33, 4, dtype=torch.float64, seed=2)
    (mine,) = torch.autograd.grad((scores * d_scores.float()).sum() + (gates * d_gates.float()).sum(), logits)
    (theirs,) = torch.autograd.grad((exact * d_scores).sum() + (exact_gates * d_gates).sum(), wide)
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)


def test_a_nan_finds_no_expert_and_is_not_counted() -> None:
    logits = torch.zeros(2, 8)
    logits[0, 3] = torch.nan
    _, ids, _, counts = route(logits, Rule(top_k=2))
    assert ids.tolist() == [[-1, -1], [0, 1]]
    assert int(counts.sum()) == 2


X, W, ENDS = torch.zeros(4, 16), torch.zeros(2, 8, 16), torch.tensor([1, 4], dtype=torch.int32)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "dtype": (lambda: cuda.multiply(X.half(), W.half(), ENDS), "rows: these kernels take float32 and bfloat16, not"),
    "two dtypes": (lambda: cuda.multiply(X, W.bfloat16(), ENDS), "matrices: must have dtype and device of rows"),
    "strides": (lambda: cuda.multiply(torch.zeros(16, 4).T, W, ENDS), r"rows: must be contiguous, .* \.contiguous"),
    "a slice": (
        lambda: cuda.multiply(torch.zeros(65)[1:].view(4, 16), W, ENDS),
        "rows: must begin at a multiple of 16",
    ),
    "shape": (lambda: cuda.multiply(X, torch.zeros(2, 8, 12), ENDS), r"matrices: must be of shape \(2, 8, 16\), not"),
    "no experts": (lambda: cuda.multiply(X, W[:0], ENDS[:0]), "experts = 0: must be a whole number of at least 1"),
    "ends": (lambda: cuda.multiply(X, W, ENDS.long()), "ends: must be torch.int32"),
    "rung": (lambda: cuda.multiply(X, W, ENDS, "fast"), "rung = 'fast': must be one of naive, tiled"),
    "float rung": (lambda: cuda.multiply(X, W, ENDS, "mma"), "rung = 'mma': needs bfloat16, not torch.float32"),
    "odd width": (
        lambda: cuda.multiply(torch.zeros(4, 6).bfloat16(), torch.zeros(2, 8, 6).bfloat16(), ENDS, "hopper"),
        r"rung = 'hopper': needs widths that are multiples of 8, not \[6, 8\]; use 'tiled'",
    ),
    "a rung of one product": (lambda: cuda.weights_backward(X, X, ENDS, "wmma"), "rung = 'wmma': must be one of tiled"),
    "token dtype": (lambda: cuda.permute(X, torch.zeros(2, dtype=torch.int32)), "token: must be torch.int64"),
    "too many experts": (lambda: route(torch.zeros(2, 600), Rule(2)), "experts = 600: must be .* at most 512"),
    "too many choices": (lambda: Rule(40), "top_k = 40: must be .* at most 32"),
    "unreachable": (lambda: route(torch.zeros(2, 8), Rule(3, n_group=4)), "top_k = 3: must be at most 2"),
    "logits": (lambda: route(torch.zeros(2, 8).double(), Rule(2)), "logits: must be torch.float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        call()


def test_indices_out_of_range_end_the_launch() -> None:
    with pytest.raises(RunError, match=r"permute: .*token 4 is not in 0 \.\. 3"):
        cuda.permute(X, torch.tensor([0, 4]))
    with pytest.raises(RunError, match=r"combine: .*row 9 is not in 0 \.\. 3"):
        cuda.combine(X, torch.tensor([[9]], dtype=torch.int32))
    with pytest.raises(RunError, match=r"multiply: .*ends\[-1\] = 4 must be the number of rows, 5"):
        cuda.multiply(torch.zeros(5, 16), W, ENDS)


@pytest.mark.parametrize(("rung", "dtype"), FULL)
def test_nothing_to_do_is_no_error(rung: str, dtype: torch.dtype) -> None:
    none, ends, w = torch.zeros(0, 16, dtype=dtype), torch.zeros(2, dtype=torch.int32), W.to(dtype)
    narrow, gates = torch.zeros(0, 8, dtype=dtype), torch.zeros(0, dtype=dtype)
    assert cuda.permute(X, torch.zeros(0, dtype=torch.int64)).shape == (0, 16)
    assert cuda.multiply(none, w, ends, rung).shape == (0, 8)
    assert cuda.gate_up(none, w, w, gates, ends, True, rung)[0].shape == (0, 8)
    assert cuda.hidden_backward(none, w.mT.contiguous(), narrow, narrow, gates, ends, rung)[3].shape == (0,)
    assert cuda.rows_backward(narrow, narrow, w, w, ends, rung).shape == (0, 16)
    assert not cuda.weights_backward(none, none, ends).any()
    assert cuda.combine(none, torch.zeros(0, 2, dtype=torch.int32)).shape == (0, 16)
    assert route(torch.zeros(0, 8), Rule(2))[1].shape == (0, 2)
