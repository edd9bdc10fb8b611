"""Tests of refused uploads: they are left out of the round, reported, and have no effect on other clients."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from conftest import Events, small_config, tree_max_difference

from pilot_jax.config import FederationConfig
from pilot_jax.federation import executor, rounds
from pilot_jax.federation.observer import RunObserver
from pilot_jax.federation.strategies import make_strategy
from pilot_jax.federation.uploads import change, misfit, refusals
from pilot_jax.runs import prepare, simulate


def spoilt(value=np.nan, who=("ocr_1",), when=(1, 2, 3)):
    """Returns a `tamper` function under which some clients upload `value` times their LoRA."""
    def tamper(client, round_, upload, start):
        if client not in who or round_ not in when:
            return upload
        return {**upload, "text_adapter": jax.tree.map(lambda x: (x * value).astype(x.dtype), upload["text_adapter"])}

    return tamper


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_a_refused_client_is_as_if_it_had_not_taken_part(value):
    """The other clients get the results of a round without the refused client. The refused client stays as it was, and
    is new again in the next round."""
    events = Events()
    config = small_config(federation={"rounds": 2})
    run = simulate.simulate(config, tamper=spoilt(value, when=(1,)), observers=[events])
    names = [c.name for c in run.federation.clients]
    without = small_config(federation={"rounds": 1, "participation": [
        {"round": 1, "clients": [n for n in names if n != "ocr_1"]}]})
    fed = run.federation
    first, = rounds.run_round([fed], [prepare.initial_state(fed)], run.setup.executor)
    absent = simulate.simulate(without)
    ill = names.index("ocr_1")
    for i, name in enumerate(names):
        a, b = first.population[i], absent.population[i]
        assert (a.stage, a.rounds) == (b.stage, b.rounds) == (("none", 0) if i == ill else ("stage2", 1)), name
        assert tree_max_difference(a.adapters, b.adapters) <= 1e-6  # rounding in other chunks
    assert run.population[ill].rounds == 1 and run.population[0].rounds == 2 and run.summary["quarantined"] == 1
    refused = [r for r in run.records if "bytes_up" in r]
    # Refused in the first phase of round 1, it is absent from the second, and trains both phases in round 2.
    assert [(r["round"], r["phase"], r["clients"], r["quarantined"]) for r in refused] == [
        (1, "stage1", 8, ["ocr_1"]), (1, "stage2", 8, []), (2, "stage1", 1, []), (2, "stage2", 9, [])]
    told = [e["text"] for e in events.events if e["kind"] == "note" and "ocr_1" in e["text"]]
    assert len(told) == 1 and "left out of this round" in told[0]
    assert ("not finite" if not np.isfinite(value) else "federation.max_update_ratio") in told[0]
    assert all(np.isfinite(x).all() for c in run.population for x in jax.tree.leaves(c.adapters))


@pytest.mark.slow
def test_a_client_that_is_always_bad_does_not_stop_the_others():
    """It is new again in every round, so that from round 2 on it is alone in stage 1."""
    run = simulate.simulate(small_config(federation={"rounds": 3}), tamper=spoilt())
    assert [c.rounds for c in run.population] == [3] * 4 + [0] + [3] * 4 and run.summary["quarantined"] == 3
    alone = [r for r in run.records if r.get("clients") == 0]
    assert [(r["round"], r["phase"], r["quarantined"]) for r in alone] == [(2, "stage1", ["ocr_1"]),
                                                                           (3, "stage1", ["ocr_1"])]
    assert run.summary["bytes_up"] == sum(r["bytes_up"] for r in run.records if "bytes_up" in r)


@pytest.mark.slow
def test_bad_newcomers_among_themselves_are_bad_all_the_same():
    """Two of nine clients upload 1e6 times their update. From round 2 on they are alone in stage 1, and are still
    refused, because the norms accepted in round 1 count in the median."""
    def tamper(client, round_, upload, start):
        if client not in ("caption_0", "vqa_2"):
            return upload
        return jax.tree.map(lambda x, o: (o + 1e6 * (x - o)).astype(x.dtype), upload, start)

    run = simulate.simulate(small_config(federation={"rounds": 3}), tamper=tamper)
    assert [c.rounds for c in run.population] == [0] + [3] * 7 + [0] and run.summary["quarantined"] == 6
    largest = max(float(np.abs(x).max()) for c in run.population for x in jax.tree.leaves(c.adapters))
    assert largest < 10


@pytest.mark.slow
def test_stop_or_nobody_left():
    with pytest.raises(FloatingPointError, match=r"stage1: the upload of ocr_1 is not finite in .*text_adapter"):
        simulate.simulate(small_config(federation={"on_bad_client": "stop"}), tamper=spoilt())
    everyone = [f"{task}_{i}" for task in ("caption", "ocr", "vqa") for i in range(3)]
    with pytest.raises(FloatingPointError, match=r"Lower train\.lr"):
        simulate.simulate(small_config(), tamper=spoilt(who=everyone))


@pytest.mark.slow
def test_a_client_that_diverges_by_itself_is_refused(monkeypatch):
    """Local leaves that are not finite also count, because they would spoil the client's next phase."""
    real = executor._Phase.load

    def load(self, piece):
        loaded = real(self, piece)
        for k, job in enumerate(piece.members):
            if job.data.name == "vqa_0":
                loaded.batch.rates["connector"][k] = np.inf
        return loaded

    monkeypatch.setattr(executor._Phase, "load", load)
    run = simulate.simulate(small_config())
    assert run.summary["quarantined"] == 1 and [c.rounds for c in run.population] == [1] * 6 + [0, 1, 1]


def test_misfits():
    tree = {"a": np.zeros((2, 3), np.float32), "b": {"c": np.zeros(2, np.float32)}}
    assert misfit(tree, tree) is None
    assert "other subtrees" in misfit({"a": tree["a"]}, tree)
    assert "float64" in misfit({**tree, "a": np.zeros((2, 3))}, tree)
    assert "[3, 2]" in misfit({**tree, "a": np.zeros((3, 2), np.float32)}, tree)
    assert change({"a": np.float32([3, 0]), "b": np.float32([4])}, {"a": np.float32([0, 0]), "b": np.float32([0])}) == 5


@pytest.mark.parametrize(("norms", "bad"), [
    ([1, 2, 3], []), ([1, 1, 101], [2]), ([1, 101], [1]), ([5], []), ([0, 0, 1], []), ([1, 99], []),
    ([1] * 5 + [1e6] * 4, [5, 6, 7, 8])])
def test_exploded(norms, bad):
    records = {i: {"update_norm": n} for i, n in enumerate(norms)}
    assert list(refusals(FederationConfig(), records)) == bad
    assert refusals(FederationConfig(max_update_ratio=None), records) == {}
    assert list(refusals(FederationConfig(), {0: {"update_norm": 1e6}, 1: {"update_norm": 2e6}}, [1, 2, 3])) == [0, 1]
    assert list(refusals(FederationConfig(), {**records, 99: {"fault": "is odd"}})) == [99, *bad]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
def test_robust_mixing_bounds_what_hostile_clients_do(name):
    """2 of 9 clients upload their update times −10, which is not refused. Every entry of the model stays within the
    honest clients' values, whereas with FedAvg it does not."""
    hostile = ("caption_0", "vqa_2")
    setup = prepare.prepare(small_config(federation={"local_steps": 1}))
    outside = {}
    for strategy in (name, "fedavg"):
        one = prepare.with_strategy(setup, make_strategy(strategy, {"trim": 0.25})).federation
        start = prepare.initial_state(one)
        uploads = []

        def tamper(client, round_, upload, origin, uploads=uploads):
            if client in hostile:
                return jax.tree.map(lambda x, o: (o - 10 * (x - o)).astype(x.dtype), upload, origin)
            uploads.append(upload)
            return upload

        one = dataclasses.replace(one, tamper=tamper)
        plan = rounds.begin_phase(one, start)
        done, = setup.executor.train([executor.Work(one, plan.adapters, 1, plan.stage, plan.label)])
        after = rounds.finish_phase(one, start, plan, done, RunObserver())
        model = rounds.begin_phase(one, after).adapters[0]  # the server's model
        low, high = (jax.tree.map(lambda *x, f=f: f(np.stack(x), axis=0), *uploads) for f in (np.min, np.max))
        parts = [np.mean((m < lo - 1e-6) | (m > hi + 1e-6)) for n in uploads[0] for m, lo, hi in zip(
            jax.tree.leaves(model[n]), jax.tree.leaves(low[n]), jax.tree.leaves(high[n]), strict=True)]
        outside[strategy] = max(parts)
    assert outside[name] == 0 and outside["fedavg"] > 0.1
