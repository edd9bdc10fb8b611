"""Count sketches (Charikar et al., 2002) of clients' uploads: short vectors with almost the distances of the long ones.

The plain formula, of a leaf x [S, P] whose first entry is number `start` of the whole tree, with fixed random signs:

    sketch[k, bin] = sum(sign[i] * x[k, i] for i in range(P) if (start + i) % SIZE == bin)

A sketch is linear, so that sketch(x) - sketch(y) is that of x - y, and its squared norm estimates ‖x − y‖² without
bias, off by a share of about √(2/SIZE) (tests/unit/kernels/test_count_sketch.py). SIZE is a prime, so that a column of
a matrix, whose entries may be larger than all others, is spread over many bins.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pilot_jax.kernels.backend import rows_at_once
from pilot_jax.programs import KeptJit

SIZE = 4093  # d


@KeptJit
def leaf_sketch(leaf: Float[Array, "S ..."], number: Int[Array, ""], start: Int[Array, ""],
                ) -> Float32[Array, "2 S SIZE"]:
    """Returns the sketches of a leaf's rows as two arrays whose sum, in float64, has about twice float32's digits.

    Rounding to float32 would hide the distances within a cluster of clients that have most of their value in common.

    Args:
        number: of the leaf; each has signs of its own. start: number of entries in the leaves before it, modulo SIZE.
    """
    x = leaf.reshape(leaf.shape[0], -1)
    blocks, rest = divmod(x.shape[1], SIZE)
    signs = jax.random.rademacher(jax.random.fold_in(jax.random.key(0), number), (x.shape[1],), jnp.int8)

    def of_row(row: jax.Array) -> jax.Array:
        def add(at: jax.Array | int, width: int, total: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            part, sign = (jax.lax.dynamic_slice_in_dim(v, at, width).astype(jnp.float32) for v in (row, signs))
            return _added(total, jnp.pad(part * sign, (0, SIZE - width)))

        total = jnp.zeros(SIZE), jnp.zeros(SIZE)
        if blocks:
            total = jax.lax.fori_loop(0, blocks, lambda i, total: add(i * SIZE, SIZE, total), total)
        return jnp.stack(add(blocks * SIZE, rest, total) if rest else total)

    sums = jax.lax.map(of_row, x, batch_size=min(rows_at_once(), len(x)))
    return jnp.roll(jnp.moveaxis(sums, 1, 0), start, axis=2)


def _added(total: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns total + x as a sum and what rounding has taken from it (Knuth's TwoSum)."""
    high, low = total
    after = high + x
    taken = after - high
    return after, low + ((high - (after - taken)) + (x - taken))
