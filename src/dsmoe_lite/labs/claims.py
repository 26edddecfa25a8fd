"""What a small live training is held to: an interval, recorded over seeds, that its result must lie in."""

import re

from dsmoe_lite.labs.results import display, rounded


def claim(name: str, value: float, interval: tuple[float, float], *, asserted: bool = True) -> None:
    """Assert that `value` lies in `interval`, say so in one line, and report the value for machines.

    Without `asserted`, for parameters other than the chapter's own, the line only says whether it does. Intervals
    differ by profile: `claim("GShard minus dense, held-out loss", gap, {"smoke": (-2.0, 2.0), "cpu": (-0.4, -0.02),
    "gpu": (-0.6, -0.1)}[profile])`. A value outside, or NaN, raises AssertionError.
    """
    low, high = interval
    value = float(value)
    inside = low <= value <= high
    if asserted and not inside:
        raise AssertionError(
            f"{name}: {value:.4g} is outside [{low:g}, {high:g}]. Should it be so, run the chapter over several seeds "
            "(dsmoe run NN -p seed=1) and record in this cell an interval that holds them all."
        )
    where = f"{'inside' if inside else 'outside'} [{low:g}, {high:g}]"
    shown = rounded(name, value)
    display({name: shown}, f"{name} = {shown}, {where}" + ("" if asserted else " of the chapter's own parameters"))


def without_value(line: str) -> str:
    """The line of a claim as it is on every machine: without the digits of its value. "" for any other line."""
    found = re.fullmatch(r"(.*) = \S+, ((?:inside|outside) \[.*)", line)
    return f"{found[1]}, {found[2]}" if found else ""
