"""The server's run directory of a deployment: it is taken up again after an interruption, and has no local values."""

import dataclasses
import json
import types

import numpy as np
import pytest
from conftest import small_config

from pilot_jax import errors
from pilot_jax.data.roster import Member, Roster
from pilot_jax.deploy.glue import Node
from pilot_jax.federation.executor import Executor
from pilot_jax.federation.strategies import make_strategy
from pilot_jax.report.page import write_report
from pilot_jax.runs import served
from pilot_jax.runs.manifest import has_ended
from pilot_jax.testing.toy import SIZES, TASKS, run_toy, toy_federation, toy_state

FED = toy_federation(make_strategy("scaffold"))
ROSTER = Roster({f"c{k}": Member(task, size) for k, (task, size) in enumerate(zip(TASKS, SIZES, strict=True))})


class Clients:
    """The clients' side; `dies_at`: the number of the message, from 0, at which the server is killed."""

    def __init__(self, folder, dies_at=None):
        self.folder, self.dies_at, self.count = folder, dies_at, 0

    def __call__(self, kind, names, make):
        replies = {}
        for name in names:
            if self.count == self.dies_at:
                raise KeyboardInterrupt
            self.count += 1
            (self.folder / name).mkdir(exist_ok=True)
            client = FED.names.index(name)
            initial = toy_state(FED).population[client].adapters
            node = Node(FED, Executor(client_chunk=1), client, self.folder / name, lambda own=initial: own, "float32")
            parcel = make(name)
            replies[name] = node.finish(parcel) if kind == "query.finish" else node.train(parcel)
        return replies


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """The toy's federation is what is prepared from any config."""
    without = dataclasses.replace(FED, clients=tuple(ROSTER.completed([])))
    monkeypatch.setattr(served, "configure", lambda config: None)
    monkeypatch.setattr(served, "prepare", lambda config, roster: types.SimpleNamespace(
        federation=without, system=config.system))
    monkeypatch.setattr(served, "initial_state", toy_state)


def test_a_killed_server_goes_on_in_its_folder(tmp_path):
    nodes, out, said = tmp_path / "nodes", tmp_path / "run", []
    nodes.mkdir()
    with pytest.raises(KeyboardInterrupt):  # in the second phase, after one of three clients has answered
        served.serve_run(small_config(), ROSTER, out, Clients(nodes, dies_at=4), "float32", said.append)
    assert not has_ended(out) and said == ["round 1 plain1: 3 clients"]
    with pytest.raises(errors.InputError, match="can only be resumed with the config that it began with"):
        served.serve_run(small_config(train={"lr_connector": 1.0}), ROSTER, out, Clients(nodes), "float32", said.append)
    state = served.serve_run(small_config(), ROSTER, out, Clients(nodes), "float32", said.append)
    assert has_ended(out) and len(said) == 3
    expected = run_toy(FED)
    for own, other in zip(state.population, expected.population, strict=True):
        np.testing.assert_allclose(own.adapters["projector"]["w"], other.adapters["projector"]["w"], atol=1e-6)
        assert not any(np.any(leaf) for leaf in (own.adapters["control"]["projector"]["w"],))  # as at the start
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines if "bytes_up" in line] == ["plain1", "plain2", "plain"]
    assert len(lines) == 3 * 4 and len(list((out / "mixing").glob("*.npz"))) == 3
    assert (state.bytes_up, state.bytes_down) == (expected.bytes_up, expected.bytes_down)
    page, *_ = write_report([out], tmp_path / "report.html", 2)
    assert "data are on other machines" in page.read_text() and all(name in page.read_text() for name in FED.names)
    again = served.serve_run(small_config(), ROSTER, out, Clients(nodes), "float32", said.append)  # final models again
    assert len(said) == 3 and again.round == 3
