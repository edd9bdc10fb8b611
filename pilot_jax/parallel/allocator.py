"""Settings of glibc's allocator: memory that its users have freed, and that it would keep. Other systems need none."""

from __future__ import annotations

import contextlib
import ctypes
import os

M_ARENA_MAX = -8  # of glibc's malloc.h


def give_back() -> None:
    """Returns freed memory to the operating system, which glibc does not do by itself; elsewhere nothing happens.

    On Linux, XLA's compiler leaves about 0.3 GB of it per program.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def use_one_arena() -> None:
    """Makes glibc serve all threads of this process from one pool of memory; elsewhere nothing happens.

    By default each thread has a pool, and what the compiler's threads leave in theirs is lost to all others. This holds
    for the whole process, and only before its threads begin, so only the command line calls this function.
    """
    with contextlib.suppress(OSError, AttributeError):
        if "MALLOC_ARENA_MAX" not in os.environ:  # the user's choice
            ctypes.CDLL("libc.so.6").mallopt(M_ARENA_MAX, 1)
