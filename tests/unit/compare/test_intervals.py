"""Tests estimates, intervals and Holm's correction against SciPy, statsmodels and examples that are worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from pilot_jax.compare.intervals import holm, mean_of, mean_over_both
from pilot_jax.compare.statistics import standard_error

# 97.5 % quantiles of Student's t by degrees of freedom. For 1 and 2 the distribution function has a closed form, from
# which t = tan(0.475π) and t = 0.95·√(2 / (1 − 0.95²)).
QUANTILE = {1: math.tan(0.475 * math.pi), 2: 0.95 * math.sqrt(2 / (1 - 0.95**2))}


@pytest.mark.parametrize("seeds", [2, 3])
def test_the_interval_is_student_ts(seeds):
    values = np.random.default_rng(seeds).uniform(size=seeds)
    mean = values.sum() / seeds
    error = math.sqrt(((values - mean) ** 2).sum() / (seeds - 1) / seeds)
    half = QUANTILE[seeds - 1] * error
    found = mean_of(values)
    assert standard_error(values) == pytest.approx(error, abs=1e-12)
    assert found.mean == pytest.approx(mean, abs=1e-12)
    assert found.interval() == pytest.approx((mean - half, mean + half), abs=1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.3, -2.0])
def test_p_values_are_scipys(shift):
    values, margin = np.random.default_rng(0).normal(shift, 1, 7), 0.4
    found = mean_of(values)
    assert found.p() == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    above = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(values, margin, alternative="less").pvalue
    assert found.p_below(-margin) == pytest.approx(above)
    assert found.p_equivalent(margin) == pytest.approx(max(above, below))
    lower_end = found.interval(0.9)[0]  # of the two-sided 90 % interval and of the one-sided 95 % interval
    assert (found.p_below(-margin) < 0.05) == (lower_end > -margin)


def test_what_has_no_spread_has_no_estimate():
    """A single value, and equal ones, with rounding."""
    for values in ([1.0], [0.25, 0.25], [0.0, 0.0, 0.0], [0.1 + 0.2, 0.3, 0.3]):
        assert mean_of(np.asarray(values)) is None
    assert standard_error(np.ones(1)) is None
    for values in (np.ones((1, 5)), np.ones((3, 1)), np.full((3, 4), 0.3)):
        assert mean_over_both(values) is None


def test_the_error_over_seeds_and_clients_by_hand():
    """Two seeds and two clients, with differences μ + a_s + b_k + e: mean 6, a ∓3, b ∓2, e ±1.

    The mean squares are M_a = 2·(9 + 9) / 1 = 36, M_b = 2·(4 + 4) / 1 = 16, M_e = 4·1 / 1 = 4, the variance of the mean
    (36 + 16 − 4) / 4 = 12, and Satterthwaite's degrees of freedom 48² / (36² + 16² + 4²) = 2304 / 1568."""
    found = mean_over_both(np.asarray([[6 - 3 - 2 + 1, 6 - 3 + 2 - 1], [6 + 3 - 2 - 1, 6 + 3 + 2 + 1]], float))
    assert (found.mean, found.error, found.freedom) == pytest.approx((6, math.sqrt(12), 2304 / 1568))


def test_without_effects_the_error_over_both_is_that_of_the_rest():
    """Rows and columns of equal means: M_a = M_b = 0, so the variance is M_e / 9 with M_e = 6 · 1 / 4; the degrees of
    freedom are those of M_e, 4."""
    found = mean_over_both(np.asarray([[1, -1, 0], [0, 1, -1], [-1, 0, 1]], float))
    assert (found.mean, found.error, found.freedom) == pytest.approx((0, math.sqrt(1.5 / 9), 4))


SCORES = np.asarray([[0.09, 0.31, 0.22, -0.14], [-0.02, 0.18, 0.15, -0.21], [0.21, 0.33, 0.29, 0.05]])
# Standard error of the intercept of statsmodels 0.15.0 for SCORES, as the next test computes it.
ERROR_OF_MIXED_MODEL = 0.09959


def test_the_error_over_both_is_that_of_a_mixed_model():
    """For balanced data whose variance components are positive, REML and the mean squares agree."""
    assert mean_over_both(SCORES).error == pytest.approx(ERROR_OF_MIXED_MODEL, rel=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_the_error_over_both_against_statsmodels():
    formulas = pytest.importorskip("statsmodels.formula.api")
    pandas = pytest.importorskip("pandas")
    seeds, clients = np.indices(SCORES.shape)
    frame = pandas.DataFrame({"d": SCORES.ravel(), "s": seeds.ravel(), "k": clients.ravel(), "one": 1})
    fit = formulas.mixedlm("d ~ 1", frame, groups="one", vc_formula={"s": "0 + C(s)", "k": "0 + C(k)"}).fit(reml=True)
    assert fit.bse["Intercept"] == pytest.approx(ERROR_OF_MIXED_MODEL, rel=1e-3)
    assert fit.params["Intercept"] == pytest.approx(mean_over_both(SCORES).mean)


@pytest.mark.parametrize(("p", "adjusted"), [
    ([0.01, 0.02, 0.03, 0.005], [0.03, 0.04, 0.04, 0.02]),
    ([0.03, 0.03], [0.06, 0.06]), ([0.4, 0.9, 0.8], [1, 1, 1]), ([0.04], [0.04]), ([], [])])
def test_holm_by_hand(p, adjusted):
    """Smallest times n, next times n − 1, …; never below the one before, never above 1."""
    assert holm(p) == pytest.approx(adjusted)


def test_holm_against_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    rng = np.random.default_rng(1)
    for count in (1, 2, 9, 40):
        p = rng.uniform(size=count) ** 4
        assert holm(list(p)) == pytest.approx(multitest.multipletests(p, method="holm")[1].tolist())
