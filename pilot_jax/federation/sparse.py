"""Mixing matrices of large cohorts, of which each row has few weights above 0 and no other entry is stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pilot_jax.kernels.pairwise import exact_einsum
from pilot_jax.programs import KeptJit

AnyArray = Array | np.ndarray
AT_ONCE = 32  # rows of the matrix that are applied together


class SparseRows(NamedTuple):
    """A matrix [M, S]: row k has `weights`[k, i] in column `columns`[k, i], and 0 elsewhere."""

    weights: Float[Any, "M terms"]
    columns: Int[Any, "M terms"]


def largest_terms(matrix: Float[AnyArray, "M S"] | SparseRows, terms: int | None) -> SparseRows:
    """Returns the `terms` largest weights of each row, by default all S; a sparse matrix as it is."""
    if isinstance(matrix, SparseRows):
        return matrix
    return SparseRows(*jax.lax.top_k(jnp.asarray(matrix), min(terms or matrix.shape[1], matrix.shape[1])))


@KeptJit
def apply_rows(matrix: SparseRows, leaf: Float[AnyArray, "S ..."]) -> Float[Array, "M ..."]:
    """Returns the matrix times a leaf; computed in float32, only the rows of `leaf` that a result needs at a time."""
    def row(terms: tuple[jax.Array, jax.Array]) -> jax.Array:
        weights, columns = terms
        return exact_einsum("t,t...->...", weights, leaf[columns].astype(jnp.float32))

    rows = tuple(jnp.asarray(part) for part in matrix)
    return jax.lax.map(row, rows, batch_size=min(AT_ONCE, len(rows[0]))).astype(leaf.dtype)
