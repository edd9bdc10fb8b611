"""Tests of count sketches against NumPy in float64, written from the formula."""

from __future__ import annotations

import numpy as np
import pytest

from pilot_jax.kernels.count_sketch import SIZE, add_sketch, signs_of


def sketch_of(x, number=0, start=0):
    out = np.zeros((len(x), SIZE))
    add_sketch(out, x, number, start)
    return out


def sketch64(x, signs, start):
    bins = (start + np.arange(x.shape[1])) % SIZE
    return np.stack([np.bincount(bins, signs * row, SIZE) for row in x.astype(np.float64)])


@pytest.mark.parametrize(("shape", "start"), [((3, 5), 4090), ((11, 2, 3 * SIZE), 0), ((9, 7, 31, 83), 9017),
                                             ((5, 200_000), 4000)])
def test_sketch_is_that_of_float64(shape, start):
    """Also where all entries have most of their value in common: what float32 would round away is kept."""
    x = (50 + 1e-4 * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
    got = sketch_of(x, 2, start)
    flat = x.reshape(len(x), -1)
    np.testing.assert_allclose(got, sketch64(flat, signs_of(2, flat.shape[1]), start), atol=1e-9)


def test_squares_are_estimated_without_bias():
    """Over 300 differences the estimates are off by √(2/SIZE) in root mean square, and not on average, even where a
    column of a matrix as wide as a multiple of SIZE's neighbour 4096 has nearly all of the norm."""
    x = np.random.default_rng(1).standard_normal((300, 64, 4096)).astype(np.float32)
    x[:, :, 5] *= 300
    got = sketch_of(x)
    ratio = (got**2).sum(1) / (x.reshape(300, -1).astype(np.float64) ** 2).sum(1)
    assert ratio.mean() == pytest.approx(1, abs=0.03)
    plain = sketch_of(x[:, :, 6:])
    ratio = (plain**2).sum(1) / (x[:, :, 6:].astype(np.float64) ** 2).sum((1, 2))
    assert ratio.mean() == pytest.approx(1, abs=0.005) and ratio.std() == pytest.approx((2 / SIZE) ** 0.5, rel=0.2)


def test_leaves_have_signs_of_their_own():
    assert 0.4 < (signs_of(0, 10_000) != signs_of(1, 10_000)).mean() < 0.6
