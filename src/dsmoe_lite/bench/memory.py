"""Peak memory of a step, from torch's own record of every allocation: the same number on every run."""

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

DEVICE_TYPES = {"cpu": 0, "cuda": 1}  # as the trace numbers them


def peak_bytes(
    step: Callable[[], Any], clear: Callable[[], Any], uncounted: Callable[[], Iterable[Tensor]], device: str = "cpu"
) -> int:
    """Return the most bytes that `step` allocates and holds at once on the device, "cpu" or "cuda".

    `clear` drops what the last step left; `uncounted` names, after the step, tensors to leave out: the weights'
    gradients. What was allocated before the step, and what a BLAS takes for itself, is not seen.
    """
    step()  # what is made once is not the step's
    clear()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    left_out = {tensor.untyped_storage().data_ptr() for tensor in uncounted()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = [one for one in json.loads(path.read_text())["traceEvents"] if one.get("name") == "[memory]"]
    about = [one["args"] for one in sorted(events, key=lambda one: one["ts"])]
    changes = [(one["Addr"], one["Bytes"]) for one in about if one["Device Type"] == DEVICE_TYPES[device]]
    last = {address: index for index, (address, size) in enumerate(changes) if size > 0}  # an address is used again
    held: dict[int, int] = {}
    live = peak = 0
    for index, (address, size) in enumerate(changes):
        if size > 0 and not (address in left_out and index == last[address]):
            held[address] = size
            live += size
            peak = max(peak, live)
        elif size < 0:
            live -= held.pop(address, 0)
    return peak


def peak_bytes_on_gpu(
    step: Callable[[], Any], clear: Callable[[], Any], uncounted: Callable[[], Iterable[Tensor]]
) -> int:
    """Return the same for the current GPU, within the bounds that its allocator's own peak gives.

    That peak counts those tensors as far as they were there when it was reached, which it does not say: all, or none.
    """
    traced = peak_bytes(step, clear, uncounted, "cuda")
    clear()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    high = torch.cuda.max_memory_allocated() - before
    return min(max(traced, high - sum(tensor.nbytes for tensor in uncounted())), high)
