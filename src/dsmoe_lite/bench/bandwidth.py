"""Permute and combine beside a plain copy: how many bytes a second, and which share of what the device copies."""

import statistics
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dsmoe_lite.bench.attempt import Notes
from dsmoe_lite.bench.fixed_routing import uniform_ids
from dsmoe_lite.bench.grouped_products import ready, tried
from dsmoe_lite.bench.timing import turns
from dsmoe_lite.kernels import cuda
from dsmoe_lite.kernels.work import row_copies


def time_moves(
    n_tokens: int, top_k: int, width: int, device: str, dtype: torch.dtype, rounds: int, repeat: int, notes: Notes
) -> list[dict[str, Any]]:
    """Rows {what, by, GB/s, of copy}. Permute reads and writes N = T * K rows, combine reads N and writes T."""
    N = n_tokens * top_k
    order = uniform_ids(n_tokens, 64, top_k).flatten().argsort(stable=True)
    token = (order // top_k).to(device)
    place = torch.empty(N, dtype=torch.int32).index_copy(0, order, torch.arange(N, dtype=torch.int32))
    place = place.view(n_tokens, top_k).to(device)
    x, rows = (torch.randn(n, width, device=device, dtype=dtype) for n in (n_tokens, N))
    target = torch.empty_like(rows)
    steps: dict[str, Callable[[], Tensor]] = {
        "copy|copy": lambda: target.copy_(rows),
        "permute|cuda": lambda: cuda.permute(x, token),
        "combine|cuda": lambda: cuda.combine(rows, place),
        "permute|triton": lambda: _triton().permute(x, token),
        "combine|triton": lambda: _triton().combine(rows, place),
    }
    seconds = turns(ready(tried(steps, notes), device, notes), rounds, device, "permute and combine", repeat)
    size = rows.element_size()
    moved = {
        "copy": row_copies(N, N, width, size).bytes,
        "permute": row_copies(N, N, width, size).bytes,
        "combine": row_copies(N, n_tokens, width, size).bytes,
    }
    found = []
    for name, own in seconds.items():
        what, by = name.split("|")
        times = statistics.median(a / b for a, b in zip(seconds["copy|copy"], own, strict=True))
        speed = moved[what] / statistics.median(own)
        found.append({"what": what, "by": by, "GB/s": speed / 1e9, "of copy": times * moved[what] / moved["copy"]})
    return found


def _triton() -> ModuleType:
    from dsmoe_lite.kernels import triton_kernels

    return triton_kernels
