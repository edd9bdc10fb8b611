"""Tests of whole rounds: schedule, partial participation, determinism, and the run directory."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import Records, small_config, tree_max_difference

from pilot_jax.evaluation import personalised
from pilot_jax.federation import rounds
from pilot_jax.federation.client import local_update
from pilot_jax.federation.cohort import Cohort, participants
from pilot_jax.federation.randomness import client_generator
from pilot_jax.federation.strategies import make_strategy
from pilot_jax.runs import prepare, restore, simulate
from pilot_jax.runs.events import CompileClock


def fake_uploads(cohort_size, seed=0):
    rng = np.random.default_rng(seed)
    mlp = lambda: {"linear_1": {"kernel": rng.normal(size=(cohort_size, 3, 4)).astype(np.float32)}}  # noqa: E731
    return {"task": mlp(), "text_adapter": {"layers": {"q": {
        "a": rng.normal(size=(cohort_size, 1, 2, 4)).astype(np.float32),
        "b": rng.normal(size=(cohort_size, 1, 4, 2)).astype(np.float32)}}}}


def kernel(tree):
    return np.asarray(tree["linear_1"]["kernel"])


@pytest.fixture
def pilot():
    strategy = make_strategy("pilot")
    bank = {"linear_1": {"kernel": np.zeros((2, 3, 4), np.float32)}}
    return strategy, {"bank": bank, "members": {}}


@pytest.mark.slow
def test_a_task_without_participants_keeps_its_adapter(pilot):
    strategy, state = pilot
    up = fake_uploads(2)
    out = strategy.aggregate(Cohort(up, np.asarray([1, 3]), np.asarray([1, 1]), np.asarray([4, 7]), 1), state)
    np.testing.assert_array_equal(kernel(out.downloads["task_bank"])[0], 0)
    expected = np.average(kernel(up["task"]), axis=0, weights=[1, 3])
    np.testing.assert_allclose(kernel(out.downloads["task_bank"])[1], expected, atol=1e-6)


@pytest.mark.slow
def test_a_lone_newcomer_does_not_overwrite_its_task(pilot):
    strategy, state = pilot
    first = fake_uploads(2, 1)
    out = strategy.aggregate(Cohort(first, np.asarray([10, 30]), np.asarray([0, 0]), np.asarray([0, 1]), 1), state)
    for phase_seed in (2, 3):  # both phases of the newcomer's round
        lone = fake_uploads(1, phase_seed)
        out = strategy.aggregate(Cohort(lone, np.asarray([20]), np.asarray([0]), np.asarray([2]), 2), out.server)
        expected = np.average(np.concatenate([kernel(first["task"]), kernel(lone["task"])]), axis=0,
                              weights=[10, 30, 20])
        np.testing.assert_allclose(kernel(out.downloads["task_bank"])[0], expected, atol=1e-6)
        np.testing.assert_array_equal(out.mixing["weights"], [[1.0]])
    # With an earlier participant in the cohort, the mean is over the cohort's clients, as in any round.
    both = fake_uploads(2, 4)
    out = strategy.aggregate(Cohort(both, np.asarray([10, 20]), np.asarray([0, 0]), np.asarray([0, 2]), 3), out.server)
    np.testing.assert_allclose(kernel(out.downloads["task_bank"])[0],
                               np.average(kernel(both["task"]), axis=0, weights=[10, 20]), atol=1e-6)


@pytest.fixture(scope="module")
def three_rounds():
    """Runs caption_0 and vqa_0 in round 1, caption_0 and the new client ocr_0 in round 2, and vqa_0 in round 3."""
    config = small_config(federation={"rounds": 3, "local_steps": 1, "participation": [
        {"round": 1, "clients": ["caption_0", "vqa_0"]}, {"round": 2, "clients": ["caption_0", "ocr_0"]},
        {"round": 3, "clients": ["vqa_0"]}]}, system={"client_chunk": 2})
    setup = prepare.prepare(config)
    fed = setup.federation
    states, phases = [prepare.initial_state(fed)], []
    for _ in range(3):
        records = Records()
        states += rounds.run_round([fed], states[-1:], setup.executor, [records])
        phases.append([(r["phase"], r["client"]) for r in records.records if "client" in r])
    return fed, states, phases


@pytest.mark.slow
def test_schedule_first_time(three_rounds):
    """A client trains stage 1 once, in its first round, and stage 2 in every round in which it takes part."""
    _, _, phases = three_rounds
    assert phases[0] == [("stage1", "caption_0"), ("stage1", "vqa_0"), ("stage2", "caption_0"), ("stage2", "vqa_0")]
    assert phases[1] == [("stage1", "ocr_0"), ("stage2", "caption_0"), ("stage2", "ocr_0")]
    assert phases[2] == [("stage2", "vqa_0")]


@pytest.mark.long
def test_compilations_are_few_and_early():
    """In four rounds with two length buckets, a stage and a bucket have one program, and round 2 compiles the last."""
    setup = prepare.prepare(small_config(federation={"local_steps": 1}, system={"length_spread": 1.2},
                                         train={"batch_size": 3}))  # of no other test, so not compiled yet
    fed = setup.federation
    buckets = {(c.train["input_ids"].shape[1], c.train["target_ids"].shape[1]) for c in fed.clients}
    assert len(buckets) == 2
    before, clock, programs = local_update._cache_size(), CompileClock(), []
    state = prepare.initial_state(fed)
    for _ in range(4):
        state, = rounds.run_round([fed], [state], setup.executor)
        programs.append(clock.programs)
    clock.stop()
    assert local_update._cache_size() - before == 2 * len(buckets)  # stage 1 and stage 2
    assert programs[0] > 0
    assert programs[1] == programs[2] == programs[3]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.slow
def test_absent_clients_keep_what_they_have_and_fetch_the_bank_on_return(three_rounds):
    fed, states, _ = three_rounds
    names = [c.name for c in fed.clients]
    vqa, ocr, idle = names.index("vqa_0"), names.index("ocr_0"), names.index("ocr_1")
    after = [s.population for s in states]
    assert same(after[1][vqa].adapters, after[2][vqa].adapters)  # absent in round 2
    assert not same(after[2][vqa].adapters["task_bank"], states[2].server["bank"])
    assert same(after[3][vqa].adapters["task_bank"], states[3].server["bank"])  # back in round 3
    # ocr_0 changed the bank in round 2; vqa_0 downloads it in round 3.
    slot = fed.tasks.index("ocr")
    pick = lambda bank: jax.tree.map(lambda leaf: leaf[slot], bank)  # noqa: E731
    assert same(pick(after[3][vqa].adapters["task_bank"]), after[2][ocr].adapters["task"])
    assert after[3][idle].is_new and same(after[3][idle].adapters, states[0].population[idle].adapters)
    # Stage 2 does not change ψ_s.
    assert same(after[1][vqa].adapters["client"], after[3][vqa].adapters["client"])


@pytest.mark.slow
def test_bytes_count_what_a_returning_client_fetches(three_rounds):
    fed, states, _ = three_rounds
    up, down = fed.strategy.sent_bytes(states[0].population[0].adapters)
    per_phase_up, per_phase_down, bank = sum(up.values()), sum(down.values()), down["task_bank"]
    assert states[1].bytes_up == 4 * per_phase_up and states[1].bytes_down == 4 * per_phase_down
    # Round 2 has three client phases; ocr_0 downloads the bank at its start, and caption_0 after stage 1 changed it.
    assert states[2].bytes_down - states[1].bytes_down == 3 * per_phase_down + 2 * bank
    assert states[3].bytes_down - states[2].bytes_down == per_phase_down + bank


def test_every_round_schedule():
    strategy = make_strategy("pilot", schedule="every_round")
    assert strategy.stages(True, 1) == strategy.stages(False, 4) == ("stage1", "stage2")
    baseline = make_strategy("fedavg")
    assert [len(baseline.stages(new, r)) for new, r in ((True, 1), (False, 2), (True, 3))] == [2, 1, 1]


def test_cohorts_are_seeded_and_streams_are_each_clients_own():
    names = tuple(f"c{i}" for i in range(20))
    settings = small_config(federation={"clients_per_round": 5}).federation
    drawn = [tuple(participants(settings, names, r, 0)) for r in (1, 2, 3)]
    assert len(set(drawn)) == 3 and all(len(set(d)) == 5 for d in drawn)
    assert drawn == [tuple(participants(settings, names, r, 0)) for r in (1, 2, 3)]
    assert drawn != [tuple(participants(settings, names, r, 1)) for r in (1, 2, 3)]
    streams = {(c, r, p): client_generator(0, c, r, p).integers(1 << 60)
               for c in ("c0", "c1") for r in (1, 2) for p in ("stage1", "stage2")}
    assert len(set(streams.values())) == 8
    assert client_generator(0, "c1", 2, "stage2").integers(1 << 60) == streams["c1", 2, "stage2"]


@pytest.mark.long
def test_chunk_size_does_not_change_a_round():
    results = []
    for chunk in (2, 9):
        config = small_config(system={"client_chunk": chunk}, train={"optimizer": "sgd", "lr_connector": 0.02,
                              "lr_lora_stage1": 0.02, "lr_lora_stage2": 0.02})
        setup = prepare.prepare(config)
        state, = rounds.run_round([setup.federation], [prepare.initial_state(setup.federation)], setup.executor)
        results.append([c.adapters for c in state.population])
    assert tree_max_difference(*results) <= 1e-5


SUMMARY_KEYS = {"strategy", "seed", "rounds", "clients", "tasks", "score_mean", "score_by_task", "score_by_client",
                "score_base", "bytes_up", "bytes_down", "client_steps", "client_steps_per_second", "wall_seconds",
                "compile_seconds", "peak_memory_bytes", "memory_bytes", "adapters_sha256"}


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    config = small_config(federation={"rounds": 2, "local_steps": 1}, eval={"every": 1})
    folders = [tmp_path_factory.mktemp("runs") / name for name in ("one", "two")]
    return folders, [simulate.simulate(config, out=f) for f in folders]


@pytest.mark.slow
def test_same_seed_gives_identical_runs(two_runs):
    _, (one, two) = two_runs
    assert one.summary["adapters_sha256"] == two.summary["adapters_sha256"]
    assert one.summary["score_by_client"] == two.summary["score_by_client"]
    for a, b in zip(one.population, two.population, strict=True):
        assert same(a.adapters, b.adapters)


@pytest.mark.slow
def test_run_directory(two_runs):
    (folder, _), (run, _) = two_runs
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) >= SUMMARY_KEYS and summary == run.summary
    assert summary["client_steps"] == 9 * 3 and len(summary["clients"]) == 9
    assert summary["score_mean"] == pytest.approx(np.mean(list(summary["score_by_client"].values())))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert records == run.records
    assert all(np.isfinite(r["effective_neighbors"]) for r in records if "bytes_up" in r)
    assert {f.name for f in (folder / "mixing").iterdir()} == {
        "round_0001_stage1.npz", "round_0001_stage2.npz", "round_0002_stage2.npz"}
    with np.load(folder / "mixing" / "round_0002_stage2.npz") as saved:
        assert {"distances", "weights", "client_ids", "effective_neighbors"} <= set(saved)
        np.testing.assert_allclose(saved["weights"].sum(1), 1, atol=1e-5)
        assert saved["client_ids"].tolist() == summary["clients"]


@pytest.mark.slow
def test_checkpoints_hold_what_their_place_allows_and_restore(two_runs):
    import orbax.checkpoint as ocp

    (folder, _), (run, _) = two_runs
    with ocp.PyTreeCheckpointer() as checkpointer:
        server = checkpointer.restore((folder / "checkpoints" / "server").absolute())
        client = checkpointer.restore((folder / "checkpoints" / "clients" / "ocr_1").absolute())
    assert {n for name, tree in server.items() if name != "%" for n in tree} == {"text_adapter", "task"}
    assert set(client) - {"%"} == {"client", "task_bank", "cross_task", "router"}
    written = (folder / "config.yaml").read_text()
    assert "attention: own" in written
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").unlink()
    (folder / "config.yaml").write_text(written.replace("attention: own", "attention: cudnn"))  # trained on a GPU
    back = restore.restore(folder)
    (folder / "config.yaml").write_text(written)
    (folder / "manifest.json").write_text(manifest)
    for a, b in zip(run.population, back.population, strict=True):
        assert same(a.adapters, b.adapters) and (a.stage, a.rounds) == (b.stage, b.rounds)
    assert personalised.evaluate(back.evaluation, back.population) == run.summary["score_by_client"]


@pytest.mark.long
def test_a_strategy_object_of_ones_own(another_process):
    from pilot_jax.federation import mixing
    from pilot_jax.federation.cohort import Aggregated
    from pilot_jax.federation.strategies import Strategy


    class Median(Strategy):
        """A user's strategy: all clients receive the coordinate-wise median."""

        def aggregate(self, cohort, server):
            middle = jax.tree.map(lambda x: np.broadcast_to(np.median(x, axis=0), x.shape), dict(cohort.uploads))
            return Aggregated(middle, dict(server), {"weights": np.asarray(mixing.mean(cohort.sizes))})

    run = simulate.simulate(small_config(federation={"local_steps": 1}), strategy=Median())
    assert run.summary["strategy"] == f"{__name__}:{Median.__qualname__}"  # not the package's own "median"
    assert same(run.population[0].adapters, run.population[5].adapters)


def test_evaluation_of_a_client_that_never_took_part_is_the_base():
    config = small_config(federation={"local_steps": 1, "participation": [{"round": 1, "clients": ["vqa_0"]}]})
    fed = prepare.prepare(config).federation
    state = prepare.initial_state(fed)
    asked = fed.clients[0].evaluation["test"], fed.clients[0].task
    assert personalised.examinee(fed, 0, state.population[0], *asked).stage == "plain"
    moved = dataclasses.replace(state.population[0], stage="stage2", rounds=1)
    assert set(personalised.examinee(fed, 0, moved, *asked).adapters) == {
        "text_adapter", "task", "client", "task_bank", "cross_task", "router"}


@pytest.mark.long
@pytest.mark.parametrize("name", ["pilot", "scaffold"])
def test_steps_in_portions_are_the_same_steps(tmp_path, name):
    """With `system.steps_at_once`, 5 steps as 2 + 2 + 1 give the same adapters and records, with clients in memory and
    on disk."""
    sections = {"strategy": {"name": name}, "federation": {"local_steps": 5}, "train": {"adam_epsilon": 1e-3}}
    whole = simulate.simulate(small_config(**sections))
    for system in ({}, {"store": str(tmp_path)}):
        parts = simulate.simulate(small_config(**sections, system={"steps_at_once": 2} | system))
        for a, b in zip(whole.population, parts.population, strict=True):
            for x, y in zip(jax.tree.leaves(a.adapters), jax.tree.leaves(b.adapters), strict=True):
                np.testing.assert_allclose(x, y, atol=1e-6)
        for one, two in zip(whole.records, parts.records, strict=True):
            assert {k: v for k, v in one.items() if isinstance(v, str | int)} == {
                k: v for k, v in two.items() if isinstance(v, str | int)}
            assert abs(one["loss"] - two["loss"]) < 1e-5
