"""The memory bandwidth of permute and combine, also as a share of the bandwidth of a plain copy."""

import statistics
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dsmoe_lite.bench.attempt import Notes
from dsmoe_lite.bench.fixed_routing import uniform_ids
from dsmoe_lite.bench.grouped_products import as_cuda_graphs, runnable
from dsmoe_lite.bench.timing import time_interleaved
from dsmoe_lite.kernels import cuda
from dsmoe_lite.kernels.work import row_copies


def time_moves(
    n_tokens: int, top_k: int, width: int, device: str, dtype: torch.dtype, rounds: int, repeat: int, notes: Notes
) -> list[dict[str, Any]]:
    """Rows {what, by, GB/s, of copy}. Permute reads and writes N = T * K rows, combine reads N and writes T."""
    N = n_tokens * top_k
    order = uniform_ids(n_tokens, 64, top_k).flatten().argsort(stable=True)
    token = (order // top_k).to(device)
    row = torch.empty(N, dtype=torch.int32).index_copy(0, order, torch.arange(N, dtype=torch.int32))
    row = row.view(n_tokens, top_k).to(device)
    x, rows = (torch.randn(n, width, device=device, dtype=dtype) for n in (n_tokens, N))
    target = torch.empty_like(rows)
    steps: dict[str, Callable[[], Tensor]] = {
        "copy|copy": lambda: target.copy_(rows),
        "permute|cuda": lambda: cuda.permute(x, token),
        "combine|cuda": lambda: cuda.combine(rows, row),
        "permute|triton": lambda: _triton().permute(x, token),
        "combine|triton": lambda: _triton().combine(rows, row),
    }
    graphs = as_cuda_graphs(runnable(steps, notes), device, notes)
    seconds = time_interleaved(graphs, rounds, device, "permute and combine", repeat)
    size = rows.element_size()
    moved_bytes = {
        "copy": row_copies(N, N, width, size).bytes,
        "permute": row_copies(N, N, width, size).bytes,
        "combine": row_copies(N, n_tokens, width, size).bytes,
    }
    results = []
    for name, times in seconds.items():
        what, by = name.split("|")
        ratio = statistics.median(copy / own for copy, own in zip(seconds["copy|copy"], times, strict=True))
        bandwidth = moved_bytes[what] / statistics.median(times)
        of_copy = ratio * moved_bytes[what] / moved_bytes["copy"]
        results.append({"what": what, "by": by, "GB/s": bandwidth / 1e9, "of copy": of_copy})
    return results


def _triton() -> ModuleType:
    from dsmoe_lite.kernels import triton_kernels

    return triton_kernels
