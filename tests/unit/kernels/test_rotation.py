"""Tests of rotary position embedding against complex multiplication in float64, on every kind of device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pilot_jax.kernels.rotation import rotated


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize(("dtype", "error"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_rotation_of_pairs_and_its_gradient(monkeypatch, backend, dtype, error):
    """The pair (i, i + d/2) is multiplied by exp(iθ), and its cotangent by exp(−iθ)."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rng = np.random.default_rng(0)
    x, g, angles = rng.normal(size=(2, 3, 5, 8)), rng.normal(size=(2, 3, 5, 8)), rng.normal(size=(2, 1, 5, 4)) * 100
    tables = [jnp.asarray(np.concatenate([f(angles)] * 2, -1), jnp.float32) for f in (np.cos, np.sin)]
    x, g = (np.asarray(jnp.asarray(v, dtype), np.float64) for v in (x, g))

    def turned(v, sign):
        pairs = (v[..., :4] + 1j * v[..., 4:]) * np.exp(sign * 1j * angles)
        return np.concatenate([pairs.real, pairs.imag], -1)

    out, back = jax.vjp(lambda v: rotated(v, *tables), jnp.asarray(x, dtype))
    gradient, = back(jnp.asarray(g, dtype))
    assert out.dtype == gradient.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), turned(x, 1), atol=error)
    np.testing.assert_allclose(np.asarray(gradient, np.float64), turned(g, -1), atol=error)


@pytest.mark.parametrize(("backend", "products"), [("cpu", 2), ("gpu", 0), ("tpu", 0)])
def test_only_the_cpu_swaps_halves_by_a_product(monkeypatch, backend, products):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    table = jnp.ones((1, 1, 5, 8))
    text = str(jax.make_jaxpr(lambda v: jax.vjp(lambda u: rotated(u, table, table), v)[1](v))(jnp.ones((1, 2, 5, 8))))
    assert text.count("dot_general[") == products
