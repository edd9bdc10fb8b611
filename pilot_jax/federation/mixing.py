"""Aggregation as mixing matrices: functions of (uploads, sizes, tasks) to a row-stochastic matrix, and its application.

FedAvg is 1·nᵀ/Σn, local training is I, the per-task mean is [T, S], and ATA (paper §3.4) a k-nearest-neighbour
softmax. Uploads are pytrees whose leaves carry the cohort axis S first. In cohorts above DENSE, ATA's matrix is sparse
(`sparse.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Required, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, Real

from pilot_jax.federation.distances import distances, targets
from pilot_jax.federation.shortlist import Nearest
from pilot_jax.federation.sparse import SparseRows, apply_rows, largest_terms
from pilot_jax.kernels.pairwise import exact_einsum
from pilot_jax.programs import KeptJit

AnyArray = Array | np.ndarray
DENSE = 2048  # largest cohort whose distances and ATA weights are stored as matrices [S, S]


def identity(cohort: int) -> Float[Array, "S S"]:
    """Returns the matrix of local training: every client receives its own upload."""
    return jnp.eye(cohort)


@KeptJit
def mean(sizes: Real[AnyArray, " S"]) -> Float[Array, "S S"]:
    """Returns the matrix of FedAvg (McMahan et al., 2017): every row is n/Σn."""
    weights = jnp.asarray(sizes, jnp.float32)
    return jnp.broadcast_to(weights / jnp.sum(weights), (len(weights), len(weights)))


@partial(KeptJit, static=("num_tasks",))
def per_task_mean(sizes: Real[AnyArray, " S"], tasks: Int[AnyArray, " S"], num_tasks: int) -> Float[Array, "T S"]:
    """Returns, for each task, the mean over its clients weighted by n_k; zeros for a task without a client."""
    members = jax.nn.one_hot(tasks, num_tasks).T * jnp.asarray(sizes, jnp.float32)
    total = jnp.sum(members, axis=1, keepdims=True)
    return members / jnp.where(total > 0, total, 1.0)


def apply(matrix: Float[AnyArray, "M S"] | SparseRows, uploads: PyTree[Float[AnyArray, "S ..."]],
          ) -> PyTree[Float[Array, "M ..."]]:
    """Returns matrix [M, S] times leaves [S, …], which gives leaves [M, …]; computed in float32, leaf by leaf."""
    return jax.tree.map(partial(apply_rows if isinstance(matrix, SparseRows) else _applied, matrix), uploads)


@KeptJit
def _applied(matrix: Float[AnyArray, "M S"], leaf: Float[AnyArray, "S ..."]) -> Float[Array, "M ..."]:
    return exact_einsum("ms,s...->m...", matrix, leaf.astype(jnp.float32)).astype(leaf.dtype)


def apply_to_updates(matrix: Float[AnyArray, "S S"] | SparseRows, uploads: PyTree[Float[AnyArray, "S ..."]],
                     starts: PyTree[Float[AnyArray, "S ..."]], new: Bool[np.ndarray, " S"] | None = None,
                     ) -> PyTree[Float[Array, "S ..."]]:
    """Returns starts + matrix·(uploads − starts): what a client has changed is mixed, and not where it began.

    Where some clients, but not all, are `new`, theirs are matrix·uploads: they have missed the earlier changes.
    """
    if isinstance(matrix, SparseRows):
        mixed = jax.tree.map(jnp.add, starts, apply(matrix, jax.tree.map(jnp.subtract, uploads, starts)))
    else:
        mixed = jax.tree.map(partial(_applied_to_changes, matrix), uploads, starts)
    if new is None or not np.any(new) or np.all(new):
        return mixed
    return jax.tree.map(lambda model, changed: jnp.where(new.reshape(-1, *[1] * (changed.ndim - 1)), model, changed),
                        apply(matrix, uploads), mixed)


@KeptJit
def _applied_to_changes(matrix: Float[AnyArray, "S S"], upload: Float[AnyArray, "S ..."],
                        start: Float[AnyArray, "S ..."]) -> Float[Array, "S ..."]:
    return jnp.add(start, _applied(matrix, jnp.subtract(upload, start)))


@KeptJit
def effective_neighbors(matrix: Float[AnyArray, "M S"]) -> Float[Array, " M"]:
    """Returns exp(entropy) of each row: the effective number of clients in a mixture, the client itself included."""
    safe = jnp.where(matrix > 0, matrix, 1.0)
    return jnp.exp(-jnp.sum(matrix * jnp.log(safe), axis=1))


class AtaOptions(TypedDict, total=False):
    """Options for how ATA chooses and weighs neighbours; `ata_weights` explains them."""

    neighbors: Required[int]
    weighting: str
    temperature: str | float
    auto_factor: float
    include_self: bool
    size_weighted: bool


@partial(KeptJit, static=tuple(AtaOptions.__annotations__))
def ata_weights(distances: Float[AnyArray, "S S"], sizes: Real[AnyArray, " S"],
                client_ids: Int[AnyArray, " S"] | None = None, **options: Unpack[AtaOptions]) -> Float[Array, "S S"]:
    """Returns the weights w_kj of Adaptive Text-adapter Aggregation, over the M nearest others and k; rows sum to 1.

    Args:
        sizes: n_k. client_ids: the lower id wins a tie of distances; by default a client's position.
        options: neighbors: M ≥ 1; more than S − 1 means all others.
            weighting: softmax (default): ∝ exp(−d/τ). inverse_distance: ∝ 1/d, self weighing as much as its nearest
            neighbour. share: self ∝ n_k, neighbours ∝ 1/d. Where a neighbour is at d = 0, 1/d takes its limit: all
            weight on the clients at d = 0, equally. share_of_sizes: self n_k / (n_k + Σ n_j over its neighbours), and
            the neighbours divide the rest ∝ 1/d, with the same limit among them.
            temperature: τ, or "auto" (default): `auto_factor` (1) times the client's mean distance to its M neighbours
            (equal weights where that is 0).
            include_self (True): whether k belongs to its own neighbourhood. A lone client always does.
            size_weighted (False): multiply by n_j before normalising.
    """
    if options["neighbors"] < 1:
        raise ValueError("strategy.ata.neighbors must be at least 1")
    cohort = distances.shape[0]
    if cohort == 1:
        return jnp.ones((1, 1))
    ids = jnp.arange(cohort) if client_ids is None else client_ids
    sizes = jnp.asarray(sizes, jnp.float32)
    is_self = jnp.eye(cohort, dtype=bool)
    near = _nearest(jnp.where(is_self, jnp.inf, distances), ids, min(options["neighbors"], cohort - 1))
    return _weighed(jnp.where(is_self, 0.0, distances), near, is_self, (sizes, sizes[None]), options)


@partial(KeptJit, static=tuple(AtaOptions.__annotations__))
def ata_weights_of_nearest(near: Nearest, sizes: Real[AnyArray, " S"], **options: Unpack[AtaOptions]) -> SparseRows:
    """Returns `ata_weights` from the M nearest others alone, as a matrix of M + 1 terms; the first is the client."""
    sizes = jnp.asarray(sizes, jnp.float32)
    columns = jnp.concatenate([jnp.arange(len(sizes), dtype=jnp.int32)[:, None], near.columns], axis=1)
    is_self = jnp.zeros(columns.shape, bool).at[:, 0].set(True)
    d = jnp.pad(jnp.asarray(near.distances), ((0, 0), (1, 0)))
    return SparseRows(_weighed(d, ~is_self, is_self, (sizes, sizes[columns]), options), columns)


def _weighed(d: Float[Array, "S terms"], near: Bool[Array, "S terms"], is_self: Bool[Array, "S terms"],
             sizes: tuple[jax.Array, jax.Array], options: AtaOptions) -> Float[Array, "S terms"]:
    """Returns the weights of `ata_weights`.

    Args:
        d: distances, 0 for the client itself. near: which columns are neighbours. is_self: which are the client.
        sizes: those of the rows [S], and of the columns [1 or S, terms].
    """
    member = near | is_self if options.get("include_self", True) else near
    weighting = options.get("weighting", "softmax")
    if weighting == "softmax":
        count = min(options["neighbors"], d.shape[1] - 1)
        tau = options.get("auto_factor", 1.0) * jnp.sum(jnp.where(near, d, 0.0), axis=1, keepdims=True) / count
        if (given := options.get("temperature", "auto")) != "auto":
            tau = jnp.full((len(d), 1), float(given), jnp.float32)
        raw = _by_softmax(d, member, tau)
    elif weighting == "share_of_sizes":
        raw = _by_share_of_sizes(d, near, is_self, sizes)
    elif weighting in ("inverse_distance", "share"):
        raw = _by_inverse_distance(d, near, is_self, sizes[0] if weighting == "share" else None)
    else:
        raise ValueError(f"ATA weighting {weighting!r} is not known")
    raw = jnp.where(member, raw, 0.0)
    if options.get("size_weighted", False):
        raw = raw * sizes[1]
    return raw / jnp.sum(raw, axis=1, keepdims=True)


def _nearest(others: Float[Array, "S S"], ids: Int[AnyArray, " S"], m: int) -> Bool[Array, "S S"]:
    """Returns which m entries of each row are the smallest, ties broken by `ids`; never the diagonal, which is ∞."""
    cohort = len(ids)

    def rank(row: jax.Array) -> jax.Array:
        order = jnp.lexsort((ids, row))
        return jnp.zeros(cohort, jnp.int32).at[order].set(jnp.arange(cohort, dtype=jnp.int32))

    return jax.vmap(rank)(others) < m


def _by_softmax(d: Float[Array, "S terms"], member: Bool[Array, "S terms"], tau: Float[Array, "S 1"],
                ) -> Float[Array, "S terms"]:
    score = jnp.where(tau > 0, -d / jnp.where(tau > 0, tau, 1.0), 0.0)
    score = jnp.where(member, score, -jnp.inf)
    return jnp.exp(score - jnp.max(score, axis=1, keepdims=True))  # the shift cancels when rows are normalised


def _by_inverse_distance(d: Float[Array, "S terms"], near: Bool[Array, "S terms"], is_self: Bool[Array, "S terms"],
                         sizes: Float[Array, " S"] | None) -> Float[Array, "S terms"]:
    """Returns 1/d for neighbours; for the client itself its size or, without sizes, its nearest neighbour's weight."""
    touching = jnp.any(near & (d == 0), axis=1, keepdims=True)
    inverse = jnp.where(near & (d > 0), 1.0 / jnp.where(d > 0, d, 1.0), 0.0)
    own = jnp.max(inverse, axis=1, keepdims=True) if sizes is None else sizes[:, None]
    return jnp.where(touching, jnp.where(d == 0, 1.0, 0.0), jnp.where(is_self, own, inverse))


def _by_share_of_sizes(d: Float[Array, "S terms"], near: Bool[Array, "S terms"], is_self: Bool[Array, "S terms"],
                       sizes: tuple[jax.Array, jax.Array]) -> Float[Array, "S terms"]:
    """Returns n_k / (n_k + Σ n_j) for the client itself, and the rest for its neighbours, divided by 1/d."""
    rows, columns = sizes
    own = (rows / (rows + jnp.sum(jnp.where(near, columns, 0.0), axis=1)))[:, None]
    inverse = jnp.where(near, _by_inverse_distance(d, near, jnp.zeros_like(near), None), 0.0)
    return jnp.where(is_self, own, 0.0) + (1 - own) * inverse / jnp.sum(inverse, axis=1, keepdims=True)


def ata(uploads: Mapping[str, Any], sizes: Real[AnyArray, " S"], client_ids: Int[AnyArray, " S"] | None = None, *,
        space: str = "factors", **options: Unpack[AtaOptions]) -> tuple[Float[Array, "S S"], Float[Array, "S S"]]:
    """Returns (weights, distances) for LoRA uploads; options as in `ata_weights`.

    In cohorts above 16 the distances of pairs that no weight depends on are approximate (`distances.py`).
    """
    between = distances(uploads, options["neighbors"], space)
    return ata_weights(between, sizes, client_ids, **options), between


@partial(KeptJit, static=("terms",))
def product_gap(matrix: Float[AnyArray, "M S"] | SparseRows, uploads: Mapping, terms: int | None = None,
                ) -> Float[Array, " M"]:
    """Returns ‖Σ_j w_kj B_jA_j − B̄_kĀ_k‖ / ‖Σ_j w_kj B_jA_j‖ per row: the error of mixing A and B separately.

    Computed from the Gram matrix of a row's terms and its mean, R×R at a time, layer by layer; 0 where every product is
    still 0. `terms`: largest number of weights above 0 in a row (default: all S).
    """
    pairs = targets(uploads)

    def row(of_row: SparseRows) -> jax.Array:
        w, chosen = of_row
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

    return jax.lax.map(row, largest_terms(matrix, terms))


def check_rows(matrix: Float[AnyArray, "M S"]) -> None:
    """Checks that every row of a mixing matrix sums to 1 (or to 0, where a task has no participant)."""
    sums = np.asarray(matrix).sum(axis=1)
    if not np.all((np.abs(sums - 1) < 1e-4) | (sums == 0)):
        raise AssertionError(f"rows of a mixing matrix sum to {sums}")
