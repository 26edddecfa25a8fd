"""Whether a GPU can be trusted with a set of kernels: they build for it, and give what torch gives. Asked once.

It catches wrong results, and what a compiler or a launch reports, but no kernel that crashes or hangs.
"""

import logging
from functools import cache
from types import ModuleType

import torch

from dsmoe_lite.errors import InputError, RunError

DTYPE, COUNTS, WIDTH, DEPTH = torch.bfloat16, (70, 0, 130, 5), 136, 200
TOLERANCE = 1e-2  # of the norm; bfloat16 rounds by up to 2^-8 = 4e-3


@cache
def ready(name: str, device: torch.device) -> bool:
    """Whether the kernels `name`, "cuda" or "triton", work on `device`; a reason why not is logged, once."""
    try:
        reason = disagreement(_module(name), device)
    except (ImportError, InputError, RunError, RuntimeError) as error:  # RuntimeError: what CUDA itself reports
        reason = str(error).splitlines()[0]
    if reason is not None:
        logging.getLogger("dsmoe_lite").warning("backend 'auto' goes on without '%s' on %s: %s", name, device, reason)
    return reason is None


def disagreement(kernels: ModuleType, device: torch.device, dtype: torch.dtype = DTYPE) -> str | None:
    """Where the grouped products of `kernels` differ from torch's on random data; None where they do not."""
    draw, (N, E) = torch.Generator().manual_seed(0), (sum(COUNTS), len(COUNTS))
    shapes = [(N, DEPTH), (E, WIDTH, DEPTH), (N, WIDTH)]
    rows, matrices, left = (torch.randn(*shape, generator=draw).to(device, dtype) for shape in shapes)
    ends = torch.tensor(COUNTS, device=device).cumsum(0).to(torch.int32)
    parts = list(zip(rows.float().split(COUNTS), matrices.float(), left.float().split(COUNTS), strict=True))
    for product, mine, exact in (
        ("multiply", kernels.multiply(rows, matrices, ends), torch.cat([x @ w.T for x, w, _ in parts])),
        (
            "rows_backward",
            kernels.rows_backward(left, left, matrices, matrices, ends),
            torch.cat([2 * d @ w for _, w, d in parts]),
        ),
        ("weights_backward", kernels.weights_backward(left, rows, ends), torch.stack([d.T @ x for x, _, d in parts])),
    ):
        error = float((mine.float() - exact).norm() / exact.norm())
        if not error < TOLERANCE:
            return f"{product} differs from torch by {error:.1e} of the norm"
    return None


def _module(name: str) -> ModuleType:
    if name == "cuda":
        from dsmoe_lite.kernels import cuda

        return cuda
    from dsmoe_lite.kernels import triton_twins

    return triton_twins
