"""The shim that runs CUDA C++ on a CPU finds what it is there to find, in small kernels and in every kernel of ours."""

import ctypes
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from needs import needs_gxx
from torch import Tensor

from dsmoe_lite.common.errors import RunError
from dsmoe_lite.kernels import build, cuda, launch
from dsmoe_lite.kernels.cuda_router import Rule, route

pytestmark = needs_gxx

ORDERS = range(6)
REVERSE = """
#include "launch.cuh"
struct Shared { float part[128]; };
__global__ void reverse(float* x) {
  auto& shared = shared_memory<Shared>();
  shared.part[threadIdx.x] = x[threadIdx.x];
  %s
  x[threadIdx.x] = shared.part[127 - threadIdx.x];
  %s
}
extern "C" int run(float* x) { return launch(reverse, dim3{1}, 128, sizeof(Shared), nullptr, x); }
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))


def reversed_by(first: str, then: str = "", order: int = 0) -> Tensor:
    library, x = build.cpu_library_of(REVERSE % (first, then)), torch.arange(128.0)
    library.cuda_on_cpu_schedule(ctypes.c_uint(order))
    launch.launch_on_cpu(library, "run", x)
    return x


@pytest.mark.parametrize("order", ORDERS)
def test_a_right_kernel_is_right_in_every_order(order: int) -> None:
    assert torch.equal(reversed_by("__syncthreads();", order=order), torch.arange(128.0).flip(0))


@pytest.mark.parametrize("order", ORDERS)
def test_without_the_barrier_somebody_reads_what_nobody_wrote(order: int) -> None:
    assert reversed_by("", order=order).isnan().any()


def test_a_divergent_barrier_is_named_with_both_places() -> None:
    two = "if (threadIdx.x < 32) __syncthreads();\n  else __syncthreads();"
    with pytest.raises(RunError, match=r"divergent: thread 0 is in __syncthreads at kernel\.cu:7, thread 32"):
        reversed_by(two)


def test_a_barrier_that_some_never_reach_is_named() -> None:
    some = "if (threadIdx.x % 2) __syncthreads();"
    with pytest.raises(RunError, match=r"64 threads returned, 64 threads wait in __syncthreads at .*:7"):
        reversed_by(some)


def test_a_shuffle_that_half_a_warp_skips_is_named() -> None:
    half = "__syncthreads(); if (threadIdx.x % 32 < 16) x[0] += __shfl_xor_sync(0xFFFFFFFF, 1.0f, 1);"
    with pytest.raises(RunError, match=r"64 threads wait in __shfl_xor_sync at .*:9, 64 threads returned"):
        reversed_by("__syncthreads();", half)


def test_a_write_past_shared_memory_is_named() -> None:
    with pytest.raises(RunError, match="wrote past its shared memory"):
        reversed_by("__syncthreads();", "shared.part[128 + threadIdx.x] = 1;")


def test_what_does_not_compile_says_where() -> None:
    with pytest.raises(RunError, match=r"g\+\+ failed: .*:7.* error: .*nonsense"):
        reversed_by("nonsense();")


def test_no_gxx_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RunError, match=r"g\+\+ not found: .* apt install g\+\+"):
        reversed_by("__syncthreads(); /* not in the cache */")


def test_a_killed_compiler_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path))
    with pytest.raises(RunError):
        reversed_by("nonsense();")
    assert not list(tmp_path.rglob("*.so*")) + list(tmp_path.rglob("*.part"))


# ---- Every statement of ours that waits for somebody, taken away: the results must differ, or the launch must fail.

WAITS = re.compile(
    r"^ *(if \(read >= 0 && lane == 0\) )?(__syncthreads|__syncwarp|named_barrier|barrier_wait|barrier_arrive"
    r"|barrier_arrive_expect|copy_async_wait<.*>|copy_async_commit|product_wait<.*>|product_commit)\(.*?\);",
    re.MULTILINE,
)
COUNTS, N, E, D, WIDTH = [70, 0, 130], 200, 3, 200, 136


def grouped(rung: str, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(N, D), (E, WIDTH, D), (E, WIDTH, D), (N, WIDTH)]
    rows, gate, up, left = (torch.randn(*shape, generator=draw).to(dtype) for shape in shapes)
    ends = torch.tensor(COUNTS).cumsum(0).to(torch.int32)
    results: list[Tensor | None] = [cuda.multiply(rows, gate, ends, rung)]
    if rung in cuda.EVERYWHERE:
        results += cuda.gate_up(rows, gate, up, torch.ones(N, dtype=dtype), ends, True, rung)
        results += [cuda.weights_backward(left, rows, ends, rung), cuda.rows_backward(left, left, gate, up, ends, rung)]
    return [one for one in results if one is not None]


def routed() -> list[Tensor]:
    logits = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    results: list[Tensor] = []
    for rule in (Rule(6, n_group=8, topk_group=3, norm_topk_prob=True), Rule(6), Rule(6, "sigmoid")):
        scores, ids, gates, counts = route(logits, rule)
        (gradient,) = torch.autograd.grad(gates.square().sum() + scores.square().sum(), logits)
        results += [scores.detach(), ids, gates.detach(), counts, gradient]
    return results


FILES: dict[str, Callable[[], list[Tensor]]] = {
    "gemm_tiled.cuh": lambda: grouped("tiled", torch.float32),
    "gemm_wmma.cuh": lambda: grouped("wmma", torch.bfloat16),
    "gemm_mma.cuh": lambda: grouped("mma", torch.bfloat16),
    "gemm_hopper.cuh": lambda: grouped("hopper", torch.bfloat16),
    "router.cuh": routed,
}
EACH = [(name, n) for name in FILES for n, _ in enumerate(WAITS.finditer((build.SOURCES / name).read_text()))]


def test_every_kind_of_waiting_is_among_them() -> None:
    assert len(EACH) >= 22
    found = {match[2] for name in FILES for match in WAITS.finditer((build.SOURCES / name).read_text())}
    assert len(found) == 11, found


@pytest.mark.parametrize(("name", "number"), EACH)
def test_no_waiting_is_missed(name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FILES[name]
    right = run()
    for file in build.SOURCES.iterdir():
        if file.suffix in (".cu", ".cuh", ".h"):
            shutil.copy(file, tmp_path)
    text = (tmp_path / name).read_text()
    taken = list(WAITS.finditer(text))[number]
    (tmp_path / name).write_text(text[: taken.start()] + text[taken.end() :])
    library = build.load_for_cpu(build.compile_for_cpu(tmp_path / "moe.cu", "-O0"))
    library.moe_error.restype = ctypes.c_char_p
    monkeypatch.setattr(launch, "cpu_library", lambda: library)
    for order in ORDERS:
        library.cuda_on_cpu_schedule(ctypes.c_uint(order))
        try:
            if not all(map(torch.equal, run(), right)):
                return
        except RunError:
            return
    pytest.fail(f"{name}: nobody noticed that {taken.group().strip()} was gone")
