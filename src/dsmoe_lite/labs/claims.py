"""What a small live training is held to: an interval, recorded over seeds, that its result must lie in."""

from dsmoe_lite.labs.results import report


def claim(name: str, value: float, interval: tuple[float, float], *, asserted: bool = True) -> None:
    """Assert that `value` lies in `interval`, print that in one sentence, and report the value beside it.

    Without `asserted`, for parameters other than the chapter's own, the sentence only says whether it does.

    The sentence holds no digit of the value, so that it is the same on every machine; `report` carries the value.
    Intervals differ by profile: `claim("GShard minus dense, held-out loss", gap, {"smoke": (-2.0, 2.0),
    "cpu": (-0.4, -0.02), "gpu": (-0.6, -0.1)}[profile])`. A value outside, or NaN, raises AssertionError.
    """
    low, high = interval
    value = float(value)
    inside = low <= value <= high
    if asserted and not inside:
        raise AssertionError(
            f"{name}: {value:.4g} is outside [{low:g}, {high:g}]. Should it be so, run the chapter over several seeds "
            "(dsmoe run NN -p seed=1) and record in this cell an interval that holds them all."
        )
    where = "inside" if inside else "outside"
    print(f"{name}: {where} [{low:g}, {high:g}]" + ("" if asserted else ", recorded for the chapter's own parameters"))
    report(**{name: value})
