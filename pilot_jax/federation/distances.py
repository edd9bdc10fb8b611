"""Distances and cosines [S, S] between the trees of a cohort's clients; distances are computed from exact differences.

The expansion |a|² + |b|² − 2ab loses precision where clients share most of their value, so it only decides which pairs
may be near each other. A distance that enters a weight is always the norm of a difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, PyTree

from pilot_jax.federation.shortlist import can_shortlist, candidate_pairs, estimates, sketches
from pilot_jax.kernels.pairwise import (
    exact_einsum,
    factor_gram,
    factor_pairs,
    product_gram,
    product_pairs,
    sum_over_leaves,
)
from pilot_jax.parallel.mesh import columns, mesh_of

# Relative to |a|² + |b|²: forty times the float32 error measured in Gram matrices (2e-7 at a million numbers a client).
MARGIN = 1e-5
EVERY_PAIR = 16  # largest cohort of which every pair is subtracted
BY_GRAM = 256  # largest cohort whose near pairs come from a Gram matrix and not from sketches (docs/scaling.md)


def targets(uploads: Mapping) -> list[tuple[Float[Array, "S layers R _"], Float[Array, "S layers _ R"]]]:
    """Returns (A [S, layers, R, d_in], B [S, layers, d_out, R]) of each LoRA target, float32."""
    return [(jnp.asarray(pair["a"], jnp.float32), jnp.asarray(pair["b"], jnp.float32))
            for pair in uploads["layers"].values()]


def near_pairs(gram: Float[np.ndarray, "S S"], neighbors: int) -> Int[np.ndarray, "pairs 2"]:
    """Returns the pairs k < j of which one client may be among the other's `neighbors` nearest, with errors of `gram`
    up to MARGIN."""
    norms = np.diag(gram)
    size = norms[:, None] + norms[None]
    squares = np.where(np.eye(len(gram), dtype=bool), np.inf, size - 2 * gram)
    at_most = np.sort(squares + MARGIN * size, axis=1)[:, neighbors - 1:neighbors]
    near = squares - MARGIN * size <= at_most
    return np.argwhere(np.triu(near | near.T, 1))


def distances(uploads: Mapping, neighbors: int | None = None, space: str = "factors") -> Float[Array, "S S"]:
    """Returns d_kj: ‖Θ_k − Θ_j‖₂ over all leaves (space "factors"), or √Σ ‖B_kA_k − B_jA_j‖_F² over targets and layers,
    without α/r ("product"); float32.

    In cohorts above EVERY_PAIR with `neighbors` given, only pairs of which one may be among the other's `neighbors`
    nearest are subtracted. The other distances, on which no weight depends, come from a Gram matrix or, for factors in
    cohorts above BY_GRAM, from sketches, off by about one per cent (`shortlist.py`).

    Leaves [S, …] may be NumPy arrays or `storage.Rows`; at most two of them are in memory and on the device at once.
    Leaves whose parameters are spread over a mesh stay there: only matrices [S, S] go from device to device.
    """
    mesh = mesh_of(uploads)
    if space == "factors":
        parts: list[tuple[Any, ...]] = [(leaf,) for leaf in jax.tree.leaves(uploads)]
        gram_of, pairs_of = factor_gram, factor_pairs
    else:
        parts = [(pair["a"], pair["b"]) for pair in uploads["layers"].values()]
        gram_of, pairs_of = product_gram, product_pairs
        if mesh is not None:  # a product needs all of a layer's A and B on one device
            parts = [tuple(jax.device_put(x, NamedSharding(mesh, columns(x.shape, mesh, axis=1))) for x in pair)
                     for pair in parts]
    cohort = len(parts[0][0])

    squares, everyone = np.zeros((cohort, cohort)), np.argwhere(np.triu(np.ones((cohort, cohort)), 1))
    pairs = everyone
    if neighbors is not None and cohort > BY_GRAM and space == "factors" and can_shortlist(uploads, neighbors):
        sketched = sketches(uploads)
        squares = np.concatenate([block for _, block in estimates(sketched)])
        pairs = candidate_pairs(sketched, neighbors)
    elif neighbors is not None and cohort > EVERY_PAIR:
        gram = sum_over_leaves(gram_of, parts)
        norms, gram = np.diag(gram), (gram + gram.T) / 2
        squares = np.maximum(norms[:, None] + norms[None] - 2 * gram, 0)
        pairs = near_pairs(gram, min(neighbors, cohort - 1))
    # Padded to the number of all pairs, so that another number of near pairs needs no new program.
    padded = np.zeros((max(len(everyone), 1), 2), np.int32)
    padded[:len(pairs)] = pairs
    exact = sum_over_leaves(pairs_of, parts, padded[:, 0], padded[:, 1], len(pairs))
    squares[pairs[:, 0], pairs[:, 1]] = squares[pairs[:, 1], pairs[:, 0]] = exact[:len(pairs)]
    np.fill_diagonal(squares, 0)
    return jnp.asarray(np.sqrt(squares), jnp.float32)


def cosines(vectors: PyTree[Float[Array | np.ndarray, "S ..."]]) -> Float[Array, "S S"]:
    """Returns the cosine between the vectors of every two clients, each over all leaves; 0 for a vector of zeros."""
    flat = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(vectors)]
    gram = jnp.asarray(sum(exact_einsum("si,ti->st", leaf, leaf) for leaf in flat))
    norm = jnp.sqrt(jnp.diag(gram))
    return gram / jnp.maximum(norm[:, None] * norm, 1e-30)
