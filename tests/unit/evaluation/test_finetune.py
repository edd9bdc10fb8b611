"""Tests fine-tuning against SGD in NumPy float64, on softmax regression with LoRA, and the scores of its models."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from conftest import DiesAt, Events, Killed, same_run, slow_except, tree_max_difference

from pilot_jax.cli.tables import print_scores
from pilot_jax.compare import statistics, tables
from pilot_jax.compare.page import _Results
from pilot_jax.config import FederationConfig, apply_overrides, parse_config
from pilot_jax.errors import InputError, Interrupted
from pilot_jax.evaluation import finetune, scores
from pilot_jax.evaluation.results import Result
from pilot_jax.federation.executor import Executor
from pilot_jax.federation.state import all_steps
from pilot_jax.federation.strategies import Strategy, make_strategy
from pilot_jax.report.page import _tiles
from pilot_jax.report.record import read_run
from pilot_jax.runs import restore, simulate
from pilot_jax.runs.checkpoint import adapters_sha256
from pilot_jax.runs.events import CompileClock
from pilot_jax.runs.progress import ProgressDisplay
from pilot_jax.runs.resume import Snapshots
from pilot_jax.testing.toy import (
    CLASSES,
    DESCENT,
    ROUNDS,
    run_toy,
    toy_clients,
    toy_federation,
    toy_numbers,
    toy_state,
)

STEPS, RATE = 4, DESCENT.lr_connector  # of fine-tuning; the rounds' phases have 3 steps


def settings(**changes):
    return ROUNDS.model_copy(update={"finetune_steps": STEPS, **changes})


def parameters(adapters):
    """Returns W, A, B and, if there is a private LoRA, A2 and B2 of a client, float64."""
    pairs = {"": adapters["text_adapter"], "2": adapters.get("private_adapter")}
    out = {"w": np.float64(adapters["projector"]["w"])}
    return out | {name + suffix: np.float64(pair["layers"]["q"][name][0])
                  for suffix, pair in pairs.items() if pair is not None for name in "ab"}


def descended(p, client, steps=STEPS, factor=1.0):
    """Returns the parameters after `steps` full-batch SGD steps at the rates factor·RATE·½(1 + cos(πi/steps))."""
    x, y = np.float64(client.features), client.train["target_ids"][:, 0]
    for i in range(steps):
        ba = sum(p["b" + s] @ p["a" + s] for s in ("", "2") if "b" + s in p)
        z = np.exp(x @ (p["w"] + ba).T)
        g = (z / z.sum(1, keepdims=True) - np.eye(CLASSES)[y]).T @ x / len(x)
        rate = factor * RATE * (1 + np.cos(np.pi * i / steps)) / 2
        new = {"w": p["w"] - rate * g}
        for s in ("", "2"):
            if "b" + s in p:
                new["b" + s], new["a" + s] = p["b" + s] - rate * g @ p["a" + s].T, p["a" + s] - rate * p["b" + s].T @ g
        p = new
    return p


def check(done, starts, factor=1.0):
    """Asserts that fine-tuned clients have the adapters of SGD from `starts`, and differ from these."""
    for state, client, start in zip(done.population, toy_clients(), starts, strict=True):
        want, got = descended(parameters(start), client, factor=factor), parameters(state.adapters)
        for key in want:
            np.testing.assert_allclose(got[key], want[key], atol=2e-6, err_msg=key)
        assert np.abs(got["w"] - parameters(start)["w"]).max() > 1e-2


def starting(fed, state):
    """Returns the adapters with which each client's fine-tuning must begin, by the meaning of the strategies' names."""
    if fed.strategy.name == "centralised":
        return [state.population[0].adapters] * 3
    model = state.server["model"] if fed.strategy.one_model else {}
    return [{**one.adapters, **model} for one in state.population]


@pytest.mark.parametrize("name", slow_except({"fedavg", "centralised"}, [
    "fedavg", "scaffold", "fedprox", "feddpa", "local", "centralised"]))
def test_finetuned_adapters_are_those_of_sgd_from_the_last_round(name):
    """FedProx's term and SCAFFOLD's controls do not change the steps, and each client has its own data."""
    fed = toy_federation(make_strategy(name), settings=settings())
    state = run_toy(fed)
    before = jax.tree.map(np.copy, [one.adapters for one in state.population])
    done, = finetune.finetune([fed], [state], Executor(client_chunk=2))
    check(done, starting(fed, state))
    assert [one.stage for one in done.population] == ["plain"] * 3 and done.client_steps == 3 * STEPS
    assert tree_max_difference(before, [one.adapters for one in state.population]) == 0
    after = finetune.after_finetuning(fed, state, done)
    assert after.population is state.population and after.client_steps == state.client_steps + 3 * STEPS
    assert (after.bytes_up, after.bytes_down, after.uploads) == (state.bytes_up, state.bytes_down, state.uploads)
    assert sum(all_steps(fed).values()) == after.client_steps


@pytest.mark.parametrize("name", slow_except({"local"}, ["fedavg", "local"]))
def test_clients_that_were_absent_start_from_the_servers_model_or_their_own(name):
    """c0 is absent in the last round, c2 in both; under `local`, c2 starts from the initial adapters."""
    fed = toy_federation(make_strategy(name), settings=FederationConfig(
        rounds=2, local_steps=3, finetune_steps=STEPS, participation=[
            {"round": 1, "clients": ["c0", "c1"]}, {"round": 2, "clients": ["c1"]}]))
    state = run_toy(fed)
    done, = finetune.finetune([fed], [state], Executor())
    check(done, starting(fed, state))
    assert [one.rounds for one in done.population] == [1, 2, 0]
    if name == "local":
        np.testing.assert_allclose(parameters(state.population[2].adapters)["w"], toy_numbers()["w"], atol=1e-7)


def test_fine_tuning_has_a_learning_rate_of_its_own():
    """Half the rounds' rates, which stay as they are; a client's own rates are halved too."""
    fed = toy_federation(make_strategy("fedavg"), settings=settings(finetune_rate=0.5))
    state, same = run_toy(fed), run_toy(toy_federation(make_strategy("fedavg"), settings=settings()))
    assert tree_max_difference([c.adapters for c in state.population], [c.adapters for c in same.population]) == 0
    done, = finetune.finetune([fed], [state], Executor())
    check(done, starting(fed, state), factor=0.5)
    train = parse_config({"train": {"lr_connector": 0.4, "clients": {"c1": {"lr_connector": 0.1}}}}, "c.yaml").train
    halved = dataclasses.replace(fed, train=train).finetuning().train
    assert (halved.lr_connector, halved.clients["c1"].lr_connector, halved.clients["c1"].lr_lora_stage1) == (
        0.2, 0.05, None)


def test_privacy_stragglers_and_attackers_are_those_of_rounds_alone():
    changes = {"privacy": {"clip": 0.1, "noise_multiplier": 3.0}, "stragglers": {"share": 1.0, "steps": 0.1}}
    noisy = FederationConfig(**settings().model_dump() | changes)
    fed = dataclasses.replace(toy_federation(make_strategy("fedavg"), settings=noisy), most_uploads=3,
                              tamper=lambda client, round_, upload, start: jax.tree.map(lambda x: x + 1, upload))
    state = toy_state(fed)
    done, = finetune.finetune([fed], [state], Executor())
    check(done, starting(fed, state))


def test_a_client_whose_result_is_not_finite_keeps_what_it_had():
    clients = list(toy_clients())
    clients[1] = dataclasses.replace(clients[1], train=clients[1].train | {
        "features": clients[1].train["features"] * np.float32(np.nan)})
    fed, seen = toy_federation(make_strategy("fedavg"), clients, settings()), Events()
    state = run_toy(fed)
    done, = finetune.finetune([fed], [state], Executor(), [seen])
    start = starting(fed, state)
    assert tree_max_difference(done.population[1].adapters, start[1]) == 0
    for k in (0, 2):
        want = descended(parameters(start[k]), clients[k])
        np.testing.assert_allclose(parameters(done.population[k].adapters)["w"], want["w"], atol=2e-6)
    (note,) = [event["text"] for event in seen.events if event["kind"] == "note"]
    assert note.startswith("warning: fine-tuning: the result of c1 is not finite") and "keeps the adapters" in note


def test_as_many_steps_as_a_phase_has_compile_nothing():
    fed = toy_federation(make_strategy("fedavg"), settings=settings(finetune_steps=ROUNDS.local_epochs))
    state, clock = run_toy(fed), CompileClock()
    finetune.finetune([fed], [state], Executor(client_chunk=2))
    assert clock.programs == 0
    longer = dataclasses.replace(fed, settings=settings(finetune_steps=ROUNDS.local_epochs + 8))
    finetune.finetune([longer], [state], Executor(client_chunk=2))
    clock.stop()
    assert clock.programs > 0


def test_federations_together_are_as_each_alone():
    """Seeds of one strategy train side by side; SCAFFOLD, with other adapters, and one that does not fine-tune too."""
    feds = [toy_federation(make_strategy(name), toy_clients(seed=seed), settings(finetune_steps=steps), seed=seed)
            for name, seed, steps in (("fedavg", 0, 4), ("scaffold", 1, 4), ("fedavg", 2, 4), ("fedavg", 3, None))]
    states = [run_toy(fed) for fed in feds]
    seen = [Events() for _ in feds]
    together = finetune.finetune(feds, states, Executor(client_chunk=4), seen)
    assert together[3] is None and finetune.after_finetuning(feds[3], states[3], None) is states[3]
    for fed, state, done in list(zip(feds, states, together, strict=True))[:3]:
        alone, = finetune.finetune([fed], [state], Executor(client_chunk=4))
        assert done.client_steps == alone.client_steps == 3 * STEPS
        for a, b in zip(alone.population, done.population, strict=True):
            assert tree_max_difference(a.adapters, b.adapters) <= 1e-6
    last = [event for event in seen[0].events if event["kind"] == "chunk"][-1]
    assert (last["phase"], last["clients"], last["of"]) == ("finetune", 3, 3)  # SCAFFOLD's, which come last


# Whole runs.


@pytest.fixture
def tuned(on_toy):
    return apply_overrides(on_toy, [f"federation.finetune_steps={STEPS}"])


def summed(evaluations, populations, split="test"):
    """Returns, as each client's score, the sum of W's first row in the model that answers for it."""
    return [{c.name: Result(float(population[model].adapters["projector"]["w"][0].sum()))
             for c, model in zip(one.clients, one.model_of_client, strict=True)}
            for one, population in zip(evaluations, populations, strict=True)]


def stripped(records):
    return [{k: v for k, v in record.items() if not k.endswith("seconds")} for record in records]


def test_finetuning_changes_neither_the_run_nor_its_bytes(on_toy, tuned, tmp_path):
    plain = simulate.simulate(on_toy)
    run = simulate.simulate(tuned, out=tmp_path / "run")
    for key in ("adapters_sha256", "bytes_up", "bytes_down", "quarantined"):
        assert run.summary[key] == plain.summary[key], key
    assert run.summary["client_steps"] == plain.summary["client_steps"] + 3 * STEPS
    added = run.records[len(plain.records):]
    assert stripped(run.records[:len(plain.records)]) == stripped(plain.records)
    assert [(r["round"], r["phase"], r["client"], r["step"]) for r in added] == [
        (2, "finetune", f"c{k}", STEPS) for k in range(3)]
    assert [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == run.records
    read = read_run(tmp_path / "run")
    assert [u["phase"] for u in read.updates[-3:]] == ["finetune"] * 3 and len(read.phases) == len(read.mixing) == 3


def test_fedavg_ft_ends_with_fedavgs_model_and_a_phase_more(on_toy, tmp_path):
    """Its saved models are FedAvg's after as many steps as a phase has, or `finetune_steps`."""
    fedavg = simulate.simulate(on_toy)
    for steps in (None, STEPS):
        config = apply_overrides(on_toy, ["strategy.name=fedavg_ft", f"federation.finetune_steps={steps or 'null'}"])
        run = simulate.simulate(config, out=tmp_path / f"{steps}")
        fed = fedavg.federation
        plain = dataclasses.replace(fed, settings=fed.settings.model_copy(update={"finetune_steps": steps or 3}))
        done, = finetune.finetune([plain], [run_toy(plain)], Executor(client_chunk=2))
        assert run.summary["adapters_sha256"] == adapters_sha256(fed.names, done.population)
        assert run.summary["adapters_sha256"] != fedavg.summary["adapters_sha256"]
        assert run.summary["bytes_up"] == fedavg.summary["bytes_up"]
        saved = restore.restore(tmp_path / f"{steps}").population
        for one, other in zip(saved, done.population, strict=True):
            assert tree_max_difference(one.adapters, other.adapters) == 0
            assert (one.stage, one.rounds) == ("plain", 2)

    class Both(Strategy):
        pools_data = finetunes = True

    with pytest.raises(InputError, match="pools all data into one client"):
        Both()


class Stops(Events):
    """Requests the end of the run at the `count`-th event of a kind; at a note, it raises `Interrupted` at once."""

    def __init__(self, count, kind="chunk", text=""):
        super().__init__()
        self.left, self.kind, self.text = count, kind, text

    def _add(self, kind, **event):
        super()._add(kind, **event)
        self.left -= kind == self.kind and self.text in event.get("text", "")
        if kind == "note" and not self.left:
            raise Interrupted(2)

    def stop_requested(self):
        return 0 if self.left > 0 else 2


@pytest.mark.parametrize(("stop", "save_every"), slow_except(
    {(7, "phase"), ("evaluating", "never")}, list(itertools.product((6, 7, 8, "evaluating"), ("phase", "never")))))
def test_an_interrupted_finetuning_begins_again(on_toy, tmp_path, stop, save_every):
    """The rounds have six chunks, and fine-tuning two. What is saved is the state after the last round."""
    config = apply_overrides(on_toy, ["strategy.name=fedavg_ft", f"system.save_every={save_every}"])
    whole, folder = simulate.simulate(config), tmp_path / "run"
    stops = Stops(stop) if isinstance(stop, int) else Stops(1, "note", stop)
    with pytest.raises(Interrupted):
        simulate.simulate(config, out=folder, observers=[stops])
    snapshots = Snapshots(folder / "checkpoints" / "resume", whole.federation.names, whole.federation.strategy.roles())
    state, extra = snapshots.load(toy_state(whole.federation), None, print, writing=False)
    fedavg = simulate.simulate(on_toy)
    assert adapters_sha256(whole.federation.names, state.population) == fedavg.summary["adapters_sha256"]
    assert state.partial is None and state.client_steps == fedavg.summary["client_steps"]
    assert b"finetune" not in (folder / "metrics.jsonl").read_bytes()[:extra["metrics"]["bytes"]]
    run = simulate.simulate(config, out=folder, resume=True)
    assert stripped(run.records) == stripped(whole.records)
    for key in ("adapters_sha256", "bytes_up", "bytes_down", "client_steps"):
        assert run.summary[key] == whole.summary[key], key


@pytest.mark.slow
@pytest.mark.parametrize("death", [(7, "chunk"), (1, "evaluating")])
def test_a_killed_finetuning_begins_again(tuned, tmp_path, death):
    """A kill leaves no trace of fine-tuning in the finished run, whose files are those of an undisturbed one."""
    class Dies(DiesAt):
        def note(self, text):
            self._add("evaluating" if "evaluating" in text else "note", text=text)

    config = apply_overrides(tuned, ["strategy.name=fedavg_ft"])
    simulate.simulate(config, out=tmp_path / "whole")
    with pytest.raises(Killed):
        simulate.simulate(config, out=tmp_path / "run", observers=[Dies(*death)])
    simulate.simulate(config, out=tmp_path / "run", resume=True)
    same_run(tmp_path / "whole", tmp_path / "run")


def test_with_a_store_few_clients_are_in_memory_at_a_time(tuned, tmp_path, monkeypatch):
    """Portions of two clients give the same models; progress counts all clients; nothing else stays in the store."""
    memory = simulate.simulate(apply_overrides(tuned, ["strategy.name=fedavg_ft"]))
    monkeypatch.setattr(finetune, "AT_ONCE", 2)
    seen = Events()
    disk = simulate.simulate(apply_overrides(tuned, ["strategy.name=fedavg_ft", f"system.store={tmp_path / 'store'}"]),
                             observers=[seen])
    assert disk.summary["adapters_sha256"] == memory.summary["adapters_sha256"]
    chunks = [event for event in seen.events if event["kind"] == "chunk" and event["phase"] == "finetune"]
    assert [(e["clients"], e["of"], e["steps"]) for e in chunks] == [(2, 3, 2 * STEPS), (3, 3, 3 * STEPS)]
    assert len(list(disk.federation.store.folder.glob("client-*"))) == 3


def test_progress_counts_the_finetuning(tuned, capsys):
    simulate.simulate(tuned, observers=[ProgressDisplay(mode="auto")])
    out = capsys.readouterr().out
    assert f"{27 + 3 * STEPS} client steps" in out and "round 2 finetune client 3/3 loss" in out
    assert "fine-tuning every client on its own data" in out


# Scores.


def run_scored(monkeypatch, config, *overrides):
    """Returns a run scored by `summed`, and how many populations were scored, the base's excluded."""
    asked = []

    def scored(evaluations, populations, split):
        asked.extend(populations)
        return summed(evaluations, populations)

    monkeypatch.setattr(scores, "results_together", scored)
    run = simulate.simulate(apply_overrides(config, list(overrides)))
    return run, len(asked)


def of_population(run):
    return {name: float(one.adapters["projector"]["w"][0].sum())
            for name, one in zip(run.federation.names, run.population, strict=True)}


def three(run):
    return tuple(run.summary[f"{key}_by_client"] for key in ("score_common", "score", "score_finetuned"))


def test_each_score_is_of_its_own_model(on_toy, tuned, monkeypatch):
    plain, asked = run_scored(monkeypatch, on_toy)
    common, own, after = three(plain)
    assert asked == 1 and common == own == of_population(plain) and after is None  # all have the server's model
    assert plain.summary["score_finetuned"] is plain.summary["score_finetuned_by_task"] is None
    run, asked = run_scored(monkeypatch, tuned)
    assert asked == 2 and three(run)[:2] == (common, own) and len(set(three(run)[2].values())) == 3
    for key, mean in (("score", "score_mean"), ("score_common", "score_common"), ("score_finetuned", ) * 2):
        by_client = run.summary[f"{key}_by_client"]
        assert run.summary[mean] == pytest.approx(np.mean(list(by_client.values())))
        assert run.summary[f"{key}_by_task"] == {
            "t0": pytest.approx((by_client["c0"] + by_client["c1"]) / 2), "t1": pytest.approx(by_client["c2"])}
    ended, asked = run_scored(monkeypatch, tuned, "strategy.name=fedavg_ft")
    assert asked == 2 and three(ended) == (common, three(run)[2], three(run)[2])
    assert of_population(ended) == three(run)[2]


def test_an_absent_client_has_another_model_than_the_common_one(on_toy, monkeypatch):
    run, asked = run_scored(monkeypatch, on_toy, "federation.participation=[{round: 2, clients: [c0, c1]}]")
    common, own, _ = three(run)
    assert asked == 2 and own == of_population(run)
    assert common["c0"] == own["c0"] == common["c2"] != own["c2"]


@pytest.mark.parametrize("name", slow_except({"local", "centralised", "feddpa"}, [
    "local", "centralised", "feddpa", "fedsa_lora"]))
def test_clients_with_parts_of_their_own_have_no_common_model(tuned, monkeypatch, name):
    run, asked = run_scored(monkeypatch, tuned, f"strategy.name={name}")
    common, own, after = three(run)
    assert asked == 2 and common is None and run.summary["score_common"] is None
    assert own.keys() == after.keys() == {"c0", "c1", "c2"} and len(set(after.values())) == 3
    assert len(set(own.values())) == (3 if name == "local" else 1)


@pytest.mark.slow
def test_the_terminal_and_the_report_show_the_scores_that_differ(on_toy, tuned, monkeypatch, capsys, tmp_path):
    def table(run):
        base = {f"score_base{suffix}": run.summary[f"score{other}"] for suffix, other in (
            ("", "_mean"), ("_by_task", "_by_task"), ("_by_client", "_by_client"))}
        print_scores(run.summary | base)
        return capsys.readouterr().out

    plain, run = (run_scored(monkeypatch, config)[0] for config in (on_toy, tuned))
    ended, _ = run_scored(monkeypatch, tuned, "strategy.name=fedavg_ft")
    assert "common" not in table(plain) and "fine-tuned" not in table(plain)
    assert "fine-tuned" in table(run) and "common" not in table(run)
    assert f"{run.summary['score_finetuned']:.3f}" in table(run)
    assert "common" in table(ended) and "fine-tuned" not in table(ended)
    simulate.simulate(tuned, out=tmp_path / "run")
    tiles = _tiles(read_run(tmp_path / "run"), None)
    assert tiles["after fine-tuning"] == f"{run.summary['score_finetuned']:.3f}"
    assert tiles["common model, without personal parts"] == f"{run.summary['score_common']:.3f}"


def seed(own, common=None, finetuned=None):
    return {"seed": 0, "diverged": False, "score_mean": own, "score_common": common, "score_finetuned": finetuned,
            "score_by_task": {"t": own}, "base_captions": None, "effective_neighbors": [1.0], "bytes_up": 0,
            "bytes_down": 0}


def results_of(rows):
    rows = {name: {"seeds": seeds, "wall_seconds": 1.0} for name, seeds in rows.items()}
    variants = [statistics.summarise(name, row) | {"rate_factor": 1.0} for name, row in rows.items()]
    return {"variants": variants, "base": {"score": 0.125, "base_captions": None}, "seeds": 2, "split": "test",
            "config": {"federation": {"rounds": 1}}, "seconds_of_all": 1.0, "seconds_of_tuning": 0.0}


def test_compares_columns():
    """A column is there where some variant has the score; a diverged seed counts as 0 in each."""
    results = results_of({"fedavg": [seed(0.25, 0.25, 0.75), seed(0.5, 0.5, 0.25)], "pilot": [seed(1.0)] * 2})
    json.dumps(_Results.model_validate(results, strict=True).model_dump())
    head, pilot, fedavg, base = tables.score_rows(results)
    assert head[:5] == ["", "common", "own", "fine-tuned", "t"] and all(len(r) == len(head) for r in (pilot, base))
    assert pilot[:4] == ["pilot", "–", "1.000 ± 0.000", "–"] and base[:5] == ["base model", "", "0.125", "", ""]
    assert fedavg[:4] == ["fedavg", "0.375 ± 0.125", "0.375 ± 0.125", "0.500 ± 0.250"]
    assert [line.split(":")[0] for line in tables.explanations(results)[:3]] == ["common", "own", "fine-tuned"]
    assert "| common | own | fine-tuned | t |" in tables.table(results)
    share = results_of({"pilot": [seed(1.0)] * 2, "fedavg": [{**seed(0.5), "token_accuracy": 0.75}] * 2})
    head, pilot, fedavg, _ = tables.score_rows(share)
    assert (head[2], pilot[2], fedavg[2]) == ("token accuracy", "–", "0.750 ± 0.000")
    alone = results_of({"pilot": [seed(1.0)] * 2})
    assert tables.score_rows(alone)[0][:3] == ["", "own", "t"]
    fell = {**seed(None), "diverged": True, "score_by_task": {}, "effective_neighbors": []}
    half = results_of({"fedavg": [seed(0.5, 0.5, 0.75), fell]})["variants"][0]
    assert (half["score"], half["common"]["score"], half["finetuned"]["score"]) == (0.25, 0.25, 0.375)
    for key in ("common", "finetuned", "token_accuracy"):
        del alone["variants"][0][key]  # as an earlier version wrote it
    assert tables.score_rows(alone)[0][:3] == ["", "own", "t"]
