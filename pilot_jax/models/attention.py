"""Softmax attention that keeps one [L, S] array for its gradient, and transposes none.

Equal to autodiff through `softmax(q·kᵀ/√d + bias)·v` (tests/test_attention.py). On CPU autodiff's version passes over
the scores more often and copies them into other layouts for some of its products.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pilot_jax.models.pointwise import row_sum

MASKED = -1e30  # finite, so that a row with no visible key gives uniform weights instead of NaN


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Batched over the leading axis, accumulated in float32."""
    return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((0,), (0,))), preferred_element_type=jnp.float32)


@jax.custom_vjp
def attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    """q [B, KV, G, L, hd], k and v [B, KV, S, hd], bias float32 [B, L, S] (0 or MASKED) → [B, KV, G, L, hd].

    Softmax in float32, normalised after the product with v. No gradient for `bias`.
    """
    return _forward(q, k, v, bias)[0]


def _forward(q, k, v, bias):
    batch, kv, groups, length, width = q.shape
    flat = [x.reshape(batch * kv, -1, width) for x in (q, k, v)]
    scores = _dot(flat[0], flat[1], (2, 2)).reshape(batch, kv, groups, length, -1) * width**-0.5
    scores = (scores + bias[:, None, None]).reshape(batch * kv, groups * length, -1)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    share = 1 / jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(q.dtype)
    out = _dot(weights, flat[2], (2, 1)) * share
    return out.astype(q.dtype).reshape(q.shape), (*flat, weights, share, out, q.shape)


def _backward(saved, g):
    q, k, v, weights, share, out, shape = saved
    batch, kv, _, _, width = shape
    g = g.reshape(q.shape) * share  # [B·KV, G·L, hd], float32
    inner = row_sum(g * out)
    g = g.astype(q.dtype)
    # The small operand comes first where rows are summed over: [hd, S] is turned round afterwards instead of [L, S].
    dv = _dot(g, weights, (1, 1)).swapaxes(1, 2)
    ds = weights.astype(jnp.float32) * (_dot(g, v, (2, 2)) - inner) * width**-0.5
    ds = ds.astype(q.dtype)
    dq, dk = _dot(ds, k, (2, 1)), _dot(q, ds, (1, 1)).swapaxes(1, 2)
    dq, dk, dv = (x.astype(q.dtype) for x in (dq, dk, dv))
    return dq.reshape(shape), dk.reshape(batch, kv, -1, width), dv.reshape(batch, kv, -1, width), None


attention.defvjp(_forward, _backward)
