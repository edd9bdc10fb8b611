"""Tests of observers, and of how they end a run."""

from __future__ import annotations

import pytest
from resuming import Stops

from pilot_jax.config import (
    apply_overrides,
)
from pilot_jax.errors import Interrupted
from pilot_jax.federation.observer import RunObserver
from pilot_jax.runs import simulate


class Order(RunObserver):
    """Records the names and arguments of its calls, in order."""

    def __init__(self):
        self.calls = []


for _name in vars(RunObserver):
    if not _name.startswith("_") and _name != "stop_requested":
        setattr(Order, _name, lambda self, *arguments, _name=_name: self.calls.append((_name, *arguments)))


def test_observers_are_called_in_order(on_toy, monkeypatch):
    monkeypatch.setattr(simulate, "evaluate", lambda evaluation, population, split: {"c0": 0.25, "c2": 0.75})
    config = apply_overrides(on_toy, ["eval.every=2"])
    one, two = Order(), Order()
    run = simulate.simulate(config, observers=[one, two])
    phase = ["chunk_trained"] * 2 + ["client_trained"] * 3 + ["phase_ended"]
    assert [name for name, *_ in one.calls] == [
        "note", "note", "run_started", *phase, *phase, "round_ended", "finish_requested", *phase, "client_scored",
        "client_scored", "round_scored", "round_ended", "note", "run_ended", "close"]
    assert [name for name, *_ in two.calls] == [name for name, *_ in one.calls]
    given = {name: arguments for name, *arguments in one.calls}
    assert given["run_started"] == [run.federation, given["run_started"][1]]
    assert given["chunk_trained"] == [{"round": 2, "phase": "plain", "steps": 9, "of": 3, "clients": 3,
                                       "loss": given["chunk_trained"][0]["loss"]}]
    assert given["client_scored"] == [{"round": 2, "split": "validation", "client": "c2", "task": "t1", "score": 0.75}]
    assert given["round_scored"] == [2, 0.5] and given["run_ended"] == [run.summary]
    state, record, arrays, trained = given["phase_ended"]
    assert (record["round"], record["phase"], record["clients"]) == (2, "plain", 3) and list(trained) == [0, 1, 2]
    assert arrays["weights"].shape == (3, 3) and arrays["client_ids"].tolist() == ["c0", "c1", "c2"]
    assert state.version == 3 and given["round_ended"][0].round == 3
    lines = [arguments[name == "phase_ended"] for name, *arguments in one.calls
             if name in ("client_trained", "phase_ended", "client_scored")]
    assert run.records == lines


def test_an_observer_that_raises_ends_the_run_and_all_are_closed(on_toy, tmp_path):
    class Broken(RunObserver):
        def client_trained(self, record):
            raise OSError("no connection")

    order = Order()
    with pytest.raises(OSError, match="no connection"):
        simulate.simulate(on_toy, out=tmp_path / "run", observers=[Broken(), order])
    assert order.calls[-1] == ("close",)
    whole = simulate.simulate(on_toy)
    run = simulate.simulate(on_toy, out=tmp_path / "run", resume=True)
    assert run.summary["adapters_sha256"] == whole.summary["adapters_sha256"]


@pytest.mark.parametrize(("name", "chunks"), [
    *((name, chunks) for name in ("scaffold", "similarity") for chunks in (1, 2, 3, 5, 6)),
    *((name, 3) for name in ("flexlora", "fedex_lora", "flora")),
    *(pytest.param(name, chunks, marks=pytest.mark.slow) for name, chunks in [
        ("fedrot_lora", 3), *(("fedlease", chunks) for chunks in (1, 2, 3, 5, 6))])])
def test_stop_requested_ends_a_run_that_then_goes_on(on_toy, tmp_path, name, chunks):
    """A run stopped after any chunk, also within a phase, saves what it has trained and continues to the same end."""
    config = apply_overrides(on_toy, [f"strategy.name={name}"])
    whole = simulate.simulate(config)
    order = Order()
    with pytest.raises(Interrupted) as interrupted:
        simulate.simulate(config, out=tmp_path / "run", observers=[Stops(chunks), order])
    assert interrupted.value.signum == 15 and order.calls[-1] == ("close",)
    assert sum(name == "chunk_trained" for name, *_ in order.calls) == chunks
    assert not (tmp_path / "run" / "summary.json").exists()
    seen = Order()
    run = simulate.simulate(config, out=tmp_path / "run", resume=True, observers=[seen])
    assert sum(name == "chunk_trained" for name, *_ in seen.calls) == 6 - chunks
    strip = lambda r: {k: v for k, v in r.items() if not k.endswith("seconds")}  # noqa: E731
    assert [strip(r) for r in run.records] == [strip(r) for r in whole.records]
    for key in ("adapters_sha256", "bytes_up", "bytes_down", "client_steps"):
        assert run.summary[key] == whole.summary[key], key
