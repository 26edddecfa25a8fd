"""The experts by hand-written kernels, and how `auto` comes to them."""

import logging
import sys
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from needs import needs_gxx

from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.kernels import cuda
from dsmoe_lite.layers import selftest
from dsmoe_lite.layers.experts import Experts, choose_backend, kernels_for
from dsmoe_lite.layers.fused import KERNELS
from dsmoe_lite.layers.router import Routing

T, E, K, D, WIDTH = 60, 5, 2, 24, 40
CPU = torch.device("cpu")


def a_routing(dtype: torch.dtype = torch.float32) -> Routing:
    draw = torch.Generator().manual_seed(0)
    ids = torch.rand(T, E, generator=draw).topk(K).indices
    kept = torch.rand(T, K, generator=draw) < 0.9
    gates = torch.rand(T, K, generator=draw).to(dtype).requires_grad_()
    return Routing(torch.zeros(T, E), torch.zeros(T, E), ids, gates, kept, (1, T))


def some_experts(backend: str, dtype: torch.dtype) -> Experts:
    torch.manual_seed(0)
    experts = Experts(E, D, WIDTH, backend)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return experts.to(torch.bfloat16).to(dtype)  # the same numbers in every dtype


def output(experts: Experts, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Dispatch, run the experts, combine."""
    dispatched = experts.dispatch(x, routing)
    return experts.combine(experts(dispatched), dispatched)


def results(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """The output and all gradients."""
    draw, experts = torch.Generator().manual_seed(1), some_experts(backend, dtype)
    x, dy = (torch.randn(T, D, generator=draw).to(torch.bfloat16).to(dtype) for _ in range(2))
    routing = a_routing(dtype)
    y = output(experts, x.requires_grad_(), routing)
    return [y.detach(), *torch.autograd.grad(y, [*experts.parameters(), x, routing.gates], dy)]


@needs_gxx
def test_float32_is_the_loops_to_a_millionth() -> None:
    for mine, exact in zip(results("cuda", torch.float32), results("loop", torch.float64), strict=True):
        assert (mine.double() - exact).abs().max() <= 1e-6 * exact.abs().max()


@needs_gxx
def test_bfloat16_is_no_further_from_the_truth_than_the_loop_in_bfloat16() -> None:
    exact = results("loop", torch.float64)
    for mine, theirs, truth in zip(
        results("cuda", torch.bfloat16), results("loop", torch.bfloat16), exact, strict=True
    ):
        assert (mine.double() - truth).norm() <= 1.2 * (theirs.double() - truth).norm()


@needs_gxx
def test_a_graph_is_used_once() -> None:
    """The gradients of a and b were written over them: a second pass must fail, not be wrong."""
    y = output(some_experts("cuda", torch.float32), torch.randn(T, D, requires_grad=True), a_routing())
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@needs_gxx
def test_between_the_passes_only_a_and_b_are_kept_and_without_gradients_nothing() -> None:
    experts, routing = some_experts("cuda", torch.float32), a_routing()
    known, numbers = {weight.data_ptr() for weight in experts.parameters()}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in known and tensor.is_floating_point():
            numbers.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = torch.randn(T, D, requires_grad=True)
        output(experts, x, routing)
        N = int(routing.kept.sum())
        assert sum(numbers) <= 2 * N * WIDTH + T * D + N
        numbers.clear()
        with torch.no_grad():
            output(experts, x, routing)
    assert not numbers


@needs_gxx
def test_without_gradients_a_and_b_are_not_even_written(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, right = [], cuda.gate_up
    monkeypatch.setattr(cuda, "gate_up", lambda *given: kept.append(given[-1]) or right(*given))
    experts, x = some_experts("cuda", torch.float32), torch.randn(T, D)
    with torch.no_grad():
        output(experts, x, a_routing())
    output(experts, x, a_routing())
    assert kept == [False, True]


@needs_gxx
def test_a_slice_and_a_transposed_view_are_laid_out() -> None:
    x = torch.randn(D * T + 1)[1:].view(D, T).T
    mine = output(some_experts("cuda", torch.float32), x, a_routing())
    torch.testing.assert_close(mine, output(some_experts("loop", torch.float32), x, a_routing()))


def test_what_the_kernels_do_not_take_is_said() -> None:
    with pytest.raises(InputError, match=r"these kernels take float32 and bfloat16, not torch\.float64"):
        results("cuda", torch.float64)


# ---- auto


@pytest.mark.parametrize(
    ("dtype", "widths", "names"),
    [
        (torch.bfloat16, (64, 128), ["cuda", "triton"]),
        (torch.bfloat16, (64, 100), ["triton"]),
        (torch.float16, (64, 128), ["triton"]),
        (torch.float32, (64, 128), []),
    ],
)
def test_kernels_are_taken_where_they_feed_tensor_cores(
    dtype: torch.dtype, widths: tuple[int, int], names: list[str]
) -> None:
    assert kernels_for(dtype, *widths) == names


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, *working: str) -> str:
    """What `auto` takes for bfloat16 on a GPU on which these kernels work."""
    module = "dsmoe_lite.layers.experts"
    monkeypatch.setattr(f"{module}.passes_selftest", lambda name, device: name in working)
    monkeypatch.setattr(f"{module}.can_group", lambda x, gate: True)
    x = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=CPU)
    return choose_backend(cast(torch.Tensor, x), torch.empty(2, 16, 8))


def test_auto_takes_the_first_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_a_gpu(monkeypatch, "cuda", "triton") == "cuda"
    assert on_a_gpu(monkeypatch, "triton") == "triton"
    assert on_a_gpu(monkeypatch) == "grouped"


def differs(dtype: torch.dtype = torch.bfloat16) -> str | None:
    return selftest.disagreement(KERNELS["cuda"], CPU, (70, 0, 30), (72, 136), dtype)


@needs_gxx
def test_kernels_that_agree_are_ready(caplog: pytest.LogCaptureFixture) -> None:
    assert differs() is None
    assert differs(torch.float32) is None
    assert selftest.passes_selftest("cuda", CPU)
    assert not caplog.messages


@pytest.mark.parametrize(
    "product", ["permute", "gate_up", "multiply", "combine", "hidden_backward", "weights_backward", "rows_backward"]
)
@needs_gxx
def test_kernels_that_disagree_are_not(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, factor = getattr(cuda, product), 1.04

    def wrong(*given: object) -> object:
        result = right(*given)
        return result * factor if isinstance(result, torch.Tensor) else (result[0] * factor, *result[1:])

    monkeypatch.setattr(cuda, product, wrong)
    assert " differs from the loop's by " in str(differs())
    factor = torch.nan
    assert "by nan" in str(differs())


def test_a_process_that_crashes_or_hangs_is_survived() -> None:
    python = [sys.executable, "-c"]
    crashed = selftest.first_line([*python, "import os; os.abort()"], 60)
    assert crashed.startswith("the self-test ended with code -6")
    assert selftest.first_line([*python, "while True: pass"], 0.5) == "no answer in 0.5 s"
    assert selftest.first_line([*python, "1 / 0"], 60).endswith("ZeroDivisionError: division by zero")
    assert selftest.first_line([*python, "print('no nvcc'); print('more')"], 60) == "no nvcc"
    assert not selftest.first_line([*python, ""], 60)


def test_what_the_trial_meets_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RunError("nvcc not found: pip install\nand more")

    monkeypatch.setattr(selftest, "disagreement", broken)
    assert selftest.selftest("cuda", CPU) == "nvcc not found: pip install"


def test_the_reason_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(selftest, "first_line", lambda command, timeout: "nvcc not found: pip install")
    selftest.passes_selftest.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not selftest.passes_selftest("cuda", CPU)
        assert not selftest.passes_selftest("cuda", CPU)
    selftest.passes_selftest.cache_clear()
    assert [record.message for record in caplog.records] == [
        "backend 'auto' continues without 'cuda' on cpu: nvcc not found: pip install"
    ]
