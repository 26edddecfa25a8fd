"""Whether a device can be trusted with hand-written kernels: they build for it, and a layer comes out as the loop's.

Asked once, of a process of its own: there a kernel may crash, or never end.
"""

import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.layers.dispatch import Dispatched
from dsmoe_lite.layers.fused import run_cuda, run_triton
from dsmoe_lite.layers.loop import run_loop

RUNS = {"cuda": run_cuda, "triton": run_triton}
PARTS = ("output", "gradient of x", "gradient of the gates", "gradient of gate", "gradient of up", "gradient of down")
TOLERANCE = 1e-2  # of the norm; bfloat16 rounds by up to 2^-8 = 4e-3
LIMIT = 600.0  # seconds; compiling takes one or two minutes of them

Run = Callable[[Dispatched, Tensor, Tensor, Tensor], Tensor]


@cache
def ready(name: str, device: torch.device) -> bool:
    """Whether the kernels `name`, "cuda" or "triton", work on `device`; a reason why not is logged, once."""
    reason = answer([sys.executable, "-m", "dsmoe_lite.layers.selftest", name, str(device)], LIMIT)
    if reason:
        logging.getLogger("dsmoe_lite").warning("backend 'auto' goes on without '%s' on %s: %s", name, device, reason)
    return not reason


def answer(command: Sequence[str], limit: float) -> str:
    """What a process says in its first line; that it crashed, or took longer than `limit` seconds, where it did."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"no answer in {limit:g} s"
    if done.returncode:
        return f"the trial ended with code {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}"
    return next(iter(done.stdout.splitlines()), "")


def trial(name: str, device: torch.device) -> str:
    """One line on why the kernels `name` cannot be used on `device`; nothing where they can."""
    large = device.type == "cuda"  # several tiles for each multiprocessor, and more steps than stages
    try:
        if large:
            return disagreement(RUNS[name], device, (7000, 0, 13_000, 5), widths=(584, 520)) or ""
        return disagreement(RUNS[name], device, (70, 0, 130, 5), widths=(136, 200)) or ""
    except (ImportError, InputError, RunError, RuntimeError) as error:  # RuntimeError: what CUDA itself reports
        return str(error).splitlines()[0]


def disagreement(
    run: Run,
    device: torch.device,
    counts: Sequence[int],
    widths: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
) -> str | None:
    """Where a layer by `run`, forward and backward, differs from the loop in float64; None where it does not.

    counts: rows of each expert; widths: D and F. Data is random; one choice of every eight is no row.
    """
    draw, (D, F), N, E, K = torch.Generator().manual_seed(0), widths, sum(counts), len(counts), 4
    T = N * 8 // 7 // K + 1
    choice = torch.randperm(T * K, generator=draw)[:N].to(device)
    ends = torch.tensor(counts).cumsum(0).to(device, torch.int32)
    shapes = [(T, D), (N,), (E, F, D), (E, F, D), (E, D, F), (T, D)]
    *given, dy = (torch.randn(*s, generator=draw).div_(s[-1] ** 0.5 if len(s) == 3 else 1).to(dtype) for s in shapes)

    def results(run: Run, dtype: torch.dtype) -> list[Tensor]:
        x, gates, *weights = (tensor.to(device, dtype).requires_grad_() for tensor in given)
        y = run(Dispatched(x, K, choice, gates, ends), *weights)
        return [y.detach(), *torch.autograd.grad(y, (x, gates, *weights), dy.to(device, dtype))]

    for part, mine, exact in zip(PARTS, results(run, dtype), results(run_loop, torch.float64), strict=True):
        error = float((mine.double() - exact).norm() / exact.norm())
        if not error < TOLERANCE:
            return f"{part} differs from the loop's by {error:.1e} of the norm"
    return None


if __name__ == "__main__":
    print(trial(sys.argv[1], torch.device(sys.argv[2])))
