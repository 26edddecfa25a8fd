"""Compare callables fairly on a noisy machine: interleaved in one process, medians, ratios to a baseline."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dsmoe_lite.common.progress import progress

Step = Callable[[], Any]


class Ratio(NamedTuple):
    """A median over pairs, with its 95% confidence interval."""

    median: float
    low: float
    high: float


def compare(steps: dict[str, Step], rounds: int) -> list[dict[str, Any]]:
    """Time every callable once per round; return rows with its median and its speed relative to the first callable.

    The speed ratio is the median over rounds of (first / this) in the same round: above 1 is faster than the first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # warm-up: first calls allocate
    for _ in progress(range(rounds), desc="rounds"):
        for name, step in steps.items():
            seconds[name].append(seconds_of(step))
    first = seconds[next(iter(steps))]
    return [
        {
            "what": name,
            "milliseconds": 1000 * statistics.median(times),
            "speed ratio": statistics.median(base / own for base, own in zip(first, times, strict=True)),
        }
        for name, times in seconds.items()
    ]


def time_ratio(step: Step, baseline: Step, rounds: int) -> Ratio:
    """Return the time of `step` over that of `baseline`, from `rounds` pairs run back to back: above 1 is slower.

    Every second pair runs in reverse order, so that neither is always first.
    """
    step()
    baseline()  # warm-up: first calls allocate
    ratios = []
    for number in range(rounds):
        if number % 2:
            own = seconds_of(step)
            ratios.append(own / seconds_of(baseline))
        else:
            base = seconds_of(baseline)
            ratios.append(seconds_of(step) / base)
    return median_interval(ratios)


def median_interval(values: Sequence[float]) -> Ratio:
    """Return the median of `values` and its distribution-free 95% confidence interval, by order statistics.

    The interval is from the k-th smallest to the k-th largest value, with the largest k such that
    2 P(Binomial(n, 1/2) < k) <= 5%. For fewer than 6 values it is their range.
    """
    n, ordered = len(values), sorted(values)
    k, tail = 0, 0.0
    while (tail := tail + math.comb(n, k) / 2**n) <= 0.025:
        k += 1
    return Ratio(statistics.median(ordered), ordered[max(k, 1) - 1], ordered[n - max(k, 1)])


def seconds_of(step: Step) -> float:
    """Return the wall-clock seconds of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def goal_row(what: str, value: float | None, comparison: str, goal: float) -> dict[str, Any]:
    """A row {what, value, goal, reached}; comparison: ">=" or "<=". A value of None was not measured."""
    reached = value is not None and (value >= goal if comparison == ">=" else value <= goal)
    return {"what": what, "value": value, "goal": f"{comparison} {goal:.3g}", "reached": reached}
