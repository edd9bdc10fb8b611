"""The nearest other clients of every client of a large cohort, without comparing all pairs of uploads.

Every upload is sketched (`kernels/count_sketch.py`). The distances of sketches, off by about two per cent of a square,
say which few pairs may be near. These are subtracted as they are, and only such distances enter a weight.

For each client the candidates are those whose estimated square, less its error, is not above the M-th smallest plus its
error: the PER_NEIGHBOR · M smallest (at least LEAST) of them, and of clients that the sketch cannot tell from the M-th,
the M with the lowest ids, so that ties are broken as `mixing.ata_weights` breaks them. Everything is computed in
the order of ids: results do not depend on the order of the cohort.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Float64, Int, Int32

from pilot_jax.kernels.count_sketch import SIZE, add_sketch
from pilot_jax.kernels.pairwise import factor_pairs, sum_over_leaves
from pilot_jax.parallel.mesh import mesh_of

PER_NEIGHBOR, LEAST = 4, 8  # candidates of a client: 4·M, at least 8
ERROR = 4 * (2 / SIZE) ** 0.5  # four standard deviations of an estimated square, relative to it
NOTHING = 1e-12  # estimated squares below this share of |a|² + |b|² are the rounding of equal uploads
BLOCK = 2**24  # estimates in memory at once


class Nearest(NamedTuple):
    """The M nearest other clients of each client, nearest first, and their distances; of a tie, the lower id first."""

    columns: Int32[Any, "S M"]  # positions in the cohort
    distances: Float32[Any, "S M"]


def can_shortlist(uploads: Mapping, neighbors: int) -> bool:
    """Whether the candidates are few of all pairs. On a mesh, where a device has a part of every upload, they are not
    sought."""
    return 4 * candidates_of(neighbors) <= len(jax.tree.leaves(uploads)[0]) and mesh_of(uploads) is None


def candidates_of(neighbors: int) -> int:
    """Returns how many candidates a client has at most by their estimated distance."""
    return max(PER_NEIGHBOR * neighbors, LEAST)


def most_pairs(cohort: int, neighbors: int) -> int:
    """Returns a number that the pairs of candidates do not exceed, the same in all rounds, so that one program does."""
    return cohort * (candidates_of(neighbors) + neighbors)


def sketches(uploads: Mapping) -> Float64[np.ndarray, "S SIZE"]:
    """Returns the sketch of every client's upload.

    Leaves [S, …] may be arrays on a device, NumPy arrays or `storage.Rows`; one at a time is in the host's memory.
    """
    leaves, start = jax.tree.leaves(uploads), 0
    out = np.zeros((len(leaves[0]), SIZE))
    for number, leaf in enumerate(leaves):
        add_sketch(out, np.asarray(leaf), number, start)
        start += int(np.prod(leaf.shape[1:], dtype=np.int64))
    return out


def estimates(sketched: Float64[np.ndarray, "S SIZE"]) -> Iterator[tuple[int, Float64[np.ndarray, "rows S"]]]:
    """Yields (first row, estimated squared distances of some rows to all clients), a block of rows at a time."""
    sketched = sketched - sketched.mean(axis=0)  # the smaller the norms, the less is rounded
    norms = np.einsum("sd,sd->s", sketched, sketched)
    height = max(BLOCK // len(sketched), 1)
    for start in range(0, len(sketched), height):
        rows = slice(start, start + height)
        size = norms[rows, None] + norms[None]
        squares = size - 2 * (sketched[rows] @ sketched.T)
        yield start, np.where(squares > NOTHING * size, squares, 0.0)


def candidate_pairs(sketched: Float64[np.ndarray, "S SIZE"], neighbors: int) -> Int[np.ndarray, "pairs 2"]:
    """Returns the pairs k < j of which one client is a candidate of the other; clients are in the order of ids."""
    cohort, found = len(sketched), []
    most = min(candidates_of(neighbors), cohort - 1)
    for start, squares in estimates(sketched):
        own = np.arange(len(squares))
        squares[own, start + own] = np.inf
        smallest = np.partition(squares, (neighbors - 1, most - 1), axis=1)
        limit = smallest[:, neighbors - 1] * (1 + ERROR) / (1 - ERROR)
        for row, few, all_of_them in zip(squares, np.minimum(smallest[:, most - 1], limit), limit, strict=True):
            near = np.flatnonzero(row <= few)
            near = near[np.argsort(row[near], kind="stable")[:most]]
            tied = np.flatnonzero(row <= all_of_them)[:neighbors]
            found.append(start * cohort + np.union1d(near, tied))
            start += 1
    flat = np.concatenate(found)
    pairs = np.stack([np.minimum(flat // cohort, flat % cohort), np.maximum(flat // cohort, flat % cohort)], axis=1)
    return np.unique(pairs, axis=0)


def exact_squares(uploads: Mapping, pairs: Int[np.ndarray, "pairs 2"], room: int) -> Float64[np.ndarray, " pairs"]:
    """Returns ‖Θ_k − Θ_j‖² of each pair (k, j), from differences.

    Args:
        room: the number of pairs that the program has room for.
    """
    padded = np.zeros((max(room, 1), 2), np.int32)
    padded[:len(pairs)] = pairs
    parts = [(leaf,) for leaf in jax.tree.leaves(uploads)]
    return sum_over_leaves(factor_pairs, parts, padded[:, 0], padded[:, 1], len(pairs))[:len(pairs)]


def nearest(uploads: Mapping, neighbors: int, ids: Int[np.ndarray, " S"] | None = None) -> Nearest:
    """Returns the `neighbors` nearest other clients of each, by ‖Θ_k − Θ_j‖₂ over all leaves; see the module's text.

    Nothing of the size S × S is formed. Memory beside the uploads: twice S · 33 kB of sketches.

    Args:
        ids: the lower id wins a tie; by default a client's position.
    """
    cohort = len(jax.tree.leaves(uploads)[0])
    order = np.argsort(np.arange(cohort) if ids is None else np.asarray(ids), kind="stable")
    pairs = candidate_pairs(sketches(uploads)[order], neighbors)
    squares = exact_squares(uploads, order[pairs], most_pairs(cohort, neighbors))
    between = np.sqrt(squares).astype(np.float32)
    rows, others = np.concatenate([pairs[:, 0], pairs[:, 1]]), np.concatenate([pairs[:, 1], pairs[:, 0]])
    between = np.concatenate([between, between])
    by = np.lexsort((others, between, rows))
    first = np.searchsorted(rows[by], np.arange(cohort))  # where a client's candidates begin
    chosen = by[first[:, None] + np.arange(neighbors)]
    columns, distances = np.empty((cohort, neighbors), np.int32), np.empty((cohort, neighbors), np.float32)
    columns[order], distances[order] = order[others[chosen]], between[chosen]
    return Nearest(columns, distances)
