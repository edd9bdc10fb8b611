"""Count sketches (Charikar et al., 2002) of clients' uploads: short vectors with almost the distances of the long ones.

The plain formula, of a leaf x [S, P] whose first entry is number `start` of the whole tree, with fixed random signs:

    sketch[k, bin] = sum(sign[i] * x[k, i] for i in range(P) if (start + i) % SIZE == bin)

A sketch is linear, so that sketch(x) - sketch(y) is that of x - y, and its squared norm estimates ‖x − y‖² without
bias, off by a share of about √(2/SIZE) (tests/unit/kernels/test_count_sketch.py). SIZE is a prime, so that a column of
a matrix, whose entries may be larger than all others, is spread over many bins.

Sums are float64, in NumPy on the host: what float32 rounds away would hide the distances within a cluster of clients
that have most of their value in common. XLA would need two float32 sums for it, and take twice as long on CPU.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float, Float32, Float64

SIZE = 4093  # d
AT_ONCE = 2**16  # entries that a core works on at a time, so that they stay in its cache


def signs_of(number: int, count: int) -> Float32[np.ndarray, " count"]:
    """Returns the random signs, 1 or −1, of the entries of leaf `number`, the same in all rounds."""
    drawn = np.random.default_rng(number).integers(0, 2, count, dtype=np.int8)
    return (2 * drawn - 1).astype(np.float32)


def add_sketch(total: Float64[np.ndarray, "S SIZE"], leaf: Float[np.ndarray, "S ..."], number: int, start: int) -> None:
    """Adds the sketch of every row of a leaf to `total`, on all cores.

    Args:
        number: of the leaf; each has signs of its own. start: number of entries in the leaves before it.
    """
    x = leaf.reshape(len(leaf), -1)
    signs, first = signs_of(number, x.shape[1]), -start % SIZE  # the entry of the first whole turn through the bins
    height = max(AT_ONCE // max(x.shape[1], 1), 1)

    def of_rows(begin: int) -> None:
        rows, out = x[begin:begin + height], total[begin:begin + height]
        _add_part(out, rows[:, :first], signs[:first], start % SIZE)
        step = max(AT_ONCE // SIZE, 1) * SIZE
        for at in range(first, x.shape[1], step):
            part, sign = rows[:, at:at + step], signs[at:at + step]
            whole = part.shape[1] // SIZE * SIZE
            if whole:
                turns = np.multiply(part[:, :whole], sign[:whole], dtype=np.float32).reshape(len(part), -1, SIZE)
                out += turns.sum(axis=1, dtype=np.float64)
            _add_part(out, part[:, whole:], sign[whole:], 0)

    with ThreadPoolExecutor(_cores()) as pool:
        list(pool.map(of_rows, range(0, len(x), height)))


def _add_part(total: np.ndarray, x: np.ndarray, signs: np.ndarray, at: int) -> None:
    """Adds entries x [rows, n], n < SIZE, to the bins from `at` on."""
    total[:, at:at + x.shape[1]] += x * signs


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
