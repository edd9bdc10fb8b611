"""Softmax attention that keeps one [L, S] array for its gradient, and transposes none; or cuDNN's, that keeps none.

`attention` equals autodiff through `softmax(q·kᵀ/√d + bias)·v` (tests/test_attention.py). On CPU autodiff's version
passes over the scores more often and copies them into other layouts for some of its products.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from pilot_jax.errors import InputError
from pilot_jax.kernels.pointwise import row_sum
from pilot_jax.models.spec import TextSpec

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


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None,
                     implementation: Literal["cudnn", "xla"]) -> jax.Array:
    """`attention` where a query sees the keys at and before itself, of these the last `window` if given, in JAX's own
    `implementation`. Shapes as there, L = S.

    Without a bias: cuDNN's cannot be vmapped over clients with one (jax 0.10).
    """
    batch, kv, groups, length, width = q.shape
    out = jax.nn.dot_product_attention(
        q.reshape(batch, kv * groups, length, width).swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), is_causal=True,
        local_window_size=None if window is None else (window - 1, 0), implementation=implementation)
    return out.swapaxes(1, 2).reshape(q.shape)


def check_cudnn(config: TextSpec, dtype: str) -> None:
    """dtype: as in `model.dtype`.

    Raises:
        InputError: cuDNN's attention cannot be used here, or not for this model.
    """
    reason = None
    if jax.default_backend() != "gpu":
        reason = f"needs an NVIDIA GPU, and JAX sees a {jax.default_backend()} here"
    elif dtype == "float32":
        reason = "computes in bfloat16 alone. Set model.dtype=bfloat16"
    elif config.head_dim % 8:
        reason = f"wants heads whose width 8 divides, and the model's have {config.head_dim}"
    elif not config.layers_see_alike:
        reason = "cannot have a sliding window in some layers and none in others, as this model does"
    if reason is not None:
        raise InputError(f"system.attention: cudnn {reason}. Or set system.attention=own.")
