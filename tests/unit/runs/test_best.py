"""Tests on the toy that a run ends with the models of its best round, also if it was killed and resumed."""

from __future__ import annotations

import json

import pytest
from conftest import DiesAt, Killed, die, same_run, slow_except, toy_instead_of_model

from pilot_jax.config import apply_overrides, parse_config
from pilot_jax.errors import InputError
from pilot_jax.federation.observer import RunObserver
from pilot_jax.runs import best, resume, simulate
from pilot_jax.runs.checkpoint import adapters_sha256
from pilot_jax.runs.verify import verify_run
from pilot_jax.testing.toy import toy_clients

SCORES = {1: 0.2, 2: 0.6, 3: 0.6, 4: 0.3}  # mean validation score after each round; the first of the best is round 2
CONFIG = {"federation": {"rounds": 4, "local_steps": 2, "clients_per_round": 4}, "train": {"batch_size": 4},
          "strategy": {"name": "feddpa"}, "eval": {"every": 1, "keep": "best"}}


@pytest.fixture(autouse=True, scope="module")
def six_clients():
    with toy_instead_of_model(toy_clients((4, 8, 6, 5, 7, 4), ("t0", "t0", "t1", "t1", "t2", "t0")), client_chunk=1):
        yield


@pytest.fixture(autouse=True)
def scores(monkeypatch):
    """Makes two clients score as SCORES says, 0.1 less and 0.1 more, and the others not at all."""
    rounds, real = [], simulate.RunLoop._validate

    def evaluate(evaluation, population, split="test"):
        assert split == "validation"
        first, second = (c.name for c in evaluation.clients[:2])
        return {first: SCORES[rounds[-1]] - 0.1, second: SCORES[rounds[-1]] + 0.1}

    monkeypatch.setattr(simulate, "evaluate", evaluate)
    monkeypatch.setattr(simulate.RunLoop, "_validate",
                        lambda self, state, round_: rounds.append(round_) or real(self, state, round_))


class Hashes(RunObserver):
    """Collects the hash of all clients' adapters after each round."""

    def __init__(self):
        self.of = {}

    def run_started(self, fed, state):
        self.names = fed.names

    def round_ended(self, state):
        self.of[state.round - 1] = adapters_sha256(self.names, state.population)


def test_the_run_ends_with_the_best_round(scores, tmp_path):
    config, hashes = parse_config(CONFIG), Hashes()
    run = simulate.simulate(config, out=tmp_path / "run", observers=[hashes])
    assert len(set(hashes.of.values())) == 4 and run.summary["adapters_sha256"] == hashes.of[2]
    assert run.summary["best_round"] == 2 and run.summary["rounds"] == 4
    assert adapters_sha256(hashes.names, run.population) == hashes.of[2]
    loaded = simulate.simulate(config, out=tmp_path / "run", resume=True)  # as it was saved
    assert adapters_sha256(hashes.names, loaded.population) == hashes.of[2]
    assert not (tmp_path / "run" / "checkpoints" / "resume").exists() and not verify_run(tmp_path / "run").unknown
    last = simulate.simulate(apply_overrides(config, ["eval.keep=last"]))
    assert last.summary["adapters_sha256"] == hashes.of[4] and last.summary["best_round"] is None
    for changes in ([], [f"system.store={tmp_path / 'store'}"]):  # in memory only; and with adapters on disk
        other = simulate.simulate(apply_overrides(config, changes))
        assert other.summary["adapters_sha256"] == hashes.of[2], changes
    tuned = apply_overrides(config, ["federation.finetune_steps=2"])
    assert simulate.simulate(tuned).summary["adapters_sha256"] == hashes.of[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, six_clients):
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.mark.parametrize("death", slow_except(
    ("phase 4", "scored"), ["phase 2", "phase 3", "phase 4", "phase 5", "prune", "scored"]))
def test_a_killed_run_makes_the_same_choice(scores, whole, tmp_path, monkeypatch, death):
    """It is killed before or after the best round's scores, while its state is written, and right after that."""
    config = parse_config(CONFIG)
    if not whole.exists():
        simulate.simulate(config, out=whole)
    if death.startswith("phase"):
        killer, patches = DiesAt(int(death[-1]), "phase"), []
    else:  # while the best state is written, or right after that
        killer, patches = DiesAt(10**6), [(resume.Snapshots if death == "prune" else best.BestState, death)]
    with monkeypatch.context() as patch:
        for owner, name in patches:
            real = getattr(owner, name)

            def then_dies(self, *rest, real=real, name=name):
                real(self, *rest)
                if (rest[1] == 2) if name == "scored" else (self.folder.name == "best" and self.numbers()[-1] == 2):
                    die()

            patch.setattr(owner, name, then_dies)
        with pytest.raises(Killed):
            simulate.simulate(config, out=tmp_path / "run", observers=[killer])
    assert not verify_run(tmp_path / "run").damaged
    simulate.simulate(config, out=tmp_path / "run", resume=True)
    same_run(whole, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best_round"] == 2


def test_without_scores_there_is_no_best_round(monkeypatch):
    with pytest.raises(InputError, match="keep: best needs scores"):
        parse_config(CONFIG | {"eval": {"keep": "best"}})
    monkeypatch.setattr(simulate, "evaluate", lambda evaluation, population, split: {})
    assert simulate.simulate(parse_config(CONFIG)).summary["best_round"] is None
