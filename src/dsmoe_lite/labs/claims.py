"""Claims about small live trainings: a result must lie in an interval that was recorded over several seeds."""

import re

from dsmoe_lite.labs.results import display, to_plain_data


def claim(name: str, value: float, interval: tuple[float, float], *, asserted: bool = True) -> None:
    """Assert that `value` lies in `interval`, print that in one line and report the value in machine-readable form.

    With asserted=False, for parameters other than the defaults, only print whether it does. Intervals differ by
    profile: `claim("GShard minus dense, held-out loss", gap, {"smoke": (-2.0, 2.0), "cpu": (-0.4, -0.02),
    "gpu": (-0.6, -0.1)}[profile])`. Raises AssertionError for a value outside the interval, and for NaN.
    """
    low, high = interval
    value = float(value)
    inside = low <= value <= high
    if asserted and not inside:
        raise AssertionError(
            f"{name}: {value:.4g} is outside [{low:g}, {high:g}]. If this is expected, run the chapter over several "
            "seeds (dsmoe run NN -p seed=1) and record in this cell an interval that covers them all."
        )
    position = f"{'inside' if inside else 'outside'} [{low:g}, {high:g}]"
    shown = to_plain_data(name, value)
    note = "" if asserted else ", recorded for the default parameters"
    display({name: shown}, f"{name} = {shown}, {position}{note}")


def without_value(line: str) -> str:
    """The line that `claim` prints, without the value, which differs between machines; "" for any other line."""
    match = re.fullmatch(r"(.*) = \S+, ((?:inside|outside) \[.*)", line)
    return f"{match[1]}, {match[2]}" if match else ""
