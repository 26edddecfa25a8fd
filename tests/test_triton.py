"""Triton's kernels against loops in float64: in its interpreter, compiled for Hopper, and on a GPU where there is one.

Triton decides at its import whether it interprets, for the whole process; so every check runs in a process of its kind.
"""

import importlib
import importlib.util
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmoe_lite.common.errors import InputError, RunError

TWINS = "dsmoe_lite.kernels.triton_kernels"
Run = Callable[..., Any]
# rows of each expert, D, F. The interpreter's tiles have 16 rows, 16 or 32 columns and add up 16 products at a time; a
# band has 8 rows of tiles.
CASES = {
    "even": ([16, 32, 16, 16], 32, 64),
    "empty experts": ([0, 5, 0, 0, 18, 0], 24, 20),
    "tails": ([7, 33, 1, 40], 37, 45),
    "one token": ([0, 1, 0], 16, 8),
    "all on one expert": ([0, 150, 0, 0], 19, 70),
    "one expert": ([21], 17, 9),
    "widths of one": ([3, 0, 2], 1, 1),
    "no rows": ([0, 0, 0], 12, 8),
}
PLACES = {  # T, K, N, D
    "even": (32, 4, 128, 64),
    "tails": (70, 3, 50, 37),
    "K = 1": (9, 1, 9, 20),
    "wide": (3, 2, 5, 1100),
    "one token": (1, 2, 2, 8),
    "no tokens": (0, 2, 5, 8),
    "no rows": (6, 2, 0, 8),
}
CPU = [("cpu", torch.float32), ("cpu", torch.float16)]
GPU = [("cuda", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16) if torch.cuda.is_available()]
# half the step from 1 to the next number, and half the smallest number: what rounding a result to 16 bit costs
ROUNDING = {torch.float32: (0.0, 0.0), torch.float16: (2**-11, 2**-25), torch.bfloat16: (2**-8, 0.0)}


def _start(setting: dict[str, str | None]) -> None:
    for name, value in setting.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    if importlib.util.find_spec("triton") is None:
        missing = "triton not found: pip install triton (Linux only)"
        if "triton" in os.environ.get("DSMOE_REQUIRE", "").split(","):
            pytest.fail(missing)
        pytest.skip(missing)


def _a_process(**setting: str | None) -> Iterator[Run]:
    """A function that calls others in a fresh process; what they raise comes back."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_start, initargs=(setting,)) as pool:
        yield lambda call, *args: pool.submit(call, *args).result()


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Run]:
    yield from _a_process(TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    cache = str(tmp_path_factory.mktemp("triton"))
    yield from _a_process(TRITON_INTERPRET=None, TRITON_CACHE_DIR=cache, TRITON_DUMP_PTXAS_LOG="1")


def twins() -> Any:
    return importlib.import_module(TWINS)


class Draw:
    """Random tensors of a case, rounded to a dtype, so that the exact result of what a kernel is given is known."""

    def __init__(self, case: str, device: str, dtype: torch.dtype) -> None:
        self.counts, self.D, self.F = CASES[case]
        self.N, self.E = sum(self.counts), len(self.counts)
        self.device, self.dtype, self.random = device, dtype, torch.Generator().manual_seed(0)
        self.ends = torch.tensor(self.counts).cumsum(0).to(device, torch.int32)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.random) * scale).to(self.device, self.dtype)

    def each(self, left: Tensor, right: Tensor) -> Tensor:
        """The rows of every expert times its matrix, in float64."""
        parts = zip(left.double().split(self.counts), right.double(), strict=True)
        return torch.cat([rows @ matrix for rows, matrix in parts])

    def close(self, mine: Tensor, exact: Tensor, size: Tensor) -> None:
        """Differ by at most 1e-6 of the sum of absolute products, `size`, and by the rounding of the result."""
        relative, least = ROUNDING[mine.dtype]
        allowed = 1e-6 * size + relative * exact.abs() * 1.001 + least
        over = (mine.double() - exact).abs() - allowed
        assert mine.shape == exact.shape
        assert not (over > 0).any(), f"{int((over > 0).sum())} of {over.numel()} differ, by up to {over.max():.3g}"
        assert mine.isfinite().all()


def check_gate_up(draw: Draw) -> None:
    N, E, D, F = draw.N, draw.E, draw.D, draw.F
    rows, gate, up, gates = draw(N, D), draw(E, F, D, scale=D**-0.5), draw(E, F, D, scale=D**-0.5), draw(N)
    hidden, a, b = twins().gate_up(rows, gate, up, gates, draw.ends, True)
    exact_a, exact_b = draw.each(rows, gate.mT), draw.each(rows, up.mT)
    size_a, size_b = draw.each(rows.abs(), gate.abs().mT), draw.each(rows.abs(), up.abs().mT)
    draw.close(a, exact_a, size_a)
    draw.close(b, exact_b, size_b)
    g = gates.double().unsqueeze(1)
    draw.close(hidden, exact_a * torch.sigmoid(exact_a) * exact_b * g, size_a * size_b * g.abs())
    again, *none = twins().gate_up(rows, gate, up, gates, draw.ends, False)
    assert torch.equal(again, hidden)
    assert none == [None, None]


def check_multiply(draw: Draw) -> None:
    rows, matrices = draw(draw.N, draw.D), draw(draw.E, draw.F, draw.D)
    out = twins().multiply(rows, matrices, draw.ends)
    draw.close(out, draw.each(rows, matrices.mT), draw.each(rows.abs(), matrices.abs().mT))


def check_hidden_backward(draw: Draw) -> None:
    N, E, D, F = draw.N, draw.E, draw.D, draw.F
    dy, down, a, b, gates = draw(N, D), draw(E, D, F, scale=D**-0.5), draw(N, F), draw(N, F), draw(N)
    exact = [t.double().requires_grad_() for t in (a, b, gates)]
    hidden = exact[0] * torch.sigmoid(exact[0]) * exact[1] * exact[2].unsqueeze(1)
    d, size = draw.each(dy, down), draw.each(dy.abs(), down.abs())
    gradients = torch.autograd.grad((hidden * d).sum(), exact)
    x, y, g = (t.detach().abs() for t in exact)
    sizes = size * y * g.unsqueeze(1), size * x * g.unsqueeze(1), (size * x * y).sum(1)
    da, db, mine, d_gates = twins().hidden_backward(dy, down, a, b, gates, draw.ends)
    assert d_gates.dtype == torch.float32
    assert (da.data_ptr(), db.data_ptr()) == (a.data_ptr(), b.data_ptr())
    draw.close(mine, hidden.detach(), x * y * g.unsqueeze(1))
    for found, gradient, scale in zip((da, db, d_gates), gradients, sizes, strict=True):
        draw.close(found, gradient, scale)


def check_rows_backward(draw: Draw) -> None:
    N, E, D, F = draw.N, draw.E, draw.D, draw.F
    da, db, gate, up = draw(N, F), draw(N, F), draw(E, F, D), draw(E, F, D)
    size = draw.each(da.abs(), gate.abs()) + draw.each(db.abs(), up.abs())
    draw.close(twins().rows_backward(da, db, gate, up, draw.ends), draw.each(da, gate) + draw.each(db, up), size)


def check_weights_backward(draw: Draw) -> None:
    left, right = draw(draw.N, draw.F), draw(draw.N, draw.D)

    def exact(left: Tensor, right: Tensor) -> Tensor:
        return torch.stack([p.T @ q for p, q in zip(left.split(draw.counts), right.split(draw.counts), strict=True)])

    out = twins().weights_backward(left, right, draw.ends)
    left, right = left.double(), right.double()
    draw.close(out, exact(left, right), exact(left.abs(), right.abs()))


def check_kernel(check: Callable[[Draw], None], case: str, device: str, dtype: torch.dtype) -> None:
    check(Draw(case, device, dtype))


def check_permute_and_combine(case: str, device: str, dtype: torch.dtype) -> None:
    T, K, N, D = PLACES[case]
    draw, random = Draw("no rows", device, dtype), torch.Generator().manual_seed(1)
    x, token = draw(max(T, 1), D), torch.randint(max(T, 1), (N,), generator=random).to(device)
    assert torch.equal(twins().permute(x, token), x[token])
    rows, place = draw(N, D), (torch.randint(N + 1, (T, K), generator=random) - 1).to(device, torch.int32)
    exact, size = torch.zeros(2, T, D, dtype=torch.float64, device=device)
    for t in range(T):
        for n in place[t].tolist():
            if n >= 0:
                exact[t] += rows[n].double()
                size[t] += rows[n].double().abs()
    draw.close(twins().combine(rows, place), exact, size)


def check_refusals() -> None:
    """Every function checks its tensors in the same way; here are the ways to be wrong, and where each is said."""
    kernels, ends = twins(), torch.tensor([2, 3], dtype=torch.int32)
    multiply = kernels.multiply
    rows, matrices = torch.randn(3, 4), torch.randn(2, 5, 4)
    wrong: list[tuple[Callable[[], Any], str]] = [
        (partial(multiply, rows.bfloat16(), matrices.bfloat16(), ends), "triton: bfloat16 is wrong in Triton"),
        (partial(multiply, rows.double(), matrices, ends), r"rows.dtype = torch.float64: must be float32, float16"),
        (partial(multiply, rows, matrices.half(), ends), "matrices.dtype = torch.float16: must be torch.float32"),
        (partial(multiply, rows, matrices, ends.long()), "ends.dtype = torch.int64: must be torch.int32"),
        (partial(multiply, rows[:, :3].contiguous(), matrices, ends), r"matrices.shape = .*: must be \(E, P, K = 3\)"),
        (partial(multiply, rows.T.contiguous().T, matrices, ends), r"rows.stride\(\) = \(1, 3\): must be contig"),
        (partial(multiply, rows, matrices.mT, ends), r"matrices.shape = \(2, 4, 5\): must be \(E, P, K = 4\)"),
        (partial(multiply, rows, matrices, ends[:1]), r"ends.shape = \(1,\): must be \(E = 2\)"),
        (partial(multiply, rows[0], matrices, ends), r"rows.shape = \(4,\): must be \(N, K\)"),
        (partial(multiply, rows, matrices.to("meta"), ends), "matrices.device = 'meta': must be cpu"),
        (partial(kernels.weights_backward, rows, rows[1:], ends), r"right.shape = \(2, 4\): must be \(N = 3, Q\)"),
        (partial(kernels.rows_backward, rows, rows, matrices, matrices, ends), r"gate.shape = .* be \(E, F = 4, D\)"),
        (partial(kernels.gate_up, rows, matrices, matrices, rows[:, 0], ends, True), r"gates.stride\(\) = \(4,\)"),
        (partial(kernels.permute, rows, ends), "token.dtype = torch.int32: must be torch.int64"),
        (partial(kernels.combine, rows, ends.view(2, 1).long()),
         "row_of_choice.dtype = torch.int64: must be torch.int32"),
    ]  # fmt: skip
    for call, message in wrong:
        with pytest.raises(InputError, match=message):
            call()


def check_imports() -> None:
    """In a process that compiles: a CPU tensor, an interpreter asked for too late, and no Triton."""
    with pytest.raises(InputError, match=r"rows.device = 'cpu': Triton needs a GPU, or TRITON_INTERPRET=1 set before"):
        twins().multiply(torch.randn(3, 4), torch.randn(2, 5, 4), torch.tensor([2, 3], dtype=torch.int32))
    for change, error, message in (
        (
            partial(pytest.MonkeyPatch.setenv, name="TRITON_INTERPRET", value="1"),
            InputError,
            "changed after triton was",
        ),
        (
            partial(pytest.MonkeyPatch.setitem, dic=sys.modules, name="triton", value=None),
            RunError,
            "pip install triton",
        ),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.delitem(sys.modules, TWINS)
            change(patch)
            with pytest.raises(error, match=message):
                twins()


def compile_for_hopper(name: str) -> tuple[str, str]:
    """Compile one kernel for sm_90 in bfloat16, with its first tile; return the PTX and what ptxas says of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels, by_expert = twins(), {"BLOCK_E": 64, "BAND": 8}
    kernel, constants = {
        "permute": (kernels._add_rows, {"BLOCK_T": 1, "BLOCK_D": 1024}),
        "combine": (kernels._add_rows, {"BLOCK_T": 1, "BLOCK_D": 1024}),
        "gate_up": (kernels.GATE_UP, by_expert),
        "multiply": (kernels.MULTIPLY, {**by_expert, "left2": None, "right2": None, "TRANSPOSED": True}),
        "hidden_backward": (kernels.HIDDEN_BACKWARD, by_expert),
        "rows_backward": (kernels.MULTIPLY, {**by_expert, "TRANSPOSED": False}),
        "weights_backward": (kernels.WEIGHTS_BACKWARD, {}),
    }[name]
    options = dict(kernels.FUSED)
    if not isinstance(kernel, triton.JITFunction):
        tile = kernel.configs[0]
        options |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        kernel, constants = kernel.fn, constants | tile.kwargs
    pointers = {"ends": "*i32", "partial": "*fp32", "row_of_choice": "*i64" if name == "permute" else "*i32"}
    signature = {
        arg: "constexpr" if arg in constants else "i32" if arg.isupper() else pointers.get(arg, "*bf16")
        for arg in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
    log = StringIO()
    with redirect_stdout(log):
        source = ASTSource(kernel, signature, constants, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return compiled.asm["ptx"], log.getvalue()


KERNELS = [check_gate_up, check_multiply, check_hidden_backward, check_rows_backward, check_weights_backward]


@pytest.mark.parametrize(("device", "dtype"), CPU + GPU)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("check", KERNELS)
def test_kernel(
    check: Callable[[Draw], None], case: str, device: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("interpreter" if device == "cpu" else "compiler")(check_kernel, check, case, device, dtype)


@pytest.mark.parametrize(("device", "dtype"), CPU + GPU)
@pytest.mark.parametrize("case", PLACES)
def test_permute_and_combine(case: str, device: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue("interpreter" if device == "cpu" else "compiler")
    run(check_permute_and_combine, case, device, dtype)


def test_what_does_not_fit_is_refused_in_one_line(interpreter: Run) -> None:
    interpreter(check_refusals)


def test_without_a_gpu_an_interpreter_or_triton_one_line_says_so(compiler: Run) -> None:
    compiler(check_imports)


@pytest.mark.parametrize("name", ["permute", "combine"])
def test_copies_move_16_bytes_at_a_time(name: str, compiler: Run) -> None:
    ptx, log = compiler(compile_for_hopper, name)
    assert re.search(r"ld\.global\.v[24]", ptx)
    assert re.search(r"st\.global\.v[24]", ptx)
    assert "0 bytes spill stores" in log


@pytest.mark.parametrize("name", ["gate_up", "multiply", "hidden_backward", "rows_backward", "weights_backward"])
def test_products_use_hoppers_tensor_cores_and_loads_that_run_ahead(name: str, compiler: Run) -> None:
    """A few numbers a thread may spill, outside the sums' loop; a tile too large for the registers spills kilobytes."""
    ptx, log = compiler(compile_for_hopper, name)
    assert "wgmma.mma_async" in ptx
    assert "cp.async" in ptx
    (spilled,) = re.findall(r"(\d+) bytes spill stores", log)
    assert int(spilled) <= 256
