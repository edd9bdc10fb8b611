"""What the process holds of the host's memory: arrays that a CPU device takes as they are, and what is handed back."""

from __future__ import annotations

import contextlib
import ctypes
import math
from typing import Any

import numpy as np

ALIGNMENT = 64  # bytes; XLA's


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """`np.empty`, but where in memory a CPU device takes it as it is instead of copying it: it must not change then."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start:start + size].view(dtype).reshape(shape)


def give_back() -> None:
    """Hand freed memory back to the system, where the C library keeps it: on Linux, XLA's compiler leaves some 0.3 GB
    a program. Elsewhere nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
