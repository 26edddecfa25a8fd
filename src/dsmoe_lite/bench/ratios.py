"""Compare callables fairly on a noisy machine: in turns, in one process, medians, against a named baseline."""

import statistics
import time
from collections.abc import Callable
from typing import Any

from dsmoe_lite.progress import progress


def compare(steps: dict[str, Callable[[], Any]], rounds: int) -> list[dict[str, Any]]:
    """Time every callable `rounds` times in turns; return rows with the median and its ratio to the first one's.

    The ratio is the median over rounds of (first / this) in the same round: above 1 is faster than the first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # first calls allocate
    for _ in progress(range(rounds), desc="rounds"):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    first = seconds[next(iter(steps))]
    return [
        {
            "what": name,
            "milliseconds": 1000 * statistics.median(own),
            "speed ratio": statistics.median(a / b for a, b in zip(first, own, strict=True)),
        }
        for name, own in seconds.items()
    ]
