"""Sums over pairs of clients of a cohort: Gram matrices and squared norms of differences, a strip of columns at a time.

The plain formulas, of a leaf x [S, …] read as [S, P], and of LoRA factors a [S, layers, R, d_in],
b [S, layers, d_out, R] (tests/unit/federation/test_mixing.py compares distances with float64):

    factor_gram(x)[k, j]     = (x[k] - mean(x)) @ (x[j] - mean(x))
    product_gram(a, b)[k, j] = sum(sum((b[k, l] @ a[k, l]) * (b[j, l] @ a[j, l])) for l in layers)
    factor_pairs(x, k, j)    = sum((x[k] - x[j])**2)
    product_pairs(a, b, k, j) = sum(sum((b[k, l] @ a[k, l] - b[j, l] @ a[j, l])**2) for l in layers)

No product b @ a is ever formed, and no difference of more than PAIRS pairs and one strip. All results are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from pilot_jax.kernels.backend import columns_at_once
from pilot_jax.parallel.mesh import mesh_of, on_parts
from pilot_jax.programs import KeptJit

PAIRS = 32  # pairs whose differences are in memory at once


def exact_einsum(spec: str, *operands: Float[Array | np.ndarray, ...]) -> Float[Array, ...]:
    """Returns `jnp.einsum` with full float32 products; by default accelerators round the factors."""
    return jnp.einsum(spec, *operands, precision=jax.lax.Precision.HIGHEST)


def _product_squares(a: jax.Array, b: jax.Array, a_k: jax.Array, b_k: jax.Array) -> jax.Array:
    """Returns ‖B_kA_k − B_sA_s‖² summed over layers for every s; a, b [S, layers, …] → [S]. BA is never formed.

    With ΔB = B_k − B_s and ΔA = A_k − A_s the difference is ΔB·A_k + B_s·ΔA, whose squared norm needs R×R arrays:
    ‖ΔB·A_k‖² + ‖B_s·ΔA‖² + 2⟨ΔBᵀB_s, A_kΔAᵀ⟩.
    """
    delta_a, delta_b = a_k - a, b_k - b
    first = exact_einsum("sldr,slde->slre", delta_b, delta_b) * exact_einsum("lri,lei->lre", a_k, a_k)
    second = exact_einsum("sldr,slde->slre", b, b) * exact_einsum("slri,slei->slre", delta_a, delta_a)
    cross = exact_einsum("sldr,slde->slre", delta_b, b) * exact_einsum("lri,slei->slre", a_k, delta_a)
    return jnp.maximum(jnp.sum(first + second + 2 * cross, axis=(1, 2, 3)), 0.0)


def _over_strips(function: Callable[[jax.Array], jax.Array], leaf: jax.Array, width: int) -> jax.Array:
    """Returns Σ function(strip) over the strips [S, width] of a leaf [S, …], each converted to float32."""
    x = leaf.reshape(leaf.shape[0], -1)

    def of_strip(start: jax.Array | int, width: int) -> jax.Array:
        return function(jax.lax.dynamic_slice_in_dim(x, start, width, axis=1).astype(jnp.float32))

    strips, rest = divmod(x.shape[1], width)
    if not strips:
        return of_strip(0, rest)
    total = jax.lax.fori_loop(1, strips, lambda i, total: total + of_strip(i * width, width), of_strip(0, width))
    return total + of_strip(strips * width, rest) if rest else total


@KeptJit
def factor_gram(leaf: Float[Array, "S ..."]) -> Float32[Array, "S S"]:
    """Returns ⟨x_k − x̄, x_j − x̄⟩ for every pair of rows, x̄ the mean over the cohort."""
    def of_strip(x: jax.Array) -> jax.Array:
        # The mean as a product: jnp.mean takes five times as long on CPU.
        x = x - exact_einsum("s,sp->p", jnp.full(len(x), 1 / len(x)), x)
        return exact_einsum("sp,tp->st", x, x)

    return _over_strips(of_strip, leaf, columns_at_once(len(leaf)))


@KeptJit
def product_gram(a: Float[Array, "S layers R d_in"], b: Float[Array, "S layers d_out R"]) -> Float32[Array, "S S"]:
    """Returns ⟨B_kA_k, B_jA_j⟩ for every pair of clients, summed over the layers of one LoRA target."""
    cohort, _, rank, _ = a.shape
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)

    def of_layer(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows = [x.reshape(cohort * rank, -1) for x in pair]
        inner = exact_einsum("sp,tp->st", rows[0], rows[0]) * exact_einsum("sp,tp->st", rows[1], rows[1])
        return jnp.sum(inner.reshape(cohort, rank, cohort, rank), axis=(1, 3))

    by_layer = a.swapaxes(0, 1), b.transpose(1, 0, 3, 2)  # [layers, S, R, …]
    return jnp.sum(jax.lax.map(of_layer, by_layer), axis=0)


@KeptJit
def factor_pairs(leaf: Float[Array, "S ..."], rows: Int[Array, " pairs"], columns: Int[Array, " pairs"],
                 count: Int[Array, ""]) -> Float32[Array, " pairs"]:
    """Returns ‖x_k − x_j‖² of the first `count` pairs (k, j) in `rows` and `columns`; later entries are undefined."""
    at_once = min(PAIRS, len(rows))
    # Whole groups of pairs: the padding of the last group is computed and dropped.
    k, j = (jnp.pad(n, (0, -len(rows) % at_once)) for n in (rows, columns))

    def of_strip(x: jax.Array) -> jax.Array:
        def group(i: jax.Array, out: jax.Array) -> jax.Array:
            left, right = (x.at[jax.lax.dynamic_slice_in_dim(n, i * at_once, at_once)].get(mode="promise_in_bounds")
                           for n in (k, j))
            # As a product: a sum over the last axis takes four times as long on CPU.
            squares = exact_einsum("np,p->n", jnp.square(left - right), jnp.ones(x.shape[1]))
            return jax.lax.dynamic_update_slice_in_dim(out, squares, i * at_once, axis=0)

        return jax.lax.fori_loop(0, -(-count // at_once), group, jnp.zeros(len(k)))

    return _over_strips(of_strip, leaf, columns_at_once(len(leaf), pairs=True))[:len(rows)]


@KeptJit
def product_pairs(a: Float[Array, "S layers R d_in"], b: Float[Array, "S layers d_out R"], rows: Int[Array, " pairs"],
                  columns: Int[Array, " pairs"], count: Int[Array, ""]) -> Float32[Array, " pairs"]:
    """Returns ‖B_kA_k − B_jA_j‖² summed over layers, of the first `count` pairs (k, j); later entries are zero."""
    def pair(i: jax.Array, out: jax.Array) -> jax.Array:
        k, j = rows[i], columns[i]
        a_k, b_k, a_j, b_j = (x[n].astype(jnp.float32) for n in (k, j) for x in (a, b))
        return out.at[i].set(_product_squares(a_j[None], b_j[None], a_k, b_k)[0])

    return jax.lax.fori_loop(0, count, pair, jnp.zeros(len(rows)))


def sum_over_leaves(function: Callable[..., jax.Array], parts: Sequence[tuple[Any, ...]], *others: Any) -> np.ndarray:
    """Returns Σ function(*part, *others) over parts of one or several leaves, in float64, on the host.

    Leaves may be arrays on a device or anything that NumPy can read. On one device two parts are computed at the same
    time; on a mesh one after another, since two programs that communicate could wait for each other.
    """
    def one(part: tuple[Any, ...]) -> np.ndarray:
        loaded = tuple(x if isinstance(x, jax.Array) else np.asarray(x) for x in part)
        return np.asarray(on_parts(function, loaded, len(others))(*loaded, *others), np.float64)

    with ThreadPoolExecutor(2 if mesh_of(parts) is None else 1) as pool:
        total, *rest = pool.map(one, parts)
        for value in rest:
            total = total + value
    return total
