"""One grouped product by every implementation: our rungs, Triton, torch, a loop of products, one dense product."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe_lite.bench.attempt import Notes, attempt
from dsmoe_lite.bench.ratios import Step, median_interval
from dsmoe_lite.bench.timing import Key, as_cuda_graph, time_interleaved
from dsmoe_lite.common.errors import RunError
from dsmoe_lite.kernels import cuda
from dsmoe_lite.kernels.work import grouped_product

FASTEST_RUNGS = ("mma", "hopper")  # the rungs that run every case
LIMITS = {torch.bfloat16: 1e-2, torch.float32: 1e-5}  # error relative to the norm, against float64
DENSE = "dense product"
Product = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """rows (N, k) times matrices (E, n, k): `rows` per expert on average, uniform or skewed by Zipf weights."""

    experts: int
    k: int
    n: int
    rows: int
    routing: str = "uniform"

    def counts(self) -> list[int]:
        """Rows of each expert; their sum is E * rows."""
        total = self.experts * self.rows
        if self.routing == "uniform":
            return [self.rows] * self.experts
        weights = [1 / rank for rank in range(1, self.experts + 1)]
        counts = [int(total * weight / sum(weights)) for weight in weights]
        counts[0] += total - sum(counts)
        return counts

    @property
    def columns(self) -> dict[str, Any]:
        """The case as columns of a table."""
        return {"experts": self.experts, "k": self.k, "n": self.n, "rows": self.rows, "routing": self.routing}


def products(case: Case, rungs: Sequence[str], device: str, dtype: torch.dtype) -> dict[str, Product]:
    """Return every implementation of the product of `case` on random data, by name; some may fail on this machine."""
    counts, draw = case.counts(), torch.Generator(device).manual_seed(0)
    rows = torch.randn(sum(counts), case.k, generator=draw, device=device, dtype=dtype)
    matrices = torch.randn(case.experts, case.n, case.k, generator=draw, device=device, dtype=dtype)
    ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)

    def by_rung(rung: str) -> Product:
        return lambda: cuda.multiply(rows, matrices, ends, rung)

    def triton() -> Tensor:
        from dsmoe_lite.kernels import triton_kernels

        return triton_kernels.multiply(rows, matrices, ends)

    def loop() -> Tensor:
        out = rows.new_empty(len(rows), case.n)
        for x, w, y in zip(rows.split(counts), matrices, out.split(counts), strict=True):
            torch.mm(x, w.T, out=y)
        return out

    return {
        **{rung: by_rung(rung) for rung in rungs},
        "triton": triton,
        "F.grouped_mm": lambda: F.grouped_mm(rows, matrices.mT, offs=ends),
        "loop over products": loop,
        DENSE: lambda: F.linear(rows, matrices[0]),
    }


def runnable(steps: dict[str, Product], notes: Notes) -> dict[str, Product]:
    """Return the steps that run on this machine; `notes` gets the errors of the others."""
    return {name: step for name, step in steps.items() if attempt(name, step, notes) is not None}


def as_cuda_graphs(steps: Mapping[Key, Product], device: str, notes: Notes) -> dict[Key, Step]:
    """Return the steps as they are timed: on a GPU as CUDA graphs, except those that cannot be captured."""
    graphs = {
        name: attempt(f"a graph of {name}", partial(as_cuda_graph, step, device), notes) for name, step in steps.items()
    }
    return {name: graphs[name] or step for name, step in steps.items()}


def check_products(
    case: Case, rungs: Sequence[str], device: str, dtype: torch.dtype, notes: Notes
) -> list[dict[str, Any]]:
    """Compare every implementation with float64: rows {what, by, error}. Raises RunError naming the first wrong one."""
    implementations = runnable(products(case, rungs, device, dtype), notes)
    del implementations[DENSE]  # another product: it multiplies all rows by one matrix
    draw, counts = torch.Generator(device).manual_seed(0), case.counts()
    rows = torch.randn(sum(counts), case.k, generator=draw, device=device, dtype=dtype).double()
    matrices = torch.randn(case.experts, case.n, case.k, generator=draw, device=device, dtype=dtype).double()
    exact = torch.cat([x @ w.T for x, w in zip(rows.split(counts), matrices, strict=True)])
    results = []
    for name, multiply in implementations.items():
        error = float((multiply().double() - exact).norm() / exact.norm())
        if not error <= LIMITS[dtype]:
            raise RunError(f"{name}: differs from float64 by {error:.1e} of the norm; nothing was timed")
        results.append({"what": "product", "by": name, "error": error})
    return results


def time_products(
    case: Case, rungs: Sequence[str], device: str, dtype: torch.dtype, rounds: int, repeat: int, notes: Notes
) -> list[dict[str, Any]]:
    """Time every implementation: rows with milliseconds, TFLOP/s, and its speed relative to the dense product."""
    steps = as_cuda_graphs(runnable(products(case, rungs, device, dtype), notes), device, notes)
    if DENSE not in steps:
        notes.append(f"{case}: left out, because the dense product failed")
        return []
    seconds = time_interleaved(steps, rounds, device, f"{case.experts} experts, {case.rows} rows", repeat)
    flops, results = grouped_product(case.experts * case.rows, case.experts, case.k, case.n).flops, []
    for name, times in seconds.items():
        median, low, high = (1000 * value for value in median_interval(times))
        of_dense = statistics.median(dense / own for dense, own in zip(seconds[DENSE], times, strict=True))
        row = {"by": name, "milliseconds": median, "low": low, "high": high, "TFLOP/s": flops / median / 1e9}
        results.append(case.columns | row | {"of dense": of_dense})
    return results
