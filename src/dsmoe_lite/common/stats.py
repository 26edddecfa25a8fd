"""Statistics over seeds: t-intervals, paired differences and verdicts on trends, computed by scipy and statsmodels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, nan
from typing import Any

import numpy as np

from dsmoe_lite.common.errors import require, require_int, require_number

LEVEL = 0.05  # significance level of every test; intervals are 95%
LEAST_SEEDS = 5  # with fewer, a trend has no verdict
EXPECTED = ("below", "above", "equal", "not above")
WITH_MARGIN = ("equal", "not above")


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and half the width of its 95% t-interval, which is None for fewer than two values."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    from scipy.special import stdtrit

    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, float(stdtrit(len(values) - 1, 1 - LEVEL / 2)) * math.sqrt(variance / len(values))


@dataclass(frozen=True)
class Paired:
    """The differences between two models, one difference per seed, summarised over seeds.

    `low` and `high` bound the 95% t-interval of `mean`. `effect` is the mean over the standard deviation of the
    differences (Cohen's d_z). With one seed, these three are NaN.
    """

    n: int
    mean: float
    low: float
    high: float
    effect: float


def paired(differences: Sequence[float]) -> Paired:
    """Summarise the differences. Raises InputError if there are none, or if one is not finite: a run diverged."""
    require_int("seeds", len(differences), 1)
    for value in differences:
        require_number("difference", value, -inf)
    mean = float(np.mean(differences))
    if len(differences) < 2:
        return Paired(1, mean, nan, nan, nan)
    low, high = _descriptive(differences).tconfint_mean(LEVEL)
    deviation = float(np.std(differences, ddof=1))
    return Paired(len(differences), mean, float(low), float(high), mean / deviation if deviation else nan)


def p_value(differences: Sequence[float], expected: str, margin: float = 0.0) -> float:
    """Test the differences against the opposite of what is expected; 1.0 for fewer than two seeds.

    expected "below" or "above": two-sided t-test of the hypothesis that the mean is 0.
    "equal": the larger p-value of two one-sided tests (TOST); the hypothesis is that the mean is outside
    (-margin, margin).
    "not above": one-sided t-test of the hypothesis that the mean is at least `margin`.
    """
    if len(differences) < 2:
        return 1.0
    summary = _descriptive(differences)
    if expected in WITH_MARGIN:
        require_number("margin", margin, 0.0, open_low=True)
    if expected == "equal":
        return float(summary.ttost_mean(-margin, margin)[0])
    if expected == "not above":
        return float(summary.ttest_mean(margin, alternative="smaller")[1])
    return float(summary.ttest_mean(0.0)[1])


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct the p-values of the claims of one figure for their number, by Holm's method."""
    from statsmodels.stats.multitest import multipletests

    if not p_values:
        return {}
    corrected = multipletests(list(p_values.values()), LEVEL, method="holm")[1]
    return dict(zip(p_values, map(float, corrected), strict=True))


def trend_verdict(result: Paired, expected: str, p: float, corrected: float, margin: float = 0.0) -> str:
    """Return "holds", "leans", "inconclusive" or "reversed"; "not tested" for fewer than five seeds.

    holds: as expected, and significant after the correction. leans: as expected, and significant only before the
    correction. reversed: significant after the correction in the opposite direction; with a margin, the full interval
    is beyond the margin.
    """
    if result.n < LEAST_SEEDS:
        return "not tested"
    if expected in WITH_MARGIN:
        as_expected = True
        opposite = result.low > margin or (expected == "equal" and result.high < -margin)
    else:
        signed = -result.mean if expected == "below" else result.mean
        as_expected = signed > 0
        opposite = signed < 0 and corrected < LEVEL
    if opposite:
        return "reversed"
    if as_expected and corrected < LEVEL:
        return "holds"
    return "leans" if as_expected and p < LEVEL else "inconclusive"


def seeds_needed(deviation: float, difference: float, power: float = 0.8) -> int:
    """How many seeds a two-sided paired t-test needs to detect a mean `difference` with this power.

    `deviation` is the standard deviation of the differences.
    """
    from statsmodels.stats.power import TTestPower

    require(difference != 0, "difference", difference, "must not be 0")
    n = TTestPower().solve_power(abs(difference) / deviation, alpha=LEVEL, power=power)
    return int(np.ceil(n))


def _descriptive(values: Sequence[float]) -> Any:
    from statsmodels.stats.weightstats import DescrStatsW

    return DescrStatsW(np.asarray(values, dtype=float))
