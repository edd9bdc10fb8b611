"""Shows how far a comparison has come within a variant, whose seeds train together for minutes or hours."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from pilot_jax.federation.observer import Record, RunObserver
from pilot_jax.federation.state import Federation, all_steps
from pilot_jax.words import duration


class VariantProgress(RunObserver):
    """Shows the share of a variant's training that is done: as a bar on a terminal, else as a line now and then.

    Args:
        say: a function that shows a line. None: nothing is shown.
        console: where a bar is shown; by default the error output, so that the output itself has results alone.
        every: seconds between two lines.
    """

    def __init__(self, say: Callable[[str], None] | None, console: Console | None = None, every: float = 60.0) -> None:
        self._say, self._console, self._every = say, console or Console(stderr=True), every
        self._title, self._total, self._before = "", 1, 0
        self._began = self._spoken = time.perf_counter()
        self._bar: Progress | None = None

    @contextmanager
    def training(self, title: str, feds: Sequence[Federation]) -> Iterator[None]:
        """Shows the training of `feds`, which train together, as that of `title`, and then its scoring."""
        self._title, self._before = title, 0
        self._total = max(1, sum(sum(all_steps(fed).values()) for fed in feds))
        self._began = self._spoken = time.perf_counter()
        if self._console.is_terminal and self._say is not None:
            self._bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(30), TaskProgressColumn(),
                                 TextColumn("{task.fields[note]}"), console=self._console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(title, total=self._total, note="compiling …")
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def chunk_trained(self, progress: Record) -> None:
        done = min(self._before + progress["steps"], self._total)  # clients of one chunk, of all federations
        if progress["clients"] == progress["of"]:
            self._before = done  # the phase is over
        seconds = time.perf_counter() - self._began
        left = f"{duration(seconds * (self._total - done) / done)} left" if done else ""
        self._show(done, f"round {progress['round']}, {left}", f"{done / self._total:.0%} of training, {left}")

    def scoring(self) -> None:
        """Shows that the training is over and answers are scored."""
        self._show(self._total, "scoring …", f"trained in {duration(time.perf_counter() - self._began)}, scoring …")

    def _show(self, done: int, note: str, line: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif self._say is not None and (now := time.perf_counter()) - self._spoken >= self._every:
            self._spoken = now
            self._say(f"{self._title}: {line}")
