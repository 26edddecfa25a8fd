"""One grouped product by every way there is: our rungs, Triton, torch's own, a loop over cuBLAS, one dense product."""

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
from dsmoe_lite.bench.timing import Key, captured, turns
from dsmoe_lite.common.errors import RunError
from dsmoe_lite.kernels import cuda
from dsmoe_lite.kernels.work import grouped_product

TOP = ("mma", "hopper")  # rungs that are measured everywhere
LIMITS = {torch.bfloat16: 1e-2, torch.float32: 1e-5}  # of the norm, against float64
DENSE = "dense product"
Product = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """rows (N, k) times matrices (E, n, k); `rows` an expert in the mean, uniform or by Zipf's weights 1 / rank."""

    experts: int
    k: int
    n: int
    rows: int
    routing: str = "uniform"

    def counts(self) -> list[int]:
        """Rows of each expert; E * rows in all."""
        total = self.experts * self.rows
        if self.routing == "uniform":
            return [self.rows] * self.experts
        weights = [1 / rank for rank in range(1, self.experts + 1)]
        counts = [int(total * weight / sum(weights)) for weight in weights]
        counts[0] += total - sum(counts)
        return counts

    @property
    def named(self) -> dict[str, Any]:
        """Its columns in a table."""
        return {"experts": self.experts, "k": self.k, "n": self.n, "rows": self.rows, "routing": self.routing}


def products(case: Case, rungs: Sequence[str], device: str, dtype: torch.dtype) -> dict[str, Product]:
    """Every way to compute one product of `case`, by name, on random data; none has been tried yet."""
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


def tried(ways: dict[str, Product], notes: Notes) -> dict[str, Product]:
    """The ways that run here; what the others say goes into `notes`."""
    return {name: way for name, way in ways.items() if attempt(name, way, notes) is not None}


def ready(ways: Mapping[Key, Product], device: str, notes: Notes) -> dict[Key, Step]:
    """The ways as they are timed: on a GPU as graphs; what cannot be captured is timed as it is called."""
    graphs = {name: attempt(f"a graph of {name}", partial(captured, way, device), notes) for name, way in ways.items()}
    return {name: graphs[name] or way for name, way in ways.items()}


def check_products(
    case: Case, rungs: Sequence[str], device: str, dtype: torch.dtype, notes: Notes
) -> list[dict[str, Any]]:
    """Hold every way against float64: rows {by, error}, of the norm. RunError names the first that is wrong."""
    ways = tried(products(case, rungs, device, dtype), notes)
    del ways[DENSE]  # it multiplies all rows by one matrix: another product
    draw, counts = torch.Generator(device).manual_seed(0), case.counts()
    rows = torch.randn(sum(counts), case.k, generator=draw, device=device, dtype=dtype).double()
    matrices = torch.randn(case.experts, case.n, case.k, generator=draw, device=device, dtype=dtype).double()
    exact = torch.cat([x @ w.T for x, w in zip(rows.split(counts), matrices, strict=True)])
    found = []
    for name, way in ways.items():
        error = float((way().double() - exact).norm() / exact.norm())
        if not error <= LIMITS[dtype]:
            raise RunError(f"{name}: differs from float64 by {error:.1e} of the norm, nothing was timed")
        found.append({"what": "product", "by": name, "error": error})
    return found


def time_products(
    case: Case, rungs: Sequence[str], device: str, dtype: torch.dtype, rounds: int, repeat: int, notes: Notes
) -> list[dict[str, Any]]:
    """Time every way in turns: rows with milliseconds, TFLOP/s, and time of the dense product over its own."""
    steps = ready(tried(products(case, rungs, device, dtype), notes), device, notes)
    if DENSE not in steps:
        notes.append(f"{case}: left out, the dense product does not run")
        return []
    seconds = turns(steps, rounds, device, f"{case.experts} experts, {case.rows} rows", repeat)
    flops, found = grouped_product(case.experts * case.rows, case.experts, case.k, case.n).flops, []
    for name, own in seconds.items():
        middle, low, high = (1000 * value for value in median_interval(own))
        of_dense = statistics.median(dense / mine for dense, mine in zip(seconds[DENSE], own, strict=True))
        row = {"by": name, "milliseconds": middle, "low": low, "high": high, "TFLOP/s": flops / middle / 1e9}
        found.append(case.named | row | {"of dense": of_dense})
    return found
