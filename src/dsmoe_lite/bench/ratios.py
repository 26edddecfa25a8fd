"""Compare callables fairly on a noisy machine: in turns, in one process, medians, against a named baseline."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dsmoe_lite.common.progress import progress

Step = Callable[[], Any]


class Ratio(NamedTuple):
    """A median over pairs, with the interval that holds the true median in 95 of 100 repetitions."""

    median: float
    low: float
    high: float


def compare(steps: dict[str, Step], rounds: int) -> list[dict[str, Any]]:
    """Time every callable `rounds` times in turns; return rows with the median and its ratio to the first one's.

    The ratio is the median over rounds of (first / this) in the same round: above 1 is faster than the first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # first calls allocate
    for _ in progress(range(rounds), desc="rounds"):
        for name, step in steps.items():
            seconds[name].append(seconds_of(step))
    first = seconds[next(iter(steps))]
    return [
        {
            "what": name,
            "milliseconds": 1000 * statistics.median(own),
            "speed ratio": statistics.median(a / b for a, b in zip(first, own, strict=True)),
        }
        for name, own in seconds.items()
    ]


def time_ratio(step: Step, baseline: Step, rounds: int) -> Ratio:
    """Return time of `step` over time of `baseline`, from `rounds` pairs run back to back: above 1 is slower.

    Every other pair runs the other way round, so that neither always comes first.
    """
    step()
    baseline()  # first calls allocate
    ratios = []
    for turn in range(rounds):
        if turn % 2:
            own = seconds_of(step)
            ratios.append(own / seconds_of(baseline))
        else:
            base = seconds_of(baseline)
            ratios.append(seconds_of(step) / base)
    return median_interval(ratios)


def median_interval(values: Sequence[float]) -> Ratio:
    """Return the median of `values` and the interval of order statistics that covers it with 95%, free of a model.

    The k-th smallest and k-th largest, with the largest k such that 2 P(Binomial(n, 1/2) < k) <= 5%; fewer than 6
    values give their range.
    """
    n, ordered = len(values), sorted(values)
    k, tail = 0, 0.0
    while (tail := tail + math.comb(n, k) / 2**n) <= 0.025:
        k += 1
    return Ratio(statistics.median(ordered), ordered[max(k, 1) - 1], ordered[n - max(k, 1)])


def seconds_of(step: Step) -> float:
    """Return the seconds that one call takes, by the clock on the wall."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
