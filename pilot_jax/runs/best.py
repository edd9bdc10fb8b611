"""Keeps the state after the round whose models score best on validation data (`eval.keep: best`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import cast

from pilot_jax.evaluation.personalised import mean_score
from pilot_jax.federation.observer import Record
from pilot_jax.federation.state import Federation, Population, State
from pilot_jax.runs.resume import Snapshots


class BestState:
    """The state after the best round so far: the one with the highest mean validation score, the first of equal ones.

    It is in memory and, in a run with a folder, in snapshots of its own, so that a resumed run finds it again. A state
    is written before the run's own snapshot of the round: a run that is killed in between scores the round again and
    makes the same choice.

    Args:
        wanted: whether a best state is kept at all.
        folder: the folder of its snapshots; None: it is only in memory.
    """

    def __init__(self, wanted: bool, folder: Path | None, fed: Federation) -> None:
        self.wanted, self.round, self._score = wanted, 0, float("-inf")
        self._fed, self._state = fed, cast(State | None, None)
        self._snapshots = None if folder is None or not wanted else Snapshots(
            folder, fed.names, fed.strategy.ownership(), mesh=fed.mesh)

    def resume(self, records: Sequence[Record], initial: State, warn: Callable[[str], None], writing: bool) -> None:
        """Finds the best round so far in the lines of metrics.jsonl, and its state in the snapshots.

        The snapshots can be ahead of the lines, since a run that is killed may go back a phase. Then the round comes
        again, and is saved again.
        """
        if self._snapshots is None:
            return
        scores: dict[int, list[float]] = {}
        for record in records:
            if record.get("split") == "validation":
                scores.setdefault(record["round"], []).append(record["score"])
        for round_, values in sorted(scores.items()):
            if (mean := mean_score(values)) is not None and mean > self._score:
                self._score, self.round = mean, round_
        found = self._snapshots.load(initial, self._fed.store, warn, writing) if self._snapshots.numbers() else None
        if found is not None:
            self._snapshots.note(range(len(initial.population)))  # who has trained since is not known
            if found[1].get("best_round") == self.round:
                self._state = found[0]

    def note(self, trained: Iterable[int]) -> None:
        """Records that these clients have trained."""
        if self._snapshots is not None:
            self._snapshots.note(trained)

    def scored(self, state: State, round_: int, score: float) -> None:
        """Keeps the state after a round if its score is higher than every one before it.

        Raises:
            OSError: it could not be written.
        """
        if not self.wanted or score <= self._score:
            return
        self._score, self.round, self._state = score, round_, state
        if self._snapshots is not None:
            self._snapshots.save(state, {"best_round": round_})

    def population(self) -> Population:
        """Returns the clients of the best state, whose adapters a store must not remove; none if there is none."""
        return () if self._state is None else self._state.population

    def chosen(self, last: State, warn: Callable[[str], None]) -> State:
        """Returns the last state with the models of the best round, or as it is if no round was scored."""
        if not self.wanted or not self.round:
            return last
        if self._state is None:
            warn(f"warning: eval.keep: the models of round {self.round}, which scored best, are not saved any more. "
                 "Those of the last round are used.")
            self.round = 0
            return last
        best = self._state
        return dataclasses.replace(last, population=best.population, server=best.server, version=best.version,
                                   fetched=best.fetched)
