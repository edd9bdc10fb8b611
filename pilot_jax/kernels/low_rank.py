"""LoRA's products with gradient rules of their own, for several targets that read the same x.

The plain formulas of target i, with which test_attention.py and test_pointwise.py in tests/unit/kernels/ compare:

    low_rank(x, A, B)[i]  = x @ A[i].T @ B[i]                 # A[i] [R, d_in], B[i] = (α/r)·Bᵀ [R, d_out]
    merged(x, W, A, B)[i] = x @ (W[i] + A[i].T @ B[i])        # W[i] [d_in, d_out]; the same as the line below
    linears_with_low_rank(x, W, A, B)[i] = x @ W[i] + low_rank(x, A, B)[i]

The A of all targets are passed as one array [ΣR, d_in], so that x is read once.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pilot_jax.kernels.backend import merges_low_rank
from pilot_jax.kernels.quantised import Kernel, Stored, product

Arrays = tuple[jax.Array, ...]


def linears_with_low_rank(x: Float[Array, "tokens d_in"], kernels: tuple[Kernel, ...],
                          a: Float[Array, "_sum_of_R d_in"], bs: tuple[Float[Array, "_R _d_out"], ...],
                          operands: str = "float32") -> tuple[Float[Array, "tokens _d_out"], ...]:
    """Returns x·W_i + x·A_iᵀ·B_i of every target, computed as `backend.merges_low_rank` chooses.

    Args:
        kernels: W of each target; of those that are `Stored`, no sum with A_iᵀ·B_i is formed.
        operands: the dtype to which `merged` rounds the factors of its products with W_i + A_iᵀ·B_i.
    """
    if merges_low_rank(x.dtype) and not any(isinstance(w, Stored) for w in kernels):
        return merged(x, cast(Arrays, kernels), a, bs, operands)
    return tuple(product(x, w) + delta for w, delta in zip(kernels, low_rank(x, a, bs), strict=True))


@jax.custom_vjp
def low_rank(x: Float[Array, "tokens d_in"], a: Float[Array, "_sum_of_R d_in"],
             bs: tuple[Float[Array, "_R _d_out"], ...]) -> tuple[Float[Array, "tokens _d_out"], ...]:
    """Returns x·A_iᵀ·B_i of every target.

    Its gradient rule puts the small factor first in every product over tokens. Autodiff puts the wide one first, and
    XLA's CPU backend then transposes all of it in memory.
    """
    return _forward(x, a, bs)[0]


def _forward(x: jax.Array, a: jax.Array, bs: Arrays) -> tuple[Arrays, tuple[jax.Array, jax.Array, jax.Array, Arrays]]:
    u = x @ a.T
    return tuple(part @ b for part, b in zip(_split(u, bs), bs, strict=True)), (x, u, a, bs)


def _split(u: jax.Array, bs: Arrays) -> list[jax.Array]:
    """Returns the columns [..., R_i] of each target out of [..., ΣR]."""
    return jnp.split(u, np.cumsum([len(b) for b in bs])[:-1], axis=-1)


def _factor_gradients(x: jax.Array, u: jax.Array, bs: Arrays, gs: Arrays) -> tuple[jax.Array, Arrays, jax.Array]:
    """Returns the gradients of A, of each B and of u = x·Aᵀ [tokens, ΣR]."""
    over_tokens = (((0,), (0,)), ((), ()))
    gu = jnp.concatenate([g @ b.T for g, b in zip(gs, bs, strict=True)], axis=-1)
    dbs = tuple(jax.lax.dot_general(part, g, over_tokens) for part, g in zip(_split(u, bs), gs, strict=True))
    return jax.lax.dot_general(gu, x, over_tokens), dbs, gu


def _backward(saved: tuple[jax.Array, jax.Array, jax.Array, Arrays], gs: Arrays
              ) -> tuple[jax.Array, jax.Array, Arrays]:
    x, u, a, bs = saved
    da, dbs, gu = _factor_gradients(x, u, bs, gs)
    return gu @ a, da, dbs


low_rank.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def merged(x: Float[Array, "tokens d_in"], kernels: tuple[Float[Array, "d_in _d_out"], ...],
           a: Float[Array, "_sum_of_R d_in"], bs: tuple[Float[Array, "_R _d_out"], ...],
           operands: str = "float32") -> tuple[Float[Array, "tokens _d_out"], ...]:
    """Returns x·(W_i + A_iᵀ·B_i) of every target, one product each.

    The sums are formed for one layer at a time, and again for the gradient; none is stored. The kernels W get no
    gradient: a weight that has LoRA beside it is frozen.

    Args:
        operands: the dtype to which the factors are rounded; "bfloat16" is faster on CPUs that multiply it. Products
            are added in float32, and the gradients of A and B are float32 products.
    """
    return _merged_forward(x, kernels, a, bs, operands)[0]


def _product(x: jax.Array, w: jax.Array, axis: int, operands: str) -> jax.Array:
    """Returns x times w, summed over the last axis of x and `axis` of w, with both rounded to the dtype `operands`."""
    return jax.lax.dot_general(x.astype(operands), w.astype(operands), (((1,), (axis,)), ((), ())),
                               preferred_element_type=x.dtype)


def _sums(kernels: Arrays, a: jax.Array, bs: Arrays) -> list[jax.Array]:
    return [w + part.T @ b for w, part, b in zip(kernels, [p.T for p in _split(a.T, bs)], bs, strict=True)]


def _merged_forward(x: jax.Array, kernels: Arrays, a: jax.Array, bs: Arrays, operands: str
                    ) -> tuple[Arrays, tuple[jax.Array, Arrays, jax.Array, Arrays]]:
    return tuple(_product(x, w, 0, operands) for w in _sums(kernels, a, bs)), (x, kernels, a, bs)


def _merged_backward(operands: str, saved: tuple[jax.Array, Arrays, jax.Array, Arrays], gs: Arrays
                     ) -> tuple[jax.Array, Arrays, jax.Array, Arrays]:
    x, kernels, a, bs = saved
    da, dbs, _ = _factor_gradients(x, x @ a.T, bs, gs)
    dx: Any = sum(_product(g, w, 1, operands) for g, w in zip(gs, _sums(kernels, a, bs), strict=True))
    return dx, tuple(jnp.zeros_like(w) for w in kernels), da, dbs


merged.defvjp(_merged_forward, _merged_backward)
