"""The line about a run's time and memory that `pilot-jax run` prints while the first program is compiled."""

from __future__ import annotations

import threading

import jax

from pilot_jax.config import Config
from pilot_jax.federation.observer import RunObserver
from pilot_jax.federation.state import Federation, State
from pilot_jax.planning.forecast import forecast, forecast_line
from pilot_jax.runs.prepare import outline


class Forecast(RunObserver):
    """Computes the forecast in a thread and passes it to the display as a note; does nothing with several processes."""

    def __init__(self, config: Config, display: RunObserver) -> None:
        self._config, self._display = config, display
        self._thread: threading.Thread | None = None

    def run_started(self, fed: Federation, state: State) -> None:
        if jax.process_count() == 1:
            self._thread = threading.Thread(target=self._note, args=(fed,))
            self._thread.start()

    def _note(self, fed: Federation) -> None:
        try:
            text = forecast_line(forecast(fed, outline(self._config)))
        except Exception as error:  # a failed forecast must not end the run
            text = f"warning: no forecast: {type(error).__name__}: {error}"
        self._display.note(text)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.join()
