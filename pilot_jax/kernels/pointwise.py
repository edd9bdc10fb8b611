"""Norm, gated activation and residual stream with gradient rules of their own: as few passes over memory as they need.

Equal to autodiff through the plain formulas (tests/test_attention.py).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp


def row_sum(x: jax.Array) -> jax.Array:
    """Float32 sums over the last axis, kept as an axis of length 1.

    On CPU a product with ones: XLA's matrix library sums a product of two arrays row by row about ten times slower.
    """
    x = x.astype(jnp.float32)
    if jax.default_backend() == "cpu":
        return jnp.matmul(x, jnp.ones((x.shape[-1], 1), jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(x, axis=-1, keepdims=True)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / √(mean x² + ε) · scale over the last axis, in float32; [..., C] → [..., C] in x's dtype."""
    return _norm_forward(x, scale, eps)[0]


def _norm_forward(x, scale, eps):
    y = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(row_sum(y * y) / x.shape[-1] + eps)
    return (y * inverse * scale.astype(jnp.float32)).astype(x.dtype), (x, scale, inverse)


def _norm_backward(eps, saved, g):
    x, scale, inverse = saved
    unit = x.astype(jnp.float32) * inverse
    g = g.astype(jnp.float32)
    along = g * scale.astype(jnp.float32)
    dx = inverse * (along - unit * (row_sum(along * unit) / x.shape[-1]))
    dscale = jnp.sum(g * unit, axis=tuple(range(x.ndim - 1)))  # dropped by the compiler where the scale is frozen
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


rms_norm.defvjp(_norm_forward, _norm_backward)


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate)·up in float32, in gate's dtype. Keeps its arguments alone for the gradient."""
    return _gated(gate, up)


def _gated(gate, up):
    gate32 = gate.astype(jnp.float32)
    return (gate32 * jax.nn.sigmoid(gate32) * up.astype(jnp.float32)).astype(gate.dtype)


def _gated_backward(saved, g):
    gate, up, g = (x.astype(jnp.float32) for x in (*saved, g))
    share = jax.nn.sigmoid(gate)
    silu = gate * share
    dgate = g * up * (share + silu * (1 - share))
    return dgate.astype(saved[0].dtype), (g * silu).astype(saved[1].dtype)


swiglu.defvjp(lambda gate, up: (_gated(gate, up), (gate, up)), _gated_backward)


@jax.custom_vjp
def normalized(x: jax.Array, eps2: jax.Array) -> jax.Array:
    """x / √(Σ x² + ε²) over the last axis, [..., C], float32. No gradient for `eps2`, [..., 1]."""
    return _normalized_forward(x, eps2)[0]


def _normalized_forward(x, eps2):
    inverse = jax.lax.rsqrt(row_sum(x * x) + eps2)
    return x * inverse, (x * inverse, inverse, eps2)


def _normalized_backward(saved, g):
    y, inverse, eps2 = saved
    return inverse * (g - y * row_sum(g * y)), jnp.zeros_like(eps2)


normalized.defvjp(_normalized_forward, _normalized_backward)


@jax.custom_vjp
def weighted(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., C] times one weight a row, [..., 1]."""
    return x * weight


def _weighted_backward(saved, g):
    x, weight = saved
    return g * weight, row_sum(g * x).astype(weight.dtype)


weighted.defvjp(lambda x, weight: (x * weight, (x, weight)), _weighted_backward)
