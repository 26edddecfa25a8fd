"""Statistics over seeds compared with numbers worked out by hand, and verdicts at their thresholds."""

import math

import pytest

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.common.stats import Paired, holm, p_value, paired, seeds_needed, trend_verdict

T_4 = 2.776445  # Student's t, 97.5%, 4 degrees of freedom


def test_intervals_are_students_t() -> None:
    result = paired([1.0, 2.0, 3.0, 4.0, 5.0])
    half = T_4 * math.sqrt(2.5 / 5)
    assert (result.n, result.mean) == (5, 3.0)
    assert (result.low, result.high) == pytest.approx((3 - half, 3 + half), abs=1e-5)
    assert result.effect == pytest.approx(3 / math.sqrt(2.5))


def test_one_seed_has_no_interval() -> None:
    result = paired([0.5])
    assert result.n == 1
    assert math.isnan(result.low)
    assert p_value([0.5], "below") == 1.0


@pytest.mark.parametrize(("values", "words"), [([], "seeds = 0"), ([0.1, math.nan], "difference = nan")])
def test_no_seeds_and_diverged_runs_are_refused(values: list[float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        paired(values)


def test_p_values() -> None:
    at_threshold = [T_4 * math.sqrt(2.5 / 5) + shift for shift in (-2, -1, 0, 1, 2)]
    assert p_value(at_threshold, "above") == pytest.approx(0.05, abs=1e-5)
    assert p_value([-x for x in at_threshold], "above") == pytest.approx(0.05, abs=1e-5), "two-sided"
    # both one-sided tests at 5%: the margin is 2.131847 standard errors from the mean
    assert p_value([-2, -1, 0, 1, 2], "equal", margin=2.131847 * math.sqrt(0.5)) == pytest.approx(0.05, abs=1e-5)
    no_worse = [x - 2.131847 * math.sqrt(0.5) + 0.3 for x in (-2, -1, 0, 1, 2)]
    assert p_value(no_worse, "not above", margin=0.3) == pytest.approx(0.05, abs=1e-5), "one-sided"


def test_holm_multiplies_by_how_many_are_left() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({}) == {}


@pytest.mark.parametrize(
    ("mean", "expected", "p", "corrected", "verdict"),
    [
        (-0.1, "below", 0.01, 0.04, "holds"),
        (-0.9, "not above", 0.01, 0.04, "holds"),
        (0.0, "not above", 0.01, 0.06, "leans"),
        (0.0, "not above", 0.06, 0.06, "inconclusive"),
        (-0.1, "below", 0.01, 0.06, "leans"),
        (-0.1, "below", 0.06, 0.12, "inconclusive"),
        (0.1, "below", 0.01, 0.04, "reversed"),
        (0.1, "below", 0.01, 0.06, "inconclusive"),
        (0.1, "above", 0.01, 0.04, "holds"),
        (0.0, "equal", 0.01, 0.04, "holds"),
        (0.0, "equal", 0.01, 0.06, "leans"),
        (0.0, "equal", 0.20, 0.40, "inconclusive"),
    ],
)
def test_verdicts(mean: float, expected: str, p: float, corrected: float, verdict: str) -> None:
    result = Paired(5, mean, mean - 0.2, mean + 0.2, 1.0)
    assert trend_verdict(result, expected, p, corrected, margin=0.3) == verdict
    assert trend_verdict(Paired(4, mean, mean - 0.2, mean + 0.2, 1.0), expected, p, corrected, 0.3) == "not tested"


def test_an_interval_outside_the_margin_reverses_equality() -> None:
    assert trend_verdict(Paired(5, 0.5, 0.31, 0.7, 1.0), "equal", 1.0, 1.0, 0.3) == "reversed"
    assert trend_verdict(Paired(5, -0.5, -0.7, -0.31, 1.0), "equal", 1.0, 1.0, 0.3) == "reversed"


def test_seeds_for_a_power() -> None:
    # Cohen's table: d = 0.5, two-sided 5%, power 0.8 needs 34 pairs
    assert seeds_needed(deviation=2.0, difference=1.0) == 34
    assert seeds_needed(deviation=2.0, difference=-1.0) == 34
