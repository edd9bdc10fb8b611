"""Tests that observers end training, at the same round in a run that was interrupted and in one that was not."""

from __future__ import annotations

import json

import pytest
from conftest import small_config

import pilot_jax
from pilot_jax.errors import Interrupted
from pilot_jax.runs.early_stopping import EarlyStopping


def rounds_until_it_ends(stopping, scores):
    for round_, score in enumerate(scores, 1):
        stopping.round_scored(round_, score)
        if stopping.finish_requested():
            return round_
    return None


@pytest.mark.parametrize(("scores", "patience", "gain", "last"), [
    ((0.1, 0.2, 0.2, 0.2, 0.9), 2, 0.0, 4), ((0.1, 0.2, 0.1, 0.3, 0.2), 2, 0.0, None), ((0.5, 0.4), 1, 0.0, 2),
    ((0.1, 0.15, 0.2), 1, 0.1, 2)])
def test_it_ends_when_the_best_score_is_patience_scorings_old(scores, patience, gain, last):
    assert rounds_until_it_ends(EarlyStopping(patience, gain), scores) == last


def test_a_resumed_run_takes_up_its_count():
    records = [{"round": r, "split": "validation", "client": c, "task": "t", "score": s}
               for r, pair in enumerate([(0.2, 0.4), (0.1, 0.3)], 1) for c, s in zip("ab", pair, strict=True)]
    stopping = EarlyStopping(2)
    stopping.run_resumed([{"round": 1, "phase": "x", "loss": 1.0}, *records])
    assert (stopping.best, stopping.since) == (pytest.approx(0.3), 1)


def test_patience_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        EarlyStopping(0)


class Twice(pilot_jax.RunObserver):
    """Asks for the end after two rounds; interrupts the run once, in its second round."""

    def __init__(self, interrupts):
        self.interrupts, self.ended = interrupts, 0

    def round_ended(self, state):
        self.ended = state.round - 1

    def run_resumed(self, records):
        self.ended = max(r["round"] for r in records) - 1  # the last round has not ended

    def stop_requested(self):
        stop, self.interrupts = self.interrupts and self.ended == 1, False if self.ended == 1 else self.interrupts
        return int(stop)

    def finish_requested(self):
        return self.ended >= 2


@pytest.mark.slow
def test_an_observer_ends_training_and_the_run_is_whole(tmp_path):
    config = small_config(federation={"rounds": 5})
    run = pilot_jax.simulate(config, out=tmp_path / "whole", observers=[Twice(False)])
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["rounds"] == 2 and summary["score_by_client"] == run.summary["score_by_client"]
    with pytest.raises(Interrupted):
        pilot_jax.simulate(config, out=tmp_path / "parts", observers=[Twice(True)])
    again = pilot_jax.simulate(config, out=tmp_path / "parts", resume=True, observers=[Twice(False)])
    assert again.summary["rounds"] == 2
    assert again.summary["adapters_sha256"] == run.summary["adapters_sha256"]
    assert max(json.loads(line)["round"] for line in
               (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()) == 2
