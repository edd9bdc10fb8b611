"""What holds for the whole test run, its workers and the processes that tests start."""

from __future__ import annotations

import os
import shutil
import tempfile

# Compiling is most of the tests' time, and many files want the same programs: all find them in one folder, which goes
# when the tests end.
PROGRAMS = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    PROGRAMS = tempfile.mkdtemp(prefix="pilot-jax-programs-")
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": PROGRAMS, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}


def pytest_unconfigure(config):
    if PROGRAMS is not None:
        shutil.rmtree(PROGRAMS, ignore_errors=True)
