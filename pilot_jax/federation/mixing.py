"""Aggregation as mixing matrices: functions of (uploads, sizes, tasks) to a row-stochastic matrix, and its application.

FedAvg is 1·nᵀ/Σn, local training is I, the per-task mean is [T, S], and ATA (paper §3.4) a k-nearest-neighbour
softmax. Uploads are pytrees whose leaves carry the cohort axis S first.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pilot_jax.federation.distances import distances, targets
from pilot_jax.kernels.pairwise import exact_einsum
from pilot_jax.storage import RowsWriter


def identity(cohort: int) -> jax.Array:
    """Local training: everyone keeps their own. [S, S]."""
    return jnp.eye(cohort)


def mean(sizes: jax.typing.ArrayLike) -> jax.Array:
    """FedAvg (McMahan et al., 2017): every row is n/Σn. sizes [S] → [S, S]."""
    weights = jnp.asarray(sizes, jnp.float32)
    return jnp.broadcast_to(weights / jnp.sum(weights), (len(weights), len(weights)))


def per_task_mean(sizes: jax.Array, tasks: jax.Array, num_tasks: int) -> jax.Array:
    """Mean of each task's clients weighted by n_k. sizes, tasks int [S] → [T, S]; a task without a client: zeros."""
    members = jax.nn.one_hot(tasks, num_tasks).T * jnp.asarray(sizes, jnp.float32)
    total = jnp.sum(members, axis=1, keepdims=True)
    return members / jnp.where(total > 0, total, 1.0)


def apply(matrix: jax.Array, uploads: Any) -> Any:
    """matrix [M, S] times leaves [S, …] → leaves [M, …], in float32."""
    return jax.tree.map(
        lambda leaf: exact_einsum("ms,s...->m...", matrix, leaf.astype(jnp.float32)).astype(leaf.dtype), uploads)


def apply_on_disk(matrix: jax.Array, uploads: Any, folder: Path) -> Any:
    """`apply` for uploads of `store.Rows`, one leaf in memory at a time; mixed leaves [M, …] are files in `folder`."""
    leaves, structure = jax.tree.flatten(uploads)
    mixed = []
    for number, leaf in enumerate(leaves):
        writer = RowsWriter(folder / f"mixed-{number}", (len(matrix), *leaf.shape[1:]), leaf.dtype)
        writer[range(len(matrix))] = np.asarray(_apply(matrix, np.asarray(leaf)))
        mixed.append(writer.rows)
    return jax.tree.unflatten(structure, mixed)


_apply = jax.jit(apply)


def effective_neighbors(matrix: jax.Array | np.ndarray) -> jax.Array:
    """exp(entropy) of each row: how many clients a client really borrows from, itself included. [S, S] → [S]."""
    safe = jnp.where(matrix > 0, matrix, 1.0)
    return jnp.exp(-jnp.sum(matrix * jnp.log(safe), axis=1))


@partial(jax.jit, static_argnames=("neighbors", "weighting", "temperature", "auto_factor", "include_self",
                                   "size_weighted"))
def ata_weights(distances: jax.Array, sizes: jax.Array, client_ids: jax.Array | None = None, *, neighbors: int,
                weighting: str = "softmax", temperature: str | float = "auto", auto_factor: float = 1.0,
                include_self: bool = True, size_weighted: bool = False) -> jax.Array:
    """Adaptive Text-adapter Aggregation: w_kj over the M nearest others and k itself, rows sum to 1. [S, S].

    Args:
        distances: [S, S] float32. sizes: n_k [S]. client_ids: int [S], break ties; default the position.
        neighbors: M ≥ 1; more than S − 1 means all others.
        weighting: softmax: ∝ exp(−d/τ). inverse_distance: ∝ 1/d, self weighing as much as its nearest neighbour.
            share: self ∝ n_k, neighbours ∝ 1/d.
            Where a neighbour is at d = 0, 1/d takes its limit: all weight on the clients at d = 0, equally.
        temperature: τ, or "auto": the client's mean distance to its M neighbours (equal weights where that is 0).
        auto_factor: times that mean.
        include_self: whether k belongs to its own neighbourhood. A lone client always does.
        size_weighted: multiply by n_j before normalising.
    """
    if neighbors < 1:
        raise ValueError("strategy.ata.neighbors must be at least 1")
    cohort = distances.shape[0]
    if cohort == 1:
        return jnp.ones((1, 1))
    m = min(neighbors, cohort - 1)
    ids = jnp.arange(cohort) if client_ids is None else client_ids
    sizes = jnp.asarray(sizes, jnp.float32)
    is_self = jnp.eye(cohort, dtype=bool)
    others = jnp.where(is_self, jnp.inf, distances)

    def rank(row: jax.Array) -> jax.Array:
        order = jnp.lexsort((ids, row))
        return jnp.zeros(cohort, jnp.int32).at[order].set(jnp.arange(cohort, dtype=jnp.int32))

    near = jax.vmap(rank)(others) < m  # [S, S], M true in each row, never the diagonal
    member = near | is_self if include_self else near
    d = jnp.where(is_self, 0.0, distances)
    if weighting == "softmax":
        if temperature == "auto":
            tau = auto_factor * jnp.sum(jnp.where(near, d, 0.0), axis=1, keepdims=True) / m
        else:
            tau = jnp.full((cohort, 1), float(temperature), jnp.float32)
        score = jnp.where(tau > 0, -d / jnp.where(tau > 0, tau, 1.0), 0.0)
        score = jnp.where(member, score, -jnp.inf)
        raw = jnp.exp(score - jnp.max(score, axis=1, keepdims=True))  # the shift cancels when rows are normalised
    elif weighting in ("inverse_distance", "share"):
        touching = jnp.any(near & (d == 0), axis=1, keepdims=True)
        inverse = jnp.where(near & (d > 0), 1.0 / jnp.where(d > 0, d, 1.0), 0.0)
        own = jnp.max(inverse, axis=1, keepdims=True) if weighting == "inverse_distance" else sizes[:, None]
        raw = jnp.where(touching, jnp.where(d == 0, 1.0, 0.0), jnp.where(is_self, own, inverse))
    else:
        raise ValueError(f"ATA weighting {weighting!r} is not known")
    raw = jnp.where(member, raw, 0.0)
    if size_weighted:
        raw = raw * sizes[None, :]
    return raw / jnp.sum(raw, axis=1, keepdims=True)


def ata(uploads: Mapping, sizes: jax.Array, client_ids: jax.Array | None = None, *, neighbors: int,
        space: str = "factors", **options: Any) -> tuple[jax.Array, jax.Array]:
    """(weights, distances), both [S, S], for LoRA uploads; options as in `ata_weights`.

    In cohorts above 16 the distances of pairs that no weight depends on are approximate (`distances.py`).
    """
    between = distances(uploads, neighbors, space)
    return ata_weights(between, sizes, client_ids, neighbors=neighbors, **options), between


@partial(jax.jit, static_argnames=("terms",))
def product_gap(matrix: jax.Array, uploads: Mapping, terms: int | None = None) -> jax.Array:
    """‖Σ_j w_kj B_jA_j − B̄_kĀ_k‖ / ‖Σ_j w_kj B_jA_j‖ per row: what mixing A and B as factors leaves out. [M, S] → [M].

    By the Gram of a row's terms and its mean, R×R at a time, one layer after another; 0 where nothing has been learnt
    yet. `terms`: how many weights of a row are above 0 at most (default: all S may be).
    """
    pairs = targets(uploads)
    terms = min(terms or matrix.shape[1], matrix.shape[1])

    def row(weights: jax.Array) -> jax.Array:
        w, chosen = jax.lax.top_k(weights, terms)
        signed = jnp.append(w, -1.0)

        def layer(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
            a, b = pair  # [terms, R, d_in], [terms, d_out, R]
            a, b = (jnp.concatenate([x, exact_einsum("s,s...->...", w, x)[None]]) for x in (a, b))
            inner = jnp.sum(exact_einsum("sdr,tde->srte", b, b) * exact_einsum("sri,tei->srte", a, a), axis=(1, 3))
            return jnp.stack([signed @ inner @ signed, w @ inner[:-1, :-1] @ w])

        gap, whole = sum(  # type: ignore[misc]
            jnp.sum(jax.lax.map(layer, tuple(jnp.swapaxes(x[chosen], 0, 1) for x in pair)), axis=0)
                         for pair in pairs)
        return jnp.where(whole > 0, jnp.sqrt(jnp.maximum(gap, 0.0) / jnp.where(whole > 0, whole, 1.0)), 0.0)

    return jax.lax.map(row, matrix)


def check_rows(matrix: np.ndarray) -> None:
    """Every row of a mixing matrix sums to 1 (or to 0, where a task has no participant)."""
    sums = np.asarray(matrix).sum(axis=1)
    if not np.all((np.abs(sums - 1) < 1e-4) | (sums == 0)):
        raise AssertionError(f"rows of a mixing matrix sum to {sums}")
