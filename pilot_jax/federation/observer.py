"""How a run is followed while it goes on: one protocol, for files, terminals and a user's own tools."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pilot_jax.federation.state import Federation, State

Record = Mapping[str, Any]  # what JSON can hold


class RunObserver:
    """Called while a run goes on. Every method is empty: override what you need.

    An observer must not change what it is given. What it raises ends the run, which can go on with `--resume`.
    """

    def run_started(self, fed: Federation, state: State) -> None:
        """Before the first phase that is trained; `state` is as of the last one saved if the run is resumed."""

    def note(self, text: str) -> None:
        """A line for people; warnings begin with "warning:"."""

    def chunk_trained(self, progress: Record) -> None:
        """After each chunk of clients: round, phase, steps and clients so far of the phase, `of` how many, loss."""

    def client_trained(self, record: Record) -> None:
        """A client's local update: round, phase, client, task, step, the mean loss terms, update_norm or fault."""

    def phase_ended(self, state: State, record: Record, mixing: Mapping[str, np.ndarray] | None,
                    trained: Sequence[int]) -> None:
        """After a phase's aggregation.

        Args:
            record: round, phase, clients, client_steps, seconds, bytes_up, bytes_down, quarantined, and with an
                aggregation loss and effective_neighbors.
            mixing: weights [S, S], effective_neighbors [S], client_ids [S] and, for ATA, distances [S, S]; None where
                no upload could be used.
            trained: indices of the clients whose adapters changed.
        """

    def client_scored(self, record: Record) -> None:
        """A client's score on a held-out split: round, split, client, task, score."""

    def round_scored(self, round_: int, score: float) -> None:
        """The mean of a round's scores."""

    def round_ended(self, state: State) -> None:
        """After a round, its scores included."""

    def run_ended(self, summary: Record) -> None:
        """After the final scores; `summary` is what `summary.json` holds."""

    def close(self) -> None:
        """The run has ended, well or not."""

    def stop_requested(self) -> int:
        """Asked after each chunk and phase: 0 to go on, else a signal's number (or 1) to save and end."""
        return 0


class Observers(RunObserver):
    """Calls several observers, in order."""

    def __init__(self, *observers: RunObserver) -> None:
        self.observers = observers

    def stop_requested(self) -> int:
        return max((observer.stop_requested() for observer in self.observers), default=0)


def _calls_all(name: str) -> Callable[..., None]:
    def call(self: Observers, *arguments: Any) -> None:
        for observer in self.observers:
            getattr(observer, name)(*arguments)

    return call


for _name in vars(RunObserver):
    if not _name.startswith("_") and _name != "stop_requested":
        setattr(Observers, _name, _calls_all(_name))
