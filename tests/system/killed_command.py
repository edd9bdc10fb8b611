"""Runs a command of pilot-jax in a process that dies or finds the disk full: `python killed_command.py HOW ARGS...`.

HOW is "count", which prints as the last line how often the command wrote to the working directory (files opened for
writing, renamed, removed, folders made); "kill:N", SIGKILL just before the N-th of these; or "disk:N", where no file
may exceed N bytes. For test_commands_that_end_early.py.
"""

from __future__ import annotations

import os
import signal
import sys

WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
HERE = os.path.realpath(os.getcwd())


def main() -> None:
    how, _, number = sys.argv.pop(1).partition(":")
    count = 0

    def seen(event: str, values: tuple) -> None:
        nonlocal count
        writes = event in WRITES or (event == "open" and isinstance(values[2], int) and values[2] & (
            os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes and isinstance(values[0], (str, os.PathLike)):
            path = os.path.abspath(os.fspath(values[0]))
            if path.startswith(HERE) and "__pycache__" not in path:
                count += 1
                if how == "kill" and count == int(number):
                    os.kill(os.getpid(), signal.SIGKILL)

    if how == "disk":
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (int(number), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    sys.addaudithook(seen)
    from pilot_jax import cli

    try:
        cli.main()
    finally:
        if how == "count":
            print(f"\n{count}")


if __name__ == "__main__":
    main()
