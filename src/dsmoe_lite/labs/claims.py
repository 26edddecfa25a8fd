"""What a small live training is held to: an interval, recorded over seeds, that its result must lie in."""

from dsmoe_lite.labs.results import report


def claim(name: str, value: float, interval: tuple[float, float]) -> None:
    """Assert that `value` lies in `interval`, print that in one sentence, and report the value beside it.

    The sentence holds no digit of the value, so that it is the same on every machine; `report` carries the value.
    Intervals differ by profile: `claim("GShard minus dense, held-out loss", gap, {"smoke": (-2.0, 2.0),
    "cpu": (-0.4, -0.02), "gpu": (-0.6, -0.1)}[profile])`. A value outside, or NaN, raises AssertionError.
    """
    low, high = interval
    value = float(value)
    if not low <= value <= high:
        raise AssertionError(
            f"{name}: {value:.4g} is outside [{low:g}, {high:g}]. Should it be so, run the chapter over several seeds "
            "(dsmoe run NN -p seed=1) and record in this cell an interval that holds them all."
        )
    print(f"{name}: inside [{low:g}, {high:g}]")
    report(**{name: value})
