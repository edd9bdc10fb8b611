"""Softmax attention with a gradient rule of its own, and causal attention by XLA or cuDNN.

The plain formula, for one head of width hd (tests/unit/kernels/test_attention.py compares value and gradient with it):

    scores  = q @ k.T / sqrt(hd) + bias          # q [L, hd], k and v [M, hd], bias [L, M]: 0 or MASKED
    weights = softmax(scores, axis=-1)           # float32
    out     = weights @ v                        # [L, hd]

`attention` stores one [L, M] array for its gradient and transposes none. For the plain formula, XLA's CPU
backend passes over the scores more often and copies them into other layouts for some products.

Dimension letters beside the package's: L queries, M keys (the text itself, or the slots of a cache), KV heads of keys
and values, G query heads per KV head, hd the width of a head.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from pilot_jax.errors import InputError
from pilot_jax.kernels.backend import has_cudnn
from pilot_jax.kernels.pointwise import row_sum
from pilot_jax.parallel.devices import platform

MASKED = -1e30  # finite, so that a row with no visible key gives uniform weights instead of NaN


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """A product batched over the leading axis, accumulated in float32; `contract` is one axis of each factor."""
    return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((0,), (0,))), preferred_element_type=jnp.float32)


@jax.custom_vjp
def attention(q: Float[Array, "B KV G L hd"], k: Float[Array, "B KV M hd"], v: Float[Array, "B KV M hd"],
              bias: Float32[Array, "B L M"]) -> Float[Array, "B KV G L hd"]:
    """Returns softmax(q·kᵀ/√hd + bias)·v in q's dtype, for any mask.

    The softmax is computed in float32 and normalised after the product with v. `bias` (0 or MASKED) has no gradient.
    """
    return _forward(q, k, v, bias)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> tuple[jax.Array, tuple[Any, ...]]:
    batch, kv, groups, length, width = q.shape
    flat = [x.reshape(batch * kv, -1, width) for x in (q, k, v)]
    scores = _dot(flat[0], flat[1], (2, 2)).reshape(batch, kv, groups, length, -1) * width**-0.5
    scores = (scores + bias[:, None, None]).reshape(batch * kv, groups * length, -1)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    share = 1 / jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(q.dtype)
    out = _dot(weights, flat[2], (2, 1)) * share
    return out.astype(q.dtype).reshape(q.shape), (*flat, weights, share, out, q.shape)


def _backward(saved: tuple[Any, ...], g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, weights, share, out, shape = saved
    batch, kv, _, _, width = shape
    g = g.reshape(q.shape) * share  # [B·KV, G·L, hd], float32
    inner = row_sum(g * out)
    g = g.astype(q.dtype)
    # The small factor comes first where queries are summed over, so that [hd, M] is transposed afterwards, not [L, M].
    dv = _dot(g, weights, (1, 1)).swapaxes(1, 2)
    ds = weights.astype(jnp.float32) * (_dot(g, v, (2, 2)) - inner) * width**-0.5
    ds = ds.astype(q.dtype)
    dq, dk = _dot(ds, k, (2, 1)), _dot(q, ds, (1, 1)).swapaxes(1, 2)
    dq, dk, dv = (x.astype(q.dtype) for x in (dq, dk, dv))
    return dq.reshape(shape), dk.reshape(batch, kv, -1, width), dv.reshape(batch, kv, -1, width), None


attention.defvjp(_forward, _backward)


def causal_attention(q: Float[Array, "B KV G L hd"], k: Float[Array, "B KV L hd"], v: Float[Array, "B KV L hd"],
                     window: int | None, implementation: Literal["cudnn", "xla"]) -> Float[Array, "B KV G L hd"]:
    """Returns causal attention by JAX's `implementation`: a query sees the keys at and before itself.

    With a `window`, it sees the last `window` of these, its own included. There is no bias, because cuDNN's attention
    cannot be vmapped over clients with one (jax 0.10).
    """
    batch, kv, groups, length, width = q.shape
    out = jax.nn.dot_product_attention(
        q.reshape(batch, kv * groups, length, width).swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), is_causal=True,
        local_window_size=None if window is None else (window - 1, 0), implementation=implementation)
    return out.swapaxes(1, 2).reshape(q.shape)


def check_cudnn(head_dim: int, layers_see_alike: bool, dtype: str) -> None:
    """Checks that cuDNN's attention can train a model.

    Args:
        head_dim: the width of the model's heads.
        layers_see_alike: whether all layers have the same sliding window, or none has one.
        dtype: as in `model.dtype`: auto, float32 or bfloat16.

    Raises:
        InputError: it cannot, on this machine or for this model.
    """
    reason = cudnn_obstacle("gpu" if has_cudnn() else platform(), head_dim, layers_see_alike, dtype)
    if reason is not None:
        raise InputError(f"system.attention: cudnn {reason}. Or set system.attention=own.")


def cudnn_obstacle(device: str, head_dim: int, layers_see_alike: bool, dtype: str) -> str | None:
    """Returns why cuDNN's attention cannot train a model on a kind of device (cpu, gpu or tpu); None: it can.

    The other arguments are those of `check_cudnn`."""
    reason = None
    if device != "gpu":
        reason = f"needs an NVIDIA GPU, but JAX sees a {device}"
    elif dtype == "float32":
        reason = "computes in bfloat16 alone. Set model.dtype=bfloat16"
    elif head_dim % 8:
        reason = f"needs heads whose width is a multiple of 8, and the model's have {head_dim}"
    elif not layers_see_alike:
        reason = "cannot have a sliding window in some layers and none in others, as this model does"
    return reason
