"""SIGINT and SIGTERM while a run trains: the running chunk is finished and saved first."""

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
    """Inside `with`, and in the main thread, a signal is remembered until `stop_requested` is asked; a second
    one, or one while `waits` is False, ends what is running at once.

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
                            if signal.getsignal(number) is not signal.SIG_IGN}  # as of a job in the background
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._heard or not self.waits:
            raise Interrupted(number)
        self._heard = number
        self._say("stopping after the clients that are being trained, and saving; once more to stop at once")

    def stop_requested(self) -> int:
        """The signal that was heard, by any process; else 0."""
        return processes.largest(self._heard)
