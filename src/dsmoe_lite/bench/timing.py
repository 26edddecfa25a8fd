"""Time steps, interleaved: on a CPU by wall clock, on a GPU by CUDA events."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from dsmoe_lite.bench.ratios import Step, seconds_of
from dsmoe_lite.common.progress import progress

Key = TypeVar("Key", bound=Hashable)


def time_interleaved(
    steps: Mapping[Key, Step], rounds: int, device: str, title: str, repeat: int = 1
) -> dict[Key, list[float]]:
    """Time every step once per round, every second round in reverse order; return the seconds of each step.

    On a GPU a step runs `repeat` times between two events, and the mean is returned.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # warm-up: first calls allocate
    for number in progress(range(rounds), desc=title):
        for name, step in list(steps.items())[:: -1 if number % 2 else 1]:
            seconds[name].append(seconds_of(step) if device == "cpu" else _seconds_on_gpu(step, repeat))
    return seconds


def as_cuda_graph(step: Step, device: str) -> Step:
    """Capture `step` as a CUDA graph; on a CPU return it unchanged.

    Launching kernels one by one may take the host longer than the GPU needs to run them.
    """
    if device == "cpu":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # warm-up: libraries must choose their algorithms before the capture
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return _Replay(graph, step)


@dataclass(frozen=True)
class _Replay:
    """A step as a CUDA graph."""

    graph: Any
    step: Step  # owns the tensors that the graph reads and writes

    def __call__(self) -> None:
        self.graph.replay()


def _seconds_on_gpu(step: Step, repeat: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    step()  # keeps the GPU busy while the host launches ahead, so that the events include no launch
    start.record()
    for _ in range(repeat):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / repeat
