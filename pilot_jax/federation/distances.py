"""Distances between the clients of a cohort over their LoRA trees: [S, S], from exact differences.

|a|² + |b|² − 2ab cancels where clients share most of their value, so it only says which pairs can be near each other;
what enters a weight is always the norm of a difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Of |a|² + |b|²: forty times the float32 error of the Gram matrices seen (2e-7 with a million numbers a client).
MARGIN = 1e-5


def _sum_squares(x: jax.Array) -> jax.Array:
    """Σx² over all axes but the first, one axis at a time: float32 sums of short rows lose nothing that matters."""
    x = x * x
    while x.ndim > 1:
        x = jnp.sum(x, axis=-1)
    return x


def exact_einsum(spec: str, *operands: jax.Array) -> jax.Array:
    """Full float32 products: by default accelerators round the factors."""
    return jnp.einsum(spec, *operands, precision=jax.lax.Precision.HIGHEST)


def targets(uploads: Mapping) -> list[tuple[jax.Array, jax.Array]]:
    """(A [S, layers, R, d_in], B [S, layers, d_out, R]) of each LoRA target."""
    return [(jnp.asarray(pair["a"], jnp.float32), jnp.asarray(pair["b"], jnp.float32))
            for pair in uploads["layers"].values()]


@jax.jit
def factor_distances(uploads: Any) -> jax.Array:
    """d_kj = ‖Θ_k − Θ_j‖₂ over all leaves, [S, S] float32, every pair from its difference."""
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(uploads)]

    def row(k: jax.Array) -> jax.Array:
        return jnp.sqrt(sum(_sum_squares(leaf - leaf[k]) for leaf in leaves))

    return jax.lax.map(row, jnp.arange(leaves[0].shape[0]))


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


@jax.jit
def product_distances(uploads: Mapping) -> jax.Array:
    """d_kj = √Σ ‖B_k A_k − B_j A_j‖_F² over targets and layers (without α/r), [S, S], every pair."""
    pairs = targets(uploads)

    def row(k: jax.Array) -> jax.Array:
        return jnp.sqrt(sum(_product_squares(a, b, a[k], b[k]) for a, b in pairs)).at[k].set(0.0)

    return jax.lax.map(row, jnp.arange(pairs[0][0].shape[0]))


@jax.jit
def _factor_gram(leaf: jax.Array) -> jax.Array:
    """⟨x_k − x̄, x_j − x̄⟩ of a leaf [S, …] → [S, S]."""
    x = leaf.astype(jnp.float32).reshape(leaf.shape[0], -1)
    # The mean as a product: jnp.mean takes five times as long on CPU.
    x = x - exact_einsum("s,sp->p", jnp.full(len(x), 1 / len(x)), x)
    return exact_einsum("sp,tp->st", x, x)


@jax.jit
def _product_gram(a: jax.Array, b: jax.Array) -> jax.Array:
    """⟨B_kA_k, B_jA_j⟩ summed over the layers of a target; [S, layers, …] → [S, S]."""
    cohort, _, rank, _ = a.shape

    def layer(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows = [x.reshape(cohort * rank, -1) for x in pair]
        inner = exact_einsum("sp,tp->st", rows[0], rows[0]) * exact_einsum("sp,tp->st", rows[1], rows[1])
        return jnp.sum(inner.reshape(cohort, rank, cohort, rank), axis=(1, 3))

    by_layer = a.swapaxes(0, 1), b.transpose(1, 0, 3, 2)  # [layers, S, R, …]
    return jnp.sum(jax.lax.map(layer, by_layer), axis=0)


@jax.jit
def _factor_pairs(leaf: jax.Array, rows: jax.Array, columns: jax.Array, count: jax.Array) -> jax.Array:
    """‖x_k − x_j‖² of the first `count` pairs; rows, columns int [N] → [N], 0 beyond."""
    x = leaf.reshape(leaf.shape[0], -1)

    def pair(i, out):
        k, j = (jax.lax.dynamic_index_in_dim(x, n[i], keepdims=False).astype(jnp.float32) for n in (rows, columns))
        return out.at[i].set(exact_einsum("p,p->", k - j, k - j))

    return jax.lax.fori_loop(0, count, pair, jnp.zeros(len(rows)))


@jax.jit
def _product_pairs(a: jax.Array, b: jax.Array, rows: jax.Array, columns: jax.Array, count: jax.Array) -> jax.Array:
    def pair(i, out):
        k, j = rows[i], columns[i]
        return out.at[i].set(_product_squares(a[j][None], b[j][None], a[k], b[k])[0])

    return jax.lax.fori_loop(0, count, pair, jnp.zeros(len(rows)))


def near_pairs(gram: np.ndarray, neighbors: int) -> np.ndarray:
    """Pairs k < j, int [n, 2], of which one may be among the other's `neighbors` nearest, whatever the error of
    `gram` [S, S] within MARGIN."""
    norms = np.diag(gram)
    size = norms[:, None] + norms[None]
    squares = np.where(np.eye(len(gram), dtype=bool), np.inf, size - 2 * gram)
    at_most = np.sort(squares + MARGIN * size, axis=1)[:, neighbors - 1:neighbors]
    near = squares - MARGIN * size <= at_most
    return np.argwhere(np.triu(near | near.T, 1))


def nearest_distances(uploads: Mapping, neighbors: int, space: str = "factors") -> jax.Array:
    """[S, S] distances as `factor_distances` (or `product_distances`) has them for every pair of which one may be among
    the other's `neighbors` nearest. The rest, which no weight depends on, come from a Gram matrix.

    Leaves are visited one after another and may be NumPy arrays: two of them are on the device at once.
    """
    if space == "factors":
        parts = [(leaf,) for leaf in jax.tree.leaves(uploads)]
        gram_of, pairs_of = _factor_gram, _factor_pairs
    else:
        parts, gram_of, pairs_of = targets(uploads), _product_gram, _product_pairs
    with ThreadPoolExecutor(2) as pool:  # a device that is a CPU has two leaves worked on side by side
        gram = sum(pool.map(lambda part: np.asarray(gram_of(*part), np.float64), parts))
    gram, cohort = (gram + gram.T) / 2, len(gram)
    pairs = near_pairs(gram, min(neighbors, cohort - 1))
    # Padded to all pairs, so that how many are near compiles nothing anew.
    padded = np.zeros((cohort * (cohort - 1) // 2, 2), np.int32)
    padded[:len(pairs)] = pairs
    with ThreadPoolExecutor(2) as pool:
        exact = sum(pool.map(lambda part: np.asarray(
            pairs_of(*part, padded[:, 0], padded[:, 1], len(pairs)), np.float64), parts))
    norms = np.diag(gram)
    squares = np.maximum(norms[:, None] + norms[None] - 2 * gram, 0)
    squares[pairs[:, 0], pairs[:, 1]] = squares[pairs[:, 1], pairs[:, 0]] = exact[:len(pairs)]
    np.fill_diagonal(squares, 0)
    return jnp.asarray(np.sqrt(squares), jnp.float32)


DISTANCES = {"factors": factor_distances, "product": product_distances}
EVERY_PAIR = 16  # cohorts up to this size: every pair from its difference


def distances(uploads: Mapping, neighbors: int, space: str = "factors") -> jax.Array:
    """[S, S]: every pair exactly where the cohort is small, else `nearest_distances`."""
    cohort = jax.tree.leaves(uploads)[0].shape[0]
    if cohort <= EVERY_PAIR:
        return DISTANCES[space](uploads)
    return nearest_distances(uploads, neighbors, space)
