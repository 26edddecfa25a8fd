"""Peak memory of a step, from torch's profile of every allocation: the same number on every run."""

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

DEVICE_TYPES = {"cpu": 0, "cuda": 1}  # their numbers in the trace


def peak_bytes(
    step: Callable[[], Any], clear: Callable[[], Any], uncounted: Callable[[], Iterable[Tensor]], device: str = "cpu"
) -> int:
    """Return the peak of the bytes that `step` allocates on the device, "cpu" or "cuda".

    clear: frees the results of the last step. uncounted: called after the step; returns tensors to leave out, the
    gradients of the weights. Memory allocated before the step, or by a BLAS library itself, is not seen.
    """
    step()  # warm-up: allocations that are made only once do not count
    clear()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    left_out = {tensor.untyped_storage().data_ptr() for tensor in uncounted()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    details = [event["args"] for event in sorted(events, key=lambda event: event["ts"])]
    changes = [(event["Addr"], event["Bytes"]) for event in details if event["Device Type"] == DEVICE_TYPES[device]]
    last = {address: index for index, (address, size) in enumerate(changes) if size > 0}  # addresses are reused
    size_at: dict[int, int] = {}
    allocated = peak = 0
    for index, (address, size) in enumerate(changes):
        if size > 0 and not (address in left_out and index == last[address]):
            size_at[address] = size
            allocated += size
            peak = max(peak, allocated)
        elif size < 0:
            allocated -= size_at.pop(address, 0)
    return peak


def peak_bytes_on_gpu(
    step: Callable[[], Any], clear: Callable[[], Any], uncounted: Callable[[], Iterable[Tensor]]
) -> int:
    """Return the same peak for the current GPU, clamped to the bounds given by its allocator's own peak.

    The allocator's peak may include all of the uncounted tensors or none of them: it does not report which.
    """
    traced = peak_bytes(step, clear, uncounted, "cuda")
    clear()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    upper = torch.cuda.max_memory_allocated() - before
    lower = upper - sum(tensor.nbytes for tensor in uncounted())
    return min(max(traced, lower), upper)
