"""What ends a run early: bad input (the command line's exit code 2) and being asked to stop (128 + the signal)."""

from __future__ import annotations

from typing import Any


class InputError(ValueError):
    """Input the user can mend: the message names the file or key, what was wrong, and what to do."""


class Interrupted(Exception):
    """A signal asked the run to stop. `partial`: what the phase had trained by then, of each federation."""

    def __init__(self, signum: int, partial: Any = None) -> None:
        super().__init__(signum)
        self.signum, self.partial = signum, partial
