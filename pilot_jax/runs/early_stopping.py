"""An observer that ends training when the validation score no longer rises."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from pilot_jax.evaluation.personalised import mean_score
from pilot_jax.federation.observer import Record, RunObserver


class EarlyStopping(RunObserver):
    """Ends training after `patience` scorings of the validation split without a new best mean over the clients.

    The run needs `eval.every`. Its final models are those of its last round; with `eval.keep: best`, of the best. A
    run that goes on with `--resume` takes up its count where the last saved state was.

    Args:
        gain: by how much a score must exceed the best one before it.
    """

    def __init__(self, patience: int, gain: float = 0.0) -> None:
        if patience < 1:
            raise ValueError(f"patience is {patience}, but must be at least 1")
        self.patience, self.gain = patience, gain
        self.best, self.since = float("-inf"), 0  # the best score, and how many came after it
        self._seen = False

    def run_resumed(self, records: Sequence[Record]) -> None:
        by_round: dict[int, list[float]] = {}
        for record in records:
            if record.get("split") == "validation":
                by_round.setdefault(record["round"], []).append(record["score"])
        for round_, scores in sorted(by_round.items()):
            if (mean := mean_score(scores)) is not None:
                self.round_scored(round_, mean)

    def round_scored(self, round_: int, score: float) -> None:
        self._seen = True
        if score > self.best + self.gain:
            self.best, self.since = score, 0
        else:
            self.since += 1

    def finish_requested(self) -> bool:
        return self.since >= self.patience

    def run_ended(self, summary: Record) -> None:
        if not self._seen:
            warnings.warn("EarlyStopping has seen no validation score: set eval.every, and give validation samples.",
                          stacklevel=2)
