"""Statistics over seeds: intervals, paired differences, and verdicts on trends, by scipy and statsmodels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, nan
from typing import Any

import numpy as np

from dsmoe_lite.common.errors import require, require_number, require_whole

LEVEL = 0.05  # of every test; intervals are 95%
LEAST_SEEDS = 5  # below that a trend has no verdict
EXPECTED = ("below", "above", "equal", "not above")
WITH_MARGIN = ("equal", "not above")


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its 95% t-interval; None with fewer than two values."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    from scipy.special import stdtrit

    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, float(stdtrit(len(values) - 1, 1 - LEVEL / 2)) * math.sqrt(variance / len(values))


@dataclass(frozen=True)
class Paired:
    """Differences between two runs of one seed, over seeds.

    `low` and `high` bound the 95% t-interval of `mean`; `effect` is the mean over the differences' standard deviation
    (Cohen's d_z). With one seed there is no interval, and they are NaN.
    """

    n: int
    mean: float
    low: float
    high: float
    effect: float


def paired(differences: Sequence[float]) -> Paired:
    """The differences summed up. InputError where there are none or one is not finite: a run that diverged."""
    require_whole("seeds", len(differences), 1)
    for value in differences:
        require_number("difference", value, -inf)
    mean = float(np.mean(differences))
    if len(differences) < 2:
        return Paired(1, mean, nan, nan, nan)
    low, high = _described(differences).tconfint_mean(LEVEL)
    spread = float(np.std(differences, ddof=1))
    return Paired(len(differences), mean, float(low), float(high), mean / spread if spread else nan)


def p_value(differences: Sequence[float], expected: str, margin: float = 0.0) -> float:
    """How surprising the differences would be if there were no trend.

    expected "below" or "above": two-sided t-test of a mean of 0. "equal": the larger of two one-sided tests that the
    mean is not inside (-margin, margin), TOST. "not above": one-sided test that the mean is margin or more. 1.0 with
    fewer than two seeds.
    """
    if len(differences) < 2:
        return 1.0
    described = _described(differences)
    if expected in WITH_MARGIN:
        require_number("margin", margin, 0.0, open_low=True)
    if expected == "equal":
        return float(described.ttost_mean(-margin, margin)[0])
    if expected == "not above":
        return float(described.ttest_mean(margin, alternative="smaller")[1])
    return float(described.ttest_mean(0.0)[1])


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values of one figure's claims, corrected for their number (Holm)."""
    from statsmodels.stats.multitest import multipletests

    if not p_values:
        return {}
    corrected = multipletests(list(p_values.values()), LEVEL, method="holm")[1]
    return dict(zip(p_values, map(float, corrected), strict=True))


def trend_verdict(found: Paired, expected: str, p: float, corrected: float, margin: float = 0.0) -> str:
    """holds, leans, inconclusive, reversed, or "not tested" with fewer than five seeds.

    holds: significant after the correction and as expected. leans: as expected, and significant before the correction
    alone. reversed: significant after it, the other way; with a margin, the whole interval lies beyond it.
    """
    if found.n < LEAST_SEEDS:
        return "not tested"
    if expected in WITH_MARGIN:
        as_expected, contrary = True, found.low > margin or (expected == "equal" and found.high < -margin)
    else:
        sign = -1 if expected == "below" else 1
        as_expected, contrary = sign * found.mean > 0, sign * found.mean < 0 and corrected < LEVEL
    if contrary:
        return "reversed"
    if as_expected and corrected < LEVEL:
        return "holds"
    return "leans" if as_expected and p < LEVEL else "inconclusive"


def seeds_needed(spread: float, difference: float, power: float = 0.8) -> int:
    """Seeds with which a two-sided paired t-test finds `difference` with this power, if differences spread so."""
    from statsmodels.stats.power import TTestPower

    require(difference != 0, "difference", difference, "must not be 0")
    n = TTestPower().solve_power(abs(difference) / spread, alpha=LEVEL, power=power)
    return int(np.ceil(n))


def _described(values: Sequence[float]) -> Any:
    from statsmodels.stats.weightstats import DescrStatsW

    return DescrStatsW(np.asarray(values, dtype=float))
