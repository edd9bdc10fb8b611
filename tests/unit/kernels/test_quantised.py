"""Tests of products with quantised weights, against NumPy in float64 written from the formulas."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pilot_jax.errors import InputError
from pilot_jax.kernels import quantised as kernels
from pilot_jax.kernels.low_rank import linears_with_low_rank
from pilot_jax.models.lora import lora_linears

# Quantiles of NormalFloat4 as Dettmers et al. (2023, appendix E) list them.
LEVELS = np.asarray([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                     0.7229568362236023, 1.0])


def numpy_dequantised(weight):
    """Returns a quantised weight in float64."""
    scale = np.asarray(weight["scale"], np.float64)
    if "packed" in weight:
        packed = np.asarray(weight["packed"])
        levels = np.empty((2 * len(packed), packed.shape[1]))
        levels[0::2], levels[1::2] = LEVELS[packed % 16], LEVELS[packed // 16]
    else:
        levels = np.asarray(weight["qvalue"], np.float64)
    return levels * np.repeat(scale, len(levels) // len(scale), axis=0)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("scheme", kernels.SCHEMES)
@pytest.mark.parametrize("d_in", [128, 48])
def test_every_entry_is_the_nearest_level(scheme, d_in):
    """48 inputs are in blocks of 16, the largest divisor that 64 and 48 have in common."""
    w = numbers(d_in, 24)
    w[:, 3] = 0
    stored = kernels.quantised(jnp.asarray(w, jnp.float32), scheme)
    rows = d_in if scheme == "int8" else {128: 64, 48: 16}[d_in]
    largest = np.abs(w.reshape(-1, rows, 24)).max(axis=1)
    scale = np.where(largest == 0, 1.0, largest / (127.5 if scheme == "int8" else 1.0))
    np.testing.assert_allclose(stored["scale"], scale, rtol=1e-6)
    levels = np.arange(-128, 128) if scheme == "int8" else LEVELS
    unit = w / np.repeat(scale, rows, axis=0)
    nearest = np.abs(unit[..., None] - levels).min(axis=-1)
    off = np.abs(unit - numpy_dequantised(stored) / np.repeat(scale, rows, axis=0))
    np.testing.assert_allclose(off, nearest, atol=2e-5)
    assert sum(a.nbytes for n, a in stored.items() if n != "scale") == (w.size if scheme == "int8" else w.size // 2)
    np.testing.assert_allclose(kernels.dequantised(stored), numpy_dequantised(stored), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scheme", kernels.SCHEMES)
def test_products_and_gradients(scheme):
    """x·W and its gradient agree with float64, for one client and for two that share the weight."""
    stored = kernels.quantised(jnp.asarray(numbers(128, 24), jnp.float32), scheme)
    exact, x, g = numpy_dequantised(stored), numbers(2, 5, 128, seed=1), numbers(2, 5, 24, seed=2)
    f = jax.jit(lambda x: jax.vjp(jax.vmap(lambda one: kernels.product(one, kernels.Stored(stored))), x))
    out, back = f(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(out, x @ exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(back(jnp.asarray(g, jnp.float32))[0], g @ exact.T, rtol=1e-5, atol=2e-5)


def test_the_backward_pass_stores_no_dequantised_weight():
    """Of scanned layers, the gradient stores 8 bits a weight at most, not the 32 of the dequantised weights."""
    layer = kernels.quantised(jnp.asarray(numbers(64, 64), jnp.float32), "int8")
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), layer)

    def through(x, stack):
        return jax.lax.scan(lambda x, w: (jnp.tanh(kernels.product(x, kernels.Stored(w))), None), x, stack)[0].sum()

    x = jnp.ones((2, 64))
    saved = jax.make_jaxpr(lambda x, stack: jax.vjp(lambda x: through(x, stack), x)[1])(x, stack).jaxpr.outvars
    assert max(v.aval.size * v.aval.dtype.itemsize for v in saved) <= 4 * 64 * 64


@pytest.mark.parametrize("scheme", kernels.SCHEMES)
def test_lora_beside_a_quantised_weight(scheme):
    """x·W + x·AᵀB and a change of W agree with float64, and so do the gradients of A and B."""
    stored = tuple(kernels.quantised(jnp.asarray(numbers(64, 16, seed=s), jnp.float32), scheme) for s in (1, 2))
    held = tuple(map(kernels.Stored, stored))
    x, a, g = numbers(7, 64), numbers(6, 64, seed=3), numbers(7, 16, seed=4)
    bs = [numbers(3, 16, seed=s) for s in (5, 6)]
    out, back = jax.vjp(lambda a, bs: linears_with_low_rank(jnp.asarray(x, jnp.float32), held, a, bs),
                        jnp.asarray(a, jnp.float32), tuple(jnp.asarray(b, jnp.float32) for b in bs))
    da, dbs = back((jnp.asarray(g, jnp.float32), jnp.zeros((7, 16))))
    for i in (0, 1):
        part = a[3 * i:3 * i + 3]
        np.testing.assert_allclose(out[i], x @ (numpy_dequantised(stored[i]) + part.T @ bs[i]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(da[:3], bs[0] @ g.T @ x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dbs[0], a[:3] @ x.T @ g, rtol=1e-4, atol=1e-4)
    assert not np.any(da[3:]) and not np.any(dbs[1])
    change = numbers(2, 64, seed=7), numbers(16, 2, seed=8)
    pair = {"a": a[:3], "b": bs[0].T, "residual_a": change[0], "residual_b": change[1]}
    single, = lora_linears(jnp.asarray(x, jnp.float32), held[:1],
                           {"q": {n: jnp.asarray(v, jnp.float32) for n, v in pair.items()}}, ("q",), 0.5)
    whole = numpy_dequantised(stored[0]) + 0.5 * (a[:3].T @ bs[0] + (change[1] @ change[0]).T)
    np.testing.assert_allclose(single, x @ whole, rtol=1e-4, atol=1e-4)


def test_pairs_of_inputs_are_packed():
    with pytest.raises(InputError, match="15"):
        kernels.quantised(jnp.ones((15, 2)), "nf4")


def test_qwix_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(InputError, match=r"model\.base.*extra 'quant'"):
        kernels.quantised(jnp.ones((64, 2)), "nf4")
