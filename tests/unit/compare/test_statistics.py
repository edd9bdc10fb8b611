"""Tests paired differences over seeds against their definition, written in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pilot_jax.compare.statistics import paired, standard_error

# 97.5 % quantiles of Student's t by degrees of freedom. For 1 and 2 the distribution function has a closed form, from
# which t = tan(0.475π) and t = 0.95·√(2 / (1 − 0.95²)).
QUANTILE = {1: math.tan(0.475 * math.pi), 2: 0.95 * math.sqrt(2 / (1 - 0.95**2))}


@pytest.mark.parametrize("seeds", [2, 3])
def test_the_interval_is_student_ts(seeds):
    rng = np.random.default_rng(seeds)
    reference, values = rng.uniform(size=(2, seeds))
    apart = reference - values
    mean = apart.sum() / seeds
    error = math.sqrt(((apart - mean) ** 2).sum() / (seeds - 1) / seeds)
    half = QUANTILE[seeds - 1] * error
    found = paired(reference, values)
    assert standard_error(apart) == pytest.approx(error, abs=1e-12)
    assert found["mean"] == pytest.approx(mean, abs=1e-12)
    assert (found["low"], found["high"]) == pytest.approx((mean - half, mean + half), abs=1e-12)
    assert found["significant"] == (mean - half > 0 or mean + half < 0)


def test_what_has_no_spread():
    """Equal differences have an interval of width 0, and a single seed has no interval."""
    same = paired(np.asarray([0.75, 0.5]), np.asarray([0.5, 0.25]))
    assert same == {"mean": 0.25, "low": 0.25, "high": 0.25, "significant": True}
    assert paired(np.zeros(3), np.zeros(3)) == {"mean": 0.0, "low": 0.0, "high": 0.0, "significant": False}
    assert paired(np.ones(1), np.zeros(1)) == {"mean": 1.0, "low": None, "high": None, "significant": None}
    assert standard_error(np.ones(1)) is None
