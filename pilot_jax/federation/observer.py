"""The interface by which log files, terminals and a user's own tools follow a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pilot_jax.federation.state import Federation, State

Record = Mapping[str, Any]  # a dictionary that JSON can represent


class RunObserver:
    """Methods that a run calls at its events. All of them are empty: override the ones you need.

    An observer must not change its arguments. An exception that it raises ends the run, which `--resume` can continue.
    """

    def run_started(self, fed: Federation, state: State) -> None:
        """Called before the first phase. In a resumed run, `state` is the last saved state."""

    def run_resumed(self, records: Sequence[Record]) -> None:
        """Called before `run_started` in a resumed run, with what the methods below were given as `record`s before its
        last saved state, except scores of the last round. The process that writes the files alone has records."""

    def note(self, text: str) -> None:
        """Called with a message for people. Warnings begin with "warning:"."""

    def chunk_trained(self, progress: Record) -> None:
        """Called after each chunk of clients. Keys: round, phase, loss; so far: steps, clients; `of`: all clients."""

    def client_trained(self, record: Record) -> None:
        """Called with a client's record: round, phase, client, task, step, mean loss terms, update_norm or fault."""

    def phase_ended(self, state: State, record: Record, mixing: Mapping[str, np.ndarray] | None,
                    trained: Sequence[int]) -> None:
        """Called after a phase's aggregation.

        Args:
            record: round, phase, clients, client_steps, seconds, bytes_up, bytes_down, quarantined; after an
                aggregation also loss and effective_neighbors.
            mixing: weights [S, S], effective_neighbors [S], client_ids [S] and, for ATA, distances [S, S], or those of
                the nearest clients alone (`cohort.Aggregated`); None if no upload could be used.
            trained: indices of the clients whose adapters changed.
        """

    def client_scored(self, record: Record) -> None:
        """Called with a client's score on a held-out split: round, split, client, task, score."""

    def round_scored(self, round_: int, score: float) -> None:
        """Called with the mean of a round's scores."""

    def round_ended(self, state: State) -> None:
        """Called after a round and its scores."""

    def run_ended(self, summary: Record) -> None:
        """Called after the final scores. `summary` is the content of `summary.json`."""

    def close(self) -> None:
        """Called last, whether the run has finished or failed."""

    def stop_requested(self) -> int:
        """Called after each chunk and phase. Returns 0 to go on, or a signal's number (or 1) to save and end."""
        return 0

    def finish_requested(self) -> bool:
        """Called before each round but the first. Returns whether training ends here: the run then fine-tunes and
        scores its test split, as after the last round."""
        return False


class Observers(RunObserver):
    """An observer that calls several others, in order."""

    def __init__(self, *observers: RunObserver) -> None:
        self.observers = observers

    def stop_requested(self) -> int:
        return max((observer.stop_requested() for observer in self.observers), default=0)

    def finish_requested(self) -> bool:
        return any([observer.finish_requested() for observer in self.observers])  # all are asked


def _calls_all(name: str) -> Callable[..., None]:
    def call(self: Observers, *arguments: Any) -> None:
        for observer in self.observers:
            getattr(observer, name)(*arguments)

    return call


for _name in vars(RunObserver):
    if not _name.startswith("_") and _name not in vars(Observers):
        setattr(Observers, _name, _calls_all(_name))
