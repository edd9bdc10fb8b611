"""Tests comparisons: seeds that train together, resumed comparisons, statistics, and participation of clients."""

from __future__ import annotations

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from conftest import Records, slow_except, small_config, tree_max_difference
from rich.console import Console

from pilot_jax.compare import runner, statistics, together, variants
from pilot_jax.compare.progress import VariantProgress
from pilot_jax.config import apply_overrides
from pilot_jax.embedded.scenarios import client_style, scenario_clients, scene_samples
from pilot_jax.errors import InputError
from pilot_jax.evaluation import personalised
from pilot_jax.federation import rounds
from pilot_jax.federation.cohort import participants
from pilot_jax.federation.executor import Executor, Work
from pilot_jax.federation.strategies import make_strategy
from pilot_jax.runs import prepare, simulate

SGD = {"optimizer": "sgd", "lr_connector": 0.02, "lr_lora_stage1": 0.02, "lr_lora_stage2": 0.02}


@pytest.fixture(scope="module")
def field():
    return runner.make_field(small_config(train=SGD), [0, 1], base_samples=3)


@pytest.mark.long
@pytest.mark.parametrize("name", ["pilot", "scaffold"])
def test_seeds_trained_together_equal_separate_runs(field, name):
    """Pilot and SCAFFOLD are the strategies whose clients receive subtrees that differ from seed to seed."""
    [variant] = variants.read_variants(name)
    setups = runner.setups_of(field, variant, [])
    states = together.run_all(setups)
    for seed, state in enumerate(states):
        setup = prepare.prepare(prepare.seeded(small_config(train=SGD, strategy={"name": name}), seed))
        fed = setup.federation
        alone = prepare.initial_state(fed)
        assert tree_max_difference(alone.population[0].adapters,
                                   prepare.initial_state(setups[seed].federation).population[0].adapters) == 0
        alone, = rounds.run_round([fed], [alone], setup.executor)
        for a, b in zip(alone.population, state.population, strict=True):
            assert tree_max_difference(a.adapters, b.adapters) <= 1e-5
        assert (alone.client_steps, alone.bytes_up, alone.bytes_down) == (
            state.client_steps, state.bytes_up, state.bytes_down)
    moved = tree_max_difference(states[0].population[0].adapters, states[1].population[0].adapters)
    assert moved > 1e-3  # the seeds differ
    scores = personalised.evaluate_together([s.evaluation for s in setups], [s.population for s in states])
    assert scores[1] == personalised.evaluate(setup.evaluation, alone.population)


@pytest.mark.slow
def test_federations_that_train_otherwise_are_refused(field):
    works = []
    for text in ("fedavg", "fedprox"):
        fed = runner.setups_of(field, variants.read_variants(text)[0], [])[0].federation
        works.append(Work(fed, {0: prepare.initial_adapters(fed)}, 1, "plain", "plain"))
    with pytest.raises(ValueError, match="must have equal phases"):
        Executor().train(works)


@pytest.mark.slow
def test_rates_are_no_part_of_the_program(field):
    """Learning rates, and settings that only the server reads, do not change the program of a phase."""
    def phase(text, stage):
        return runner.setups_of(field, variants.read_variants(text)[0], [])[0].federation.phase(stage)

    plain = phase("fedavg", "plain")
    for other in ("fedavg+train.lr_connector=3", "fedadam", "median", "local", "similarity", "fedavg+train.lambda_d=9"):
        assert phase(other, "plain") == plain and hash(phase(other, "plain")) == hash(plain), other
    for other in ("fedprox", "scaffold", "ffa_lora", "feddpa", "fedavg+train.warmup=0.5"):
        assert phase(other, "plain") != plain, other
    stage1 = phase("pilot", "stage1")
    assert phase("pilot-no_router_losses", "stage1") == stage1 == phase("pilot-ata_notes", "stage1")
    assert phase("pilot-no_difference_loss", "stage1") != stage1
    assert phase("pilot-no_router_losses", "stage2") != phase("pilot", "stage2")


def test_variants_are_read():
    names = [v.name for v in variants.read_variants("fedavg,ablations,fedavg")]
    assert names == ["fedavg", *(f"pilot-{n}" for n in variants.ABLATIONS)]
    [own] = variants.read_variants("pilot+strategy.ata.neighbors=1+train.lambda_d=0.5")
    changed = apply_overrides(small_config(), list(own.overrides))
    assert (changed.strategy.ata.neighbors, changed.train.lambda_d) == (1, 0.5) and own.family == "pilot"
    first, second = variants.read_variants("local+model.lora.targets=[q, v]+train.lr_connector=1e+2, fedavg")
    changed = apply_overrides(small_config(), list(first.overrides))
    assert (changed.model.lora.targets, changed.train.lr_connector) == (("q", "v"), 100) and second.name == "fedavg"
    for variant in variants.read_variants("all,ablations,ata"):
        apply_overrides(small_config(), list(variant.overrides))  # raises if an override is not a key of the config
    for bad in ("fedsgd", "pilot-no_such", "fedavg-no_difference_loss"):
        with pytest.raises(InputError, match="--strategies"):
            variants.read_variants(bad)


COMMAND = ["--strategies", "fedavg,local", "--seeds", 2, "--rates", "0.5,1"]


@pytest.mark.slow
def test_compare_writes_its_table_and_goes_on_where_it_stopped(tmp_path, call, monkeypatch):
    config = tmp_path / "c.yaml"
    config.write_text(small_config(data={"digits": {"train": 4}}, system={"client_chunk": "auto"}).to_yaml())
    calls = []
    real = runner.run_variant
    monkeypatch.setattr(runner, "run_variant", lambda field, variant, *rest: calls.append(variant.name)
                        or real(field, variant, *rest))
    out = tmp_path / "out"
    code, text, _ = call("compare", config, *COMMAND, "--out", out)
    assert code == 0 and calls == ["fedavg", "local"] and "9 clients at once, attention own" in text
    results = json.loads((out / "results.json").read_text())
    assert [v["name"] for v in results["variants"]] == ["fedavg", "local"]
    tried = [[*rate["validation"]] for rate in results["rates"].values()]
    # Of two factors the best is at an end, so that one beyond it is tried, and so on, three at most.
    assert all(one[:2] == ["0.5", "1"] and 2 < len(one) <= 5 for one in tried)
    assert results["factors"] == sorted({float(factor) for one in tried for factor in one})
    assert results["rows"]["local"]["seeds"][0]["bytes_up"] == 0 < results["rows"]["fedavg"]["seeds"][1]["bytes_up"]
    table = (out / "results.md").read_text()
    assert "| local |" in table and "*base model*" in table and "| fedavg |" in text
    assert "| most common answer | " in table and results["guesses"]["question"]["score"] <= 1
    assert results["margin"] == 0.02 and [list(v["differences"]) for v in results["variants"]] == [["local"], []]
    assert all(f"Warning: {warning}" in text and warning in table for warning in results["warnings"])
    assert (out / "results.png").stat().st_size > 1000
    (out / "variants" / "local.json").unlink()
    code, _, _ = call("compare", config, *COMMAND, "--out", out, "--against", "fedavg", "--margin", 0.5)
    assert code == 0 and calls == ["fedavg", "local", "local"]  # fedavg was not run again
    again = json.loads((out / "results.json").read_text())
    assert again["margin"] == 0.5 and list(again["variants"][1]["differences"]) == ["fedavg"]
    assert again["variants"][1]["score"] == results["variants"][1]["score"]
    for bad in (["--rates", "0.1,x"], ["--rates", "-1"], ["--split", "train"], ["--margin", "0"],
                ["--against", "fedavg,pilot"]):
        code, _, error = call("compare", config, "--strategies", "fedavg", *bad, "--out", tmp_path / "no")
        assert code == 2 and bad[0] in error and not (tmp_path / "no").exists()


def test_the_base_is_scored_again_only_where_what_it_depends_on_differs(tmp_path, monkeypatch):
    scored = []
    monkeypatch.setattr(runner.Comparison, "_field", lambda self, kind: None)
    monkeypatch.setattr(runner, "_score_base", lambda field, split: scored.append(split) or {"score": 0.5})
    options = runner.Options(seeds=1)

    def base(changed=options, **sections):
        runner.Comparison(small_config(**sections), changed, tmp_path, print).base()
        return len(scored)

    assert base() == 1
    assert base(train={"lr_connector": 0.3}, federation={"rounds": 7}, strategy={"name": "fedavg"}) == 1
    assert base(data={"digits": {"seed": 4}}) == 2
    assert base(eval={"batch_size": 5}) == 3
    assert base(dataclasses.replace(options, split="validation"), eval={"batch_size": 5}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedavg_ft", "centralised"])
def test_progress_ends_at_the_whole_of_training(field, name):
    """Its total has the steps of all seeds, of fine-tuning too, also where the data are pooled."""
    [variant] = variants.read_variants(name)
    lines = []
    runner.run_variant(field, variant, progress=VariantProgress(lines.append, every=0))
    *training, scoring = lines
    shares = [int(line.removeprefix(f"{name}: ").split("%")[0]) for line in training]
    assert shares == sorted(shares) and 0 < shares[0] < 100 == shares[-1] and "left" in training[0]
    assert scoring.startswith(f"{name}: trained in ") and scoring.endswith("scoring …")
    shown, silent = io.StringIO(), []
    console = Console(file=shown, force_terminal=True, width=100)
    runner.run_variant(field, variant, progress=VariantProgress(silent.append, console, every=0))
    assert "compiling" in shown.getvalue() and "scoring" in shown.getvalue() and silent == []


@pytest.mark.slow
def test_vary_compares_at_each_value(tmp_path, call):
    config, out = tmp_path / "c.yaml", tmp_path / "out"
    config.write_text(small_config(data={"digits": {"train": 4}}).to_yaml())
    ask = ["compare", config, "--strategies", "fedavg,local", "--seeds", 1, "--out", out]
    code, text, _ = call(*ask, "--vary", "train.lr_connector=0.01,0.02")
    assert code == 0
    header, _, fedavg, local = text.strip().splitlines()[-5:-1]
    assert header == "|  | train.lr_connector = 0.01 | train.lr_connector = 0.02 |"
    assert fedavg.startswith("| fedavg |") and local.startswith("| local |")
    sweep = json.loads((out / "sweep.json").read_text())
    assert [v["value"] for v in sweep["values"]] == ["0.01", "0.02"]
    for value in sweep["values"]:
        alone = json.loads((out / value["value"] / "results.json").read_text())
        assert alone["config"]["train"]["lr_connector"] == float(value["value"])
        assert value["variants"] == alone["variants"]
    assert (out / "sweep.png").stat().st_size > 1000 and "fedavg" in (out / "sweep.md").read_text()
    for bad in ("data.digits.train", "data.digits.trian=4", "data.digits.train=4,x"):
        code, _, error = call(*ask[:-1], tmp_path / "no", "--vary", bad)
        assert code == 2 and "data.digits" in error and not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_seed_that_diverges_is_reported_and_the_others_go_on(field):
    [variant] = variants.read_variants("fedavg")
    setups = runner.setups_of(field, variant, [])
    feds = [setup.federation for setup in setups]
    broken = [dataclasses.replace(c, train=c.train | {"features": np.asarray(c.train["features"]) * np.nan})
              for c in feds[0].clients]
    feds[0] = dataclasses.replace(feds[0], clients=tuple(broken))
    feds[1] = dataclasses.replace(feds[1], clients=(broken[0], *feds[1].clients[1:]))
    states = together.run_all([dataclasses.replace(s, federation=f) for s, f in zip(setups, feds, strict=True)])
    assert states[0] is None and states[1].client_steps > 0 and states[1].quarantined == 1


@pytest.mark.slow
def test_evaluation_matrix(field):
    """The diagonal has the usual scores, and every model is scored on the pretraining captions."""
    [variant] = variants.read_variants("fedavg")
    setup = runner.setups_of(field, variant, [])[0]
    state = together.run_all([setup])[0]
    whole = personalised.evaluation_matrix(setup.evaluation, state.population)
    own = personalised.evaluate(setup.evaluation, state.population)
    assert np.diag(whole["scores"]).tolist() == [own[name] for name in whole["clients"]]
    assert np.shape(whole["scores"]) == (9, 9) and set(whole["by_task"]["vqa_0"]) == {"vqa", "ocr", "caption"}
    assert whole["by_task"]["vqa_0"]["ocr"] == pytest.approx(np.mean(whole["scores"][6][3:6]))
    assert len(whole["base_captions"]["clients"]) == 9
    first, *others = setup.evaluation.clients  # without test data, a client's column is empty, and nothing else
    bare = dataclasses.replace(setup.evaluation, clients=(dataclasses.replace(first, evaluation={}), *others))
    part = personalised.evaluation_matrix(bare, state.population)
    assert [row[0] for row in part["scores"]] == [None] * 9
    assert [row[1:] for row in part["scores"]] == [row[1:] for row in whole["scores"]]
    captions = [i for i, c in enumerate(others, 1) if c.task == first.task]
    assert part["by_task"]["vqa_0"][first.task] == pytest.approx(np.mean([whole["scores"][6][i] for i in captions]))
    with pytest.raises(InputError, match="no client has test samples"):
        personalised.evaluation_matrix(dataclasses.replace(bare, clients=tuple(
            dataclasses.replace(c, evaluation={}) for c in (*others, first))), state.population)


@pytest.mark.parametrize("name", slow_except((), ["fedavg", "fedavg_ft", "pilot"], {"fedavg", "fedavg_ft"}))
def test_variants_with_finetuning_have_all_their_scores(field, name):
    """Seeds that are fine-tuned together have the scores and, under fedavg_ft, the models of separate runs."""
    [variant] = variants.read_variants(f"{name}+federation.finetune_steps=2")
    row = runner.run_variant(field, variant)
    for seed, record in enumerate(row["seeds"]):
        config = small_config(train=SGD, strategy={"name": name}, federation={"finetune_steps": 2})
        alone = simulate.simulate(prepare.seeded(config, seed)).summary
        for key in ("client_steps", "bytes_up", "bytes_down"):
            assert record[key] == alone[key], key
        for key in ("score", "score_common", "score_finetuned"):
            assert record[f"{key}_by_client"] == alone[f"{key}_by_client"], key
    assert (row["seeds"][0]["score_common"] is None) == (name == "pilot")
    line = statistics.summarise(name, row)
    assert (line["common"] is None) == (name == "pilot") and line["finetuned"]["score"] is not None
    assert runner.tune(field, variant, [1.0], small_config(train=SGD))["factor"] == 1.0


@pytest.mark.slow
def test_centralised_has_one_model_for_all(field):
    [variant] = variants.read_variants("centralised")
    setup = runner.setups_of(field, variant, [])[0]
    fed, examined = setup.federation, setup.evaluation.clients
    assert [c.name for c in fed.clients] == ["pooled"] and len(examined) == 9
    assert setup.evaluation.model_of_client == (0,) * 9 and setup.evaluation.fed is fed
    assert fed.clients[0].size == sum(c.size for c in examined)
    assert fed.full_steps(0) == 9 * 2  # local_steps is 2: as many batches as nine clients take together
    sums = sum(c.train["target_weights"].sum() for c in examined)
    assert fed.clients[0].train["target_weights"].sum() == sums
    back = prepare.with_strategy(setup, make_strategy("local"))
    assert back.federation.clients == examined and back.evaluation.model_of_client == tuple(range(9))
    assert back.federation.full_steps(0) == 2


# Participation of clients in rounds.


@pytest.mark.slow
def test_dropouts_newcomers_and_stragglers(setup):
    names = tuple(f"c{i}" for i in range(10))

    def drawn(rounds, **settings):
        settings = small_config(federation=settings).federation
        return [participants(settings, names, r, 0) for r in rounds]

    every = drawn(range(1, 101), dropout=0.4)
    assert every == drawn(range(1, 101), dropout=0.4)
    assert np.mean([len(d) for d in every]) == pytest.approx(6, abs=0.5)
    assert all(len(d) >= 1 for d in drawn(range(1, 30), dropout=0.99))
    late = {"joins": {"c3": 3}, "clients_per_round": 9}
    assert [3 in d for d in drawn((1, 2), **late)] == [False, False]
    assert any(3 in d for d in drawn(range(3, 9), **late))
    with pytest.raises(InputError, match="joins: unknown client 'zz'"):
        drawn([1], joins={"zz": 2})
    with pytest.raises(InputError, match="no client has joined by round 1"):
        drawn([1], joins={n: 2 for n in names})
    config = small_config(federation={"local_steps": 8, "stragglers": {"share": 0.5, "steps": 0.3}})
    slow = prepare.with_strategy(setup, make_strategy("local"), config).federation
    steps = [slow.steps(c, r) for c in range(9) for r in range(1, 41)]
    assert set(steps) == {8, 3} and np.mean(np.asarray(steps) == 3) == pytest.approx(0.5, abs=0.1)
    assert slow.full_steps(0) == 8
    observer = Records()
    rounds.run_round([slow], [prepare.initial_state(slow)], setup.executor, [observer])
    assert {r["step"] for r in observer.records if "step" in r} == {8, 3}


def test_heterogeneity_dial():
    """With 0 the clients of a task have the same style and wording, with 1 their own, and in between a mixture."""
    def questions(h):
        specs = [s for s in scenario_clients("a", 40, 1, 1, h) if s.name in ("ocr_0", "ocr_1")]
        by_client = {}
        for sample in scene_samples(specs, 0):
            by_client.setdefault(sample.client, []).append(sample.turns[0][1])
        return by_client

    first = "<image>\nread the digits."
    assert set(questions(0.0)["ocr_1"]) == {first}
    assert set(questions(1.0)["ocr_1"]) == {"<image>\nwhat is written here?"}
    assert 0.2 < np.mean([q == first for q in questions(0.5)["ocr_1"]]) < 0.8
    assert dataclasses.replace(client_style(3, 0.0), wording=0, own_wording=1.0) == client_style(0)
    assert client_style(1, 0.5).rotation == 7.0
    default, full = ([np.asarray(s.image) for s in scene_samples(scenario_clients("a", 2, 1, 1, *h), 0)]
                     for h in ((), (1.0,)))
    assert jax.tree.all(jax.tree.map(np.array_equal, default, full))
