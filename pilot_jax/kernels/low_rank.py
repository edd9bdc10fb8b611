"""LoRA's products with gradient rules of their own: x·Aᵀ·Bᵀ, alone or added to x·W in one product."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


@jax.custom_vjp
def low_rank(x: jax.Array, a: jax.Array, bs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """x [T, d_in], A of all targets [ΣR, d_in], Bᵀ of each [R_i, d_out_i] → x·Aᵀ·Bᵀ of each, [T, d_out_i].

    Its gradient rule puts the small operand first in every product over tokens. Autodiff puts the wide one first, and
    XLA's CPU backend then turns all of it round in memory.
    """
    return _forward(x, a, bs)[0]


def _forward(x, a, bs):
    u = x @ a.T
    return tuple(part @ b for part, b in zip(_split(u, bs), bs, strict=True)), (x, u, a, bs)


def _split(u: jax.Array, bs: tuple[jax.Array, ...]) -> list[jax.Array]:
    """Columns (or rows, for A) of each target."""
    return jnp.split(u, np.cumsum([len(b) for b in bs])[:-1], axis=-1)


def _factor_gradients(x, u, bs, gs):
    """Gradients of A and of each B, and x·A's own, [T, ΣR]."""
    over_tokens = (((0,), (0,)), ((), ()))
    gu = jnp.concatenate([g @ b.T for g, b in zip(gs, bs, strict=True)], axis=-1)
    dbs = tuple(jax.lax.dot_general(part, g, over_tokens) for part, g in zip(_split(u, bs), gs, strict=True))
    return jax.lax.dot_general(gu, x, over_tokens), dbs, gu


def _backward(saved, gs):
    x, u, a, bs = saved
    da, dbs, gu = _factor_gradients(x, u, bs, gs)
    return gu @ a, da, dbs


low_rank.defvjp(_forward, _backward)


@jax.custom_vjp
def merged(x: jax.Array, kernels: tuple[jax.Array, ...], a: jax.Array, bs: tuple[jax.Array, ...]
           ) -> tuple[jax.Array, ...]:
    """x·(W_i + A_iᵀ·B_iᵀ) of each target: `low_rank` added to x·W_i, in one product.

    The sums are formed for one layer at a time and again for the gradient; none is kept. No gradient for the kernels:
    what has LoRA beside it is frozen.
    """
    return _merged_forward(x, kernels, a, bs)[0]


def _sums(kernels, a, bs):
    return [w + part.T @ b for w, part, b in zip(kernels, [p.T for p in _split(a.T, bs)], bs, strict=True)]


def _merged_forward(x, kernels, a, bs):
    return tuple(x @ w for w in _sums(kernels, a, bs)), (x, kernels, a, bs)


def _merged_backward(saved, gs):
    x, kernels, a, bs = saved
    da, dbs, _ = _factor_gradients(x, x @ a.T, bs, gs)
    over_outputs = (((1,), (1,)), ((), ()))
    dx = sum(jax.lax.dot_general(g, w, over_outputs) for g, w in zip(gs, _sums(kernels, a, bs), strict=True))
    return dx, tuple(jnp.zeros_like(w) for w in kernels), da, dbs


merged.defvjp(_merged_forward, _merged_backward)
