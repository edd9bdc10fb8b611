"""Norms, gated activation and weighting with gradient rules that pass over memory as few times as possible.

The plain formulas (tests/unit/kernels/test_pointwise.py compares with their values and autodiff gradients in float64):

    row_sum(x)            = sum(x, axis=-1, keepdims=True)
    rms_norm(x, scale, ε) = x / sqrt(mean(x**2, axis=-1, keepdims=True) + ε) * scale
    swiglu(gate, up)      = gate * sigmoid(gate) * up
    normalized(x, ε²)     = x / sqrt(sum(x**2, axis=-1, keepdims=True) + ε²)
    weighted(x, w)        = x * w
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pilot_jax.kernels.backend import sums_as_products


def row_sum(x: Float[Array, "*rows C"]) -> Float32[Array, "*rows 1"]:
    """Returns float32 sums over the last axis, which stays as an axis of length 1."""
    x = x.astype(jnp.float32)
    if sums_as_products():
        return jnp.matmul(x, jnp.ones((x.shape[-1], 1), jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(x, axis=-1, keepdims=True)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*rows C"], scale: Float[Array, " C"], eps: float) -> Float[Array, "*rows C"]:
    """Returns x / √(mean x² + ε) · scale over the last axis (Zhang and Sennrich, 2019, arXiv 1910.07467).

    Computed in float32, returned in x's dtype.
    """
    return _norm_forward(x, scale, eps)[0]


def _norm_forward(x: jax.Array, scale: jax.Array, eps: float
                  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    y = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(row_sum(y * y) / x.shape[-1] + eps)
    return (y * inverse * scale.astype(jnp.float32)).astype(x.dtype), (x, scale, inverse)


def _norm_backward(eps: float, saved: tuple[jax.Array, jax.Array, jax.Array], g: jax.Array
                   ) -> tuple[jax.Array, jax.Array]:
    x, scale, inverse = saved
    unit = x.astype(jnp.float32) * inverse
    g = g.astype(jnp.float32)
    along = g * scale.astype(jnp.float32)
    dx = inverse * (along - unit * (row_sum(along * unit) / x.shape[-1]))
    dscale = jnp.sum(g * unit, axis=tuple(range(x.ndim - 1)))  # dropped by the compiler where the scale is frozen
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


rms_norm.defvjp(_norm_forward, _norm_backward)


@jax.custom_vjp
def swiglu(gate: Float[Array, "*rows F"], up: Float[Array, "*rows F"]) -> Float[Array, "*rows F"]:
    """Returns silu(gate)·up (Shazeer, 2020, arXiv 2002.05202), computed in float32, in gate's dtype.

    Its gradient needs nothing stored but the two arguments.
    """
    return _gated(gate, up)


def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    gate32 = gate.astype(jnp.float32)
    return (gate32 * jax.nn.sigmoid(gate32) * up.astype(jnp.float32)).astype(gate.dtype)


def _gated_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up, g = (x.astype(jnp.float32) for x in (*saved, g))
    share = jax.nn.sigmoid(gate)
    silu = gate * share
    dgate = g * up * (share + silu * (1 - share))
    return dgate.astype(saved[0].dtype), (g * silu).astype(saved[1].dtype)


swiglu.defvjp(lambda gate, up: (_gated(gate, up), (gate, up)), _gated_backward)


@jax.custom_vjp
def normalized(x: Float32[Array, "*rows C"], eps2: Float32[Array, "*#rows 1"]) -> Float32[Array, "*rows C"]:
    """Returns x / √(Σ x² + ε²) over the last axis. `eps2` = ε² may be shared by several rows and has no gradient."""
    return _normalized_forward(x, eps2)[0]


def _normalized_forward(x: jax.Array, eps2: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    inverse = jax.lax.rsqrt(row_sum(x * x) + eps2)
    return x * inverse, (x * inverse, inverse, eps2)


def _normalized_backward(saved: tuple[jax.Array, jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    y, inverse, eps2 = saved
    return inverse * (g - y * row_sum(g * y)), jnp.zeros_like(eps2)


normalized.defvjp(_normalized_forward, _normalized_backward)


@jax.custom_vjp
def weighted(x: Float[Array, "*rows C"], weight: Float[Array, "*rows 1"]) -> Float[Array, "*rows C"]:
    """Returns each row of x times its weight, in their dtype."""
    return x * weight


def _weighted_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    return g * weight, row_sum(g * x).astype(weight.dtype)


weighted.defvjp(lambda x, weight: (x * weight, (x, weight)), _weighted_backward)
