"""Every choice that depends on the backend (CPU, GPU, TPU), one function per choice. Measurements: docs/performance.md.

All choices compute the same formula; they differ in speed, in memory and in the order of rounding.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from pilot_jax.parallel.devices import platform


def default_dtype() -> Literal["float32", "bfloat16"]:
    """Returns the meaning of `model.dtype: auto`: float32 on CPU, which has no fast bfloat16, bfloat16 elsewhere."""
    return "float32" if platform() == "cpu" else "bfloat16"


def sums_as_products() -> bool:
    """Whether a sum over the last axis is computed as a matrix product with ones.

    On CPU, XLA sums a product of two arrays row by row about ten times slower than its matrix library does.
    """
    return platform() == "cpu"


def swaps_as_product() -> bool:
    """Whether the halves of an axis are swapped by a product with a signed permutation matrix.

    On CPU that is much cheaper than a concatenation. Elsewhere the concatenation is part of the arithmetic around it.
    """
    return platform() == "cpu"


def merges_low_rank(dtype: DTypeLike) -> bool:
    """Whether LoRA's B·A is added to the weight before the product with x, instead of two thin products beside it.

    Only on CPU, where thin products take longer than the sum, and in float32. Elsewhere the sum would be one weight
    matrix per client, and in bfloat16 it would lose most of B·A to rounding.
    """
    return platform() == "cpu" and jnp.dtype(dtype) == jnp.float32


def columns_at_once(cohort: int, pairs: bool = False) -> int:
    """Returns how many columns of an array [S, columns] are read at a time, S = `cohort`.

    On CPU as many as fit into its cache; with `pairs`, together with the differences of `pairwise.PAIRS` pairs of rows.
    """
    if platform() == "cpu":
        return 2**11 if pairs else max(2**10, min(2**15, 2**20 // cohort))
    return max(2**10, min(2**20, 2**26 // cohort))


def has_cudnn() -> bool:
    """Whether cuDNN's attention can run: on NVIDIA GPUs alone."""
    return platform() == "gpu"
