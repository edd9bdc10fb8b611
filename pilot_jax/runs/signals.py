"""Handles SIGINT and SIGTERM during a run: the current chunk of clients is finished and saved before the run stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from pilot_jax.errors import Interrupted
from pilot_jax.federation.observer import RunObserver
from pilot_jax.parallel import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals(RunObserver):
    """A context manager that delays SIGINT and SIGTERM until `stop_requested` reports them; main thread only.

    A second signal, or a signal while `waits` is False, stops the run at once.

    Raises:
        Interrupted: from the signal's handler.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.waits = True
        self._heard, self._say = 0, say
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS
                            if signal.getsignal(number) is not signal.SIG_IGN}  # background jobs ignore SIGINT
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._heard or not self.waits:
            raise Interrupted(number)
        self._heard = number
        self._say("stopping after the clients that are now training, then saving; a second signal stops at once")

    def stop_requested(self) -> int:
        """Returns the number of the signal that some process has received, or 0."""
        return processes.largest_of_all(self._heard)
