"""Whether hand-written kernels work on a device: they compile there, and a layer's results equal those of the loop.

The self-test runs once, in a separate process: a kernel may crash there, or never end.
"""

import logging
import subprocess
import sys
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.layers.dispatch import Dispatched, Implementation, combine
from dsmoe_lite.layers.fused import KERNELS
from dsmoe_lite.layers.loop import run_loop

COMPARED = (
    "output",
    "gradient of x",
    "gradient of the gates",
    "gradient of gate",
    "gradient of up",
    "gradient of down",
)
TOLERANCE = 1e-2  # of the norm; bfloat16 rounds by up to 2^-8 = 4e-3
TIMEOUT = 600.0  # seconds; compiling takes one or two minutes of them


@cache
def passes_selftest(name: str, device: torch.device) -> bool:
    """Whether the kernels `name`, "cuda" or "triton", work on `device`. If not, the reason is logged once."""
    reason = first_line([sys.executable, "-m", "dsmoe_lite.layers.selftest", name, str(device)], TIMEOUT)
    if reason:
        logging.getLogger("dsmoe_lite").warning("backend 'auto' continues without '%s' on %s: %s", name, device, reason)
    return not reason


def first_line(command: Sequence[str], timeout: float) -> str:
    """Return the first line that a process prints, or one line that reports its crash or its timeout (in seconds)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"no answer in {timeout:g} s"
    if done.returncode:
        return f"the self-test ended with code {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}"
    return next(iter(done.stdout.splitlines()), "")


def selftest(name: str, device: torch.device) -> str:
    """Return one line on why the kernels `name` cannot be used on `device`; an empty one if they can."""
    if device.type == "cuda":  # several tiles for each multiprocessor, and more steps than stages
        counts, widths = (7000, 0, 13_000, 5), (584, 520)
    else:
        counts, widths = (70, 0, 130, 5), (136, 200)
    try:
        return disagreement(KERNELS[name], device, counts, widths) or ""
    except (ImportError, InputError, RunError, RuntimeError) as error:  # RuntimeError: errors reported by CUDA itself
        return str(error).splitlines()[0]


def disagreement(
    kernels: Implementation,
    device: torch.device,
    counts: Sequence[int],
    widths: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
) -> str | None:
    """Return how a layer by `kernels`, forward and backward, differs from the loop in float64; None if it does not.

    counts: rows of each expert; widths: D and F. Data is random; one choice of every eight was dropped.
    """
    random, (D, F), N, E, K = torch.Generator().manual_seed(0), widths, sum(counts), len(counts), 4
    T = N * 8 // 7 // K + 1
    choice = torch.randperm(T * K, generator=random, device="cpu")[:N].to(device)
    ends = torch.tensor(counts, device="cpu").cumsum(0).to(device, torch.int32)
    shapes = [(T, D), (N,), (E, F, D), (E, F, D), (E, D, F), (T, D)]
    *inputs, dy = (
        torch.randn(*s, generator=random, device="cpu").div_(s[-1] ** 0.5 if len(s) == 3 else 1).to(dtype)
        for s in shapes
    )

    def results(implementation: Implementation, dtype: torch.dtype) -> list[Tensor]:
        x, gates, *weights = (tensor.to(device, dtype).requires_grad_() for tensor in inputs)
        dispatched = Dispatched(x, K, choice, gates, ends)
        y = implementation.combine(implementation.run(dispatched, *weights), dispatched)
        return [y.detach(), *torch.autograd.grad(y, (x, gates, *weights), dy.to(device, dtype))]

    reference = results(Implementation(run_loop, combine), torch.float64)
    for part, result, exact in zip(COMPARED, results(kernels, dtype), reference, strict=True):
        error = float((result.double() - exact).norm() / exact.norm())
        if not error < TOLERANCE:
            return f"{part} differs from the loop's by {error:.1e} of the norm"
    return None


if __name__ == "__main__":
    print(selftest(sys.argv[1], torch.device(sys.argv[2])))
