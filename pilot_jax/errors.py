"""Exceptions that end a run early: wrong input (exit code 2 of the command line) and a signal (128 + its number)."""

from __future__ import annotations

import errno
from typing import Any


class InputError(ValueError):
    """Input that the user can correct: the message names the file or key, what is wrong, and what to do."""


class Interrupted(Exception):
    """A signal requested the end of the run. `partial`: each federation's results of the phase that was in training."""

    def __init__(self, signum: int, partial: Any = None) -> None:
        super().__init__(signum)
        self.signum, self.partial = signum, partial


# Errors of the system that are about a path which the user has given.
WRONG_PATH = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
              errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}


def is_wrong_path(error: BaseException) -> bool:
    """Returns whether an error is the system's answer to a path that cannot be used."""
    return isinstance(error, OSError) and error.errno in WRONG_PATH and error.filename is not None
