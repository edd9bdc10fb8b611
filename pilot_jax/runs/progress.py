"""Shows a run's progress on the terminal, as bars, as one line per phase, or as lines of JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pilot_jax.federation.observer import Record, RunObserver
from pilot_jax.federation.state import Federation, State, all_steps
from pilot_jax.words import counted, duration


class ProgressDisplay(RunObserver):
    """Shows round, phase, clients, losses, scores, client steps per second and the remaining time.

    Args:
        folder: the run directory, which the first line names.
        mode: auto (bars on a terminal, else a line per phase), json (each event a line of JSON) or quiet (warnings).
    """

    def __init__(self, folder: Path | None = None, console: Console | None = None, mode: str = "auto") -> None:
        self.console, self._mode, self._folder = console or Console(), mode, folder
        self._total = self._rounds = self._before = self._earlier = 0
        self._score, self._started = "", time.perf_counter()
        self._bar: Progress | None = None

    def run_started(self, fed: Federation, state: State) -> None:
        self.begin(sum(all_steps(fed).values()), fed.settings.rounds, state.client_steps)
        self.note(f"{fed.strategy.name}: {counted(len(fed.clients), 'client')}, {counted(len(fed.tasks), 'task')} "
                  f"({', '.join(fed.tasks)}), {counted(self._rounds, 'round')}, "
                  f"{counted(self._total, 'client step')} on {jax.devices()[0].device_kind}"
                  + (f" → {self._folder}" if self._folder else ""))

    def begin(self, total_steps: int, rounds: int, done: int = 0) -> None:
        """Starts the clock of a run of `total_steps` client steps and, on a terminal, shows its bars.

        Args:
            done: the steps that a run has taken before it goes on.
        """
        self._total, self._rounds, self._started = total_steps, rounds, time.perf_counter()
        self._before = self._earlier = done
        if self.console.is_terminal and self._mode == "auto":
            self._bar = Progress(TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(),
                                 TextColumn("{task.fields[note]}"), console=self.console, transient=True)
            self._bar.start()
            self._run = self._bar.add_task("run, client steps", total=total_steps, note="compiling …")
            self._phase = self._bar.add_task("phase, clients", total=None, note="")

    def note(self, text: str) -> None:
        self._emit("note", {"text": text}, text)

    def round_scored(self, round_: int, score: float) -> None:
        text = f"round {round_}: validation score {score:.3f}"
        self._score = f", {text}"
        self._emit("score", {"text": text}, text)

    def phase_ended(self, state: State, record: Record, mixing: Mapping[str, np.ndarray] | None,
                    trained: Sequence[int]) -> None:
        self._before += record["client_steps"]
        if mixing is None:
            return
        text = (f"round {record['round']} {record['phase']}: loss {record['loss']:.3f}, effective neighbours "
                f"{record['effective_neighbors']:.2f}, {record['seconds']:.1f} s"
                + (f", ε {record['epsilon']:.3g}" if "epsilon" in record else ""))
        shown = {k: v for k, v in record.items() if not k.endswith("_by_subtree")}
        self._emit("phase", shown, text if self._bar is not None else None)

    def chunk_trained(self, progress: Record) -> None:
        done = self._before + progress["steps"]
        seconds = time.perf_counter() - self._started
        speed = (done - self._earlier) / seconds if seconds > 0 else 0.0
        pace = f"{speed:.1f} client-steps/s, {duration(max(self._total - done, 0) / speed)} left" if speed > 0 else ""
        text, phase = None, f"round {progress['round']}"
        if self._bar is not None:
            self._bar.update(self._run, completed=done, note=pace + self._score)
            self._bar.update(self._phase, total=progress["of"], completed=progress["clients"],
                             description=f"{phase}/{self._rounds} {progress['phase']}, clients",
                             note=f"loss {progress['loss']:.3f}")
        elif progress["clients"] == progress["of"]:
            text = (f"{phase} {progress['phase']} client {progress['clients']}/{progress['of']} "
                    f"loss {progress['loss']:.3f} {pace}")
        self._emit("chunk", progress, text)

    def _emit(self, kind: str, event: Mapping[str, Any], text: str | None) -> None:
        if self._mode == "json":
            print(json.dumps({"kind": kind, **event}), flush=True)
        elif self._mode == "quiet":
            if text is not None and text.startswith("warning"):
                print(text, file=sys.stderr)
        elif text is not None:
            self.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
