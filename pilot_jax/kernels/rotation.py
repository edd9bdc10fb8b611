"""Rotary position embedding with a gradient rule of its own.

The plain formula, for a head of width hd whose halves form pairs, and tables whose halves are equal
(tests/unit/kernels/test_rotation.py compares value and gradient with it):

    x1, x2 = split(x.astype(float32), 2, axis=-1)
    out    = x * cos + concatenate([-x2, x1]) * sin        # in x's dtype

The gradient is the rotation back, the same formula with −sin. What a derivation by rule would compute from the product
that swaps halves on CPU is a product of float32 cotangents, which an accelerator takes long for.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from pilot_jax.kernels.backend import swaps_as_product


@jax.custom_vjp
def rotated(x: Float[Array, "B H L hd"], cos: Float32[Array, "B 1 L hd"], sin: Float32[Array, "B 1 L hd"],
            ) -> Float[Array, "B H L hd"]:
    """Returns x rotated, computed in float32. The tables, equal in both halves, have no gradient."""
    return (x.astype(jnp.float32) * cos + _swapped(x) * sin).astype(x.dtype)


def _swapped(x: jax.Array) -> Float32[Array, "B H L hd"]:
    """Returns the halves of x swapped, the second one negated, exactly."""
    half = x.shape[-1] // 2
    if not swaps_as_product():
        x = x.astype(jnp.float32)
        return jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    swap = np.zeros((2 * half, 2 * half), np.float32)
    swap[range(half, 2 * half), range(half)] = -1  # (x·swap)[i] = −x[i + half]
    swap[range(half), range(half, 2 * half)] = 1
    return jnp.matmul(x, swap.astype(x.dtype), precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _forward(x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return rotated(x, cos, sin), (cos, sin)


def _backward(tables: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, None, None]:
    cos, sin = tables
    return rotated(g, cos, -sin), None, None


rotated.defvjp(_forward, _backward)
