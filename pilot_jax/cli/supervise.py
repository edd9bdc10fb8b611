"""Runs one of several processes in a child process, so that a message remains whatever ends it.

If a process dies, JAX's C++ code aborts the others within seconds, with stack traces and without running any Python.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import typer

_child = False


def is_child() -> bool:
    """Returns whether this is the child process of `in_child`."""
    return _child


def in_child(how_to_go_on: Callable[[], str]) -> None:
    """Returns in a child process. The parent process waits for it and never returns: it ends with the same exit code.

    SIGINT and SIGTERM are passed on to the child, and SIGKILL too on Linux. What C++ code writes to the standard error
    goes to a file, which is kept and named if the child aborts. Call this before threads are started.

    Args:
        how_to_go_on: returns the end of the message for a child that was killed or aborted.
    """
    global _child
    if not hasattr(os, "fork"):
        return
    handle, log = tempfile.mkstemp(prefix="pilot-jax-process-", suffix=".txt")
    sys.stdout.flush()
    sys.stderr.flush()
    parent, child = os.getpid(), os.fork()
    if child == 0:
        _child = True
        _begin_child(parent, handle)
        return
    os.close(handle)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: os.kill(child, number))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        typer.echo(f"Failed: this process was ended by {signal.Signals(-code).name}"
                   f"{' after another process had ended or was out of reach' if code == -signal.SIGABRT else ''}. "
                   f"{how_to_go_on()} (in every process). Log: {log}", err=True)
        code = 1
    else:
        Path(log).unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _begin_child(parent: int, log: int) -> None:
    """Lets the child end with its parent, have signals only from it, and write C++ logs into the file `log`."""
    os.setpgid(0, 0)  # Ctrl-C in a terminal reaches the parent alone, which passes it on
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it has ended before the line above
        os._exit(1)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    os.dup2(log, 2)
    os.close(log)
