"""Arrays in the host's memory that a CPU device uses without a copy."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike

ALIGNMENT = 64  # bytes, as XLA requires it of memory that it does not copy


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Returns `np.empty` at an address that a CPU device uses as it is, without a copy.

    Once the array is on such a device, nobody may write to it.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start:start + size].view(dtype).reshape(shape)
