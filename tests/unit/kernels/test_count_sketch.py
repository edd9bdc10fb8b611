"""Tests of count sketches against NumPy in float64, written from the formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pilot_jax.kernels.count_sketch import SIZE, leaf_sketch


def signs_of(number, count):
    """Returns the signs of a leaf, which are fixed but have no formula."""
    return np.asarray(jax.random.rademacher(jax.random.fold_in(jax.random.key(0), number), (count,), jnp.int8))


def sketch64(x, signs, start):
    bins = (start + np.arange(x.shape[1])) % SIZE
    return np.stack([np.bincount(bins, signs * row, SIZE) for row in x.astype(np.float64)])


@pytest.mark.parametrize(("shape", "start"), [((3, 5), 4090), ((11, 2, 3 * SIZE), 0), ((9, 7, 31, 83), 17)])
def test_sketch_is_that_of_float64(shape, start):
    """Also where all entries have most of their value in common: what float32 would round away is kept."""
    x = (50 + 1e-4 * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
    got = np.asarray(leaf_sketch(x, np.int32(2), np.int32(start)), np.float64).sum(0)
    flat = x.reshape(len(x), -1)
    np.testing.assert_allclose(got, sketch64(flat, signs_of(2, flat.shape[1]), start), atol=1e-9)


def test_squares_are_estimated_without_bias():
    """Over 300 differences the estimates are off by √(2/SIZE) in root mean square, and not on average, even where a
    column of a matrix as wide as a multiple of SIZE's neighbour 4096 has nearly all of the norm."""
    x = np.random.default_rng(1).standard_normal((300, 64, 4096)).astype(np.float32)
    x[:, :, 5] *= 300
    got = np.asarray(leaf_sketch(x, np.int32(0), np.int32(0)), np.float64).sum(0)
    ratio = (got**2).sum(1) / (x.reshape(300, -1).astype(np.float64) ** 2).sum(1)
    assert ratio.mean() == pytest.approx(1, abs=0.03)
    plain = np.asarray(leaf_sketch(x[:, :, 6:], np.int32(0), np.int32(0)), np.float64).sum(0)
    ratio = (plain**2).sum(1) / (x[:, :, 6:].astype(np.float64) ** 2).sum((1, 2))
    assert ratio.mean() == pytest.approx(1, abs=0.005) and ratio.std() == pytest.approx((2 / SIZE) ** 0.5, rel=0.2)


def test_leaves_have_signs_of_their_own():
    assert 0.4 < (signs_of(0, 10_000) != signs_of(1, 10_000)).mean() < 0.6
