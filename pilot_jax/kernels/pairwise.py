"""Sums over pairs of clients of a cohort, strip by strip: Gram matrices and squared norms of differences."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

PAIRS = 32  # subtracted at once


def exact_einsum(spec: str, *operands: jax.Array) -> jax.Array:
    """Full float32 products: by default accelerators round the factors."""
    return jnp.einsum(spec, *operands, precision=jax.lax.Precision.HIGHEST)


def _product_squares(a: jax.Array, b: jax.Array, a_k: jax.Array, b_k: jax.Array) -> jax.Array:
    """‖B_kA_k − B_sA_s‖² summed over layers for every s; a, b [S, layers, …] → [S]. BA is never formed.

    With ΔB = B_k − B_s and ΔA = A_k − A_s the difference is ΔB·A_k + B_s·ΔA, whose squared norm needs R×R arrays:
    ‖ΔB·A_k‖² + ‖B_s·ΔA‖² + 2⟨ΔBᵀB_s, A_kΔAᵀ⟩.
    """
    delta_a, delta_b = a_k - a, b_k - b
    first = exact_einsum("sldr,slde->slre", delta_b, delta_b) * exact_einsum("lri,lei->lre", a_k, a_k)
    second = exact_einsum("sldr,slde->slre", b, b) * exact_einsum("slri,slei->slre", delta_a, delta_a)
    cross = exact_einsum("sldr,slde->slre", delta_b, b) * exact_einsum("lri,slei->slre", a_k, delta_a)
    return jnp.maximum(jnp.sum(first + second + 2 * cross, axis=(1, 2, 3)), 0.0)


def strip_width(cohort: int, pairs: bool = False) -> int:
    """Columns that are worked on at a time: on CPU as many as stay in its cache, the differences of PAIRS too."""
    if jax.default_backend() == "cpu":
        return 2**11 if pairs else max(2**10, min(2**15, 2**20 // cohort))
    return max(2**10, min(2**20, 2**26 // cohort))


def _over_strips(function: Callable[[jax.Array], jax.Array], leaf: jax.Array, width: int) -> jax.Array:
    """Σ function(strip) over strips [S, width] float32 of a leaf [S, …]."""
    x = leaf.reshape(leaf.shape[0], -1)

    def of(start: jax.Array | int, width: int) -> jax.Array:
        return function(jax.lax.dynamic_slice_in_dim(x, start, width, axis=1).astype(jnp.float32))

    strips, rest = divmod(x.shape[1], width)
    if not strips:
        return of(0, rest)
    total = jax.lax.fori_loop(1, strips, lambda i, total: total + of(i * width, width), of(0, width))
    return total + of(strips * width, rest) if rest else total


@jax.jit
def _factor_gram(leaf: jax.Array) -> jax.Array:
    """⟨x_k − x̄, x_j − x̄⟩ of a leaf [S, …] → [S, S]."""
    def of(x: jax.Array) -> jax.Array:
        # The mean as a product: jnp.mean takes five times as long on CPU.
        x = x - exact_einsum("s,sp->p", jnp.full(len(x), 1 / len(x)), x)
        return exact_einsum("sp,tp->st", x, x)

    return _over_strips(of, leaf, strip_width(len(leaf)))


@jax.jit
def _product_gram(a: jax.Array, b: jax.Array) -> jax.Array:
    """⟨B_kA_k, B_jA_j⟩ summed over the layers of a target; [S, layers, …] → [S, S]."""
    cohort, _, rank, _ = a.shape
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)

    def layer(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows = [x.reshape(cohort * rank, -1) for x in pair]
        inner = exact_einsum("sp,tp->st", rows[0], rows[0]) * exact_einsum("sp,tp->st", rows[1], rows[1])
        return jnp.sum(inner.reshape(cohort, rank, cohort, rank), axis=(1, 3))

    by_layer = a.swapaxes(0, 1), b.transpose(1, 0, 3, 2)  # [layers, S, R, …]
    return jnp.sum(jax.lax.map(layer, by_layer), axis=0)


@jax.jit
def _factor_pairs(leaf: jax.Array, rows: jax.Array, columns: jax.Array, count: jax.Array) -> jax.Array:
    """‖x_k − x_j‖² of the first `count` pairs; rows, columns int [N] → [N], beyond `count` whatever comes out."""
    at_once = min(PAIRS, len(rows))
    # Whole groups of pairs; those that fill the last one up are subtracted in vain.
    k, j = (jnp.pad(n, (0, -len(rows) % at_once)) for n in (rows, columns))

    def of(x: jax.Array) -> jax.Array:
        def group(i, out):
            left, right = (x.at[jax.lax.dynamic_slice_in_dim(n, i * at_once, at_once)].get(mode="promise_in_bounds")
                           for n in (k, j))
            # As a product: a sum over the last axis takes four times as long on CPU.
            squares = exact_einsum("np,p->n", jnp.square(left - right), jnp.ones(x.shape[1]))
            return jax.lax.dynamic_update_slice_in_dim(out, squares, i * at_once, axis=0)

        return jax.lax.fori_loop(0, -(-count // at_once), group, jnp.zeros(len(k)))

    return _over_strips(of, leaf, strip_width(len(leaf), pairs=True))[:len(rows)]


@jax.jit
def _product_pairs(a: jax.Array, b: jax.Array, rows: jax.Array, columns: jax.Array, count: jax.Array) -> jax.Array:
    def pair(i, out):
        k, j = rows[i], columns[i]
        a_k, b_k, a_j, b_j = (x[n].astype(jnp.float32) for n in (k, j) for x in (a, b))
        return out.at[i].set(_product_squares(a_j[None], b_j[None], a_k, b_k)[0])

    return jax.lax.fori_loop(0, count, pair, jnp.zeros(len(rows)))
