"""Tests of every strategy against its paper's update in NumPy float64, on softmax regression with LoRA."""

from __future__ import annotations

import dataclasses
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import numpy_federation
import pytest
from conftest import Records, slow_except, small_config, tree_max_difference
from numpy_federation import (
    adaptive,
    by_svd,
    centralised,
    federated,
    finetuned,
    gradient,
    momentum,
    numbers,
    problem,
    rotated,
    scaffold,
    similarity,
    stacked,
    trimmed,
    with_residual,
    with_server,
)

import pilot_jax
from pilot_jax.config import (
    FederationConfig,
)
from pilot_jax.errors import InputError
from pilot_jax.federation import executor, mixing, rounds
from pilot_jax.federation.cohort import Cohort
from pilot_jax.federation.observer import RunObserver
from pilot_jax.federation.state import stack
from pilot_jax.federation.strategies import STRATEGIES, make_strategy
from pilot_jax.runs import prepare
from pilot_jax.testing import toy
from pilot_jax.testing.phases import train_phase
from pilot_jax.testing.toy import (
    CLASSES,
    FEATURES,
    RANK,
    SIZES,
    run_toy,
    toy_adapters,
    toy_clients,
    toy_federation,
    toy_numbers,
    toy_state,
)

SERVER = {"server": {"learning_rate": 0.03, "momentum": 0.8, "beta2": 0.7, "tau": 0.01}}
CASES = {
    "local": ({}, lambda d: federated(d, shared="")),
    "centralised": ({}, centralised),
    "fedavg": ({}, federated),
    "fedavg_ft": ({}, lambda d: finetuned(federated(d), d)),
    "fedprox": ({"prox_mu": 0.7}, lambda d: federated(
        d, correct=lambda g, p, begin: {k: g[k] + 0.7 * (p[k] - begin[k]) for k in g})),
    "fedavgm": ({"server": {"learning_rate": 0.5, "momentum": 0.9}}, lambda d: federated(d, with_server(momentum))),
    "fedadam": (SERVER, lambda d: federated(d, with_server(adaptive(lambda v, s: 0.7 * v + 0.3 * s)))),
    "fedyogi": (SERVER, lambda d: federated(d, with_server(adaptive(lambda v, s: v - 0.3 * s * np.sign(v - s))))),
    "fedadagrad": (SERVER, lambda d: federated(d, with_server(adaptive(lambda v, s: v + s)))),
    "scaffold": ({}, scaffold),
    "ffa_lora": ({}, lambda d: federated(d, shared="wb", trained="wb")),
    "fedsa_lora": ({}, lambda d: federated(d, shared="wa")),
    "feddpa": ({}, lambda d: federated(d, trained=("w", "a", "b", "a2", "b2"), private=True)),
    "similarity": ({"similarity_temperature": 0.5}, similarity),
    "flexlora": ({}, lambda d: federated(d, by_svd)),
    "fedrot_lora": ({}, lambda d: federated(d, rotated())),
    "fedex_lora": ({}, lambda d: federated(d, with_residual)),
    "flora": ({}, lambda d: federated(d, stacked())),
    "median": ({}, lambda d: federated(d, lambda ups, _: {k: np.median([u[k] for u in ups], axis=0) for k in ups[0]})),
    "trimmed_mean": ({"trim": 0.34}, lambda d: federated(d, trimmed)),
}


# Pilot's parts are in test_mixing, test_losses, test_roles and test_rounds, the others in test_halves,
# test_personal_strategies and test_expert_strategies.
ELSEWHERE = {"pilot", "split_half", "pilot_split_half", "fedalt", "fedlease", "ditto", "fedamp", "fedmosaic", "rolora"}


def run(name, **settings):
    """Runs the package's rounds on the toy and returns every client's final parameters."""
    state = run_toy(toy_federation(make_strategy(name, settings)))
    return [numbers(c.adapters) for c in state.population]


def test_every_strategy_is_here():
    packages = {name for name, strategy in STRATEGIES.items() if strategy.__module__.startswith("pilot_jax.")}
    assert set(CASES) == packages - ELSEWHERE


@pytest.mark.parametrize("name", CASES)
def test_against_the_papers_own_update(name):
    settings, expected = CASES[name]
    data = problem()
    ours, theirs = run(name, **settings), expected(data)
    for got, want in zip(ours, theirs, strict=True):
        for key in got:
            np.testing.assert_allclose(got[key], want[key], atol=2e-5, err_msg=key)
    begin = toy_numbers()
    assert all(np.abs(got["w"] - begin["w"]).max() > 1e-2 for got in ours)
    if name not in ("fedavg", "centralised"):  # each result differs from FedAvg's by far more than the tolerance
        plain = federated(data)
        assert max(np.abs(got[k] - want[k]).max() for got, want in zip(ours, plain, strict=True) for k in "wab") > 1e-3


@pytest.mark.parametrize("name", slow_except({"fedavg", "scaffold", "fedsa_lora"}, CASES))
def test_lora_without_the_projector(name, monkeypatch):
    """With a frozen projector, the NumPy loops with gradient 0 for w agree, and w is neither held nor uploaded."""
    settings, expected = CASES[name]
    fed = toy_federation(make_strategy(name, {**settings, "projector": "frozen"}))
    state = run_toy(fed)
    whole = gradient
    monkeypatch.setattr(numpy_federation, "gradient", lambda p, x, y: whole(p, x, y) | {"w": np.zeros_like(p["w"])})
    for client, want in zip(state.population, expected(problem()), strict=True):
        assert "projector" not in client.adapters
        got = numbers(client.adapters)
        for key in got:
            np.testing.assert_allclose(got[key], want[key], atol=2e-5, err_msg=key)
        assert np.abs(got["b"] - toy_numbers()["b"]).max() > 1e-2
    up, down = fed.strategy.sent_bytes(state.population[0].adapters)
    lora = 4 * RANK * (FEATURES + CLASSES)
    share = {"local": 0, "centralised": 0, "scaffold": 2, "ffa_lora": CLASSES / (FEATURES + CLASSES),
             "fedsa_lora": FEATURES / (FEATURES + CLASSES)}.get(name, 1)  # SCAFFOLD's control is as large as LoRA
    assert sum(up.values()) == sum(down.values()) == lora * share


def test_pilot_needs_its_projector():
    with pytest.raises(InputError, match=r"strategy\.projector: frozen, but pilot trains task, client, .*Set it to "
                       "trained, or use a strategy that can train LoRA alone: .*fedavg, .*scaffold"):
        make_strategy("pilot", {"projector": "frozen"}).for_base(takes_images=True)
    for name in CASES:
        assert make_strategy(name).for_base(takes_images=False).params.projector == "frozen"
        assert make_strategy(name).for_base(takes_images=True).params.projector == "trained"


def test_absent_clients_keep_their_control():
    """If one client is absent, SCAFFOLD's c changes by the data share of the cohort."""
    strategy, tasks = make_strategy("scaffold"), np.asarray([0, 0, 1])
    adapters = toy_adapters(strategy)
    server = strategy.initial_server_state(adapters, np.asarray(SIZES), tasks)
    ones = jax.tree.map(lambda x: np.ones((2, *x.shape), np.float32), adapters["control_change"])
    uploads = {n: jax.tree.map(lambda x: np.stack([x, x]), adapters[n]) for n in ("text_adapter", "projector")}
    out = strategy.aggregate(Cohort({**uploads, "control_change": ones}, np.asarray(SIZES[:2]), tasks[:2],
                                    np.arange(2), 1), server)
    for leaf in jax.tree.leaves(out.server["control"]):
        np.testing.assert_allclose(leaf, (4 + 8) / 18, atol=1e-6)


@pytest.mark.slow
def test_fedavg_with_one_sgd_step_is_centralised_sgd(setup):
    """For equal counts of supervised tokens and one local step, the mean of the steps is the step on pooled data."""
    def one_step(name, batch_size):
        config = small_config(strategy={"name": name}, federation={"local_steps": None}, train={
            "optimizer": "sgd", "lr_connector": 0.1, "lr_lora_stage1": 0.1, "batch_size": batch_size})
        return prepare.with_strategy(few, make_strategy(config.strategy), config).federation

    clients = tuple(dataclasses.replace(c, train={k: v[:3] for k, v in c.train.items()} | {
        "target_weights": np.concatenate([np.ones((3, 1)), np.zeros((3, c.train["target_ids"].shape[1] - 1))], 1
                                         ).astype(np.float32)}) for c in setup.federation.clients)
    few = dataclasses.replace(setup, evaluation=dataclasses.replace(setup.evaluation, clients=clients))
    fed, pool = one_step("fedavg", 3), one_step("centralised", 27)
    adapters = prepare.initial_adapters(fed)
    each, _ = train_phase(fed, dict.fromkeys(range(9), adapters), 1, "plain", "plain")
    everyone = Cohort(stack([each[i] for i in range(9)]), np.full(9, 3), np.zeros(9, int), np.arange(9), 1)
    mean = fed.strategy.aggregate(everyone, prepare.initial_state(fed).server).server["model"]
    assert pool.full_steps(0) == fed.full_steps(0) == 1
    together, _ = train_phase(pool, {0: adapters}, 1, "plain", "plain")
    assert tree_max_difference(mean, {n: together[0][n] for n in mean}) <= 1e-6
    assert tree_max_difference(mean["text_adapter"], adapters["text_adapter"]) > 1e-4


def test_pilot_without_its_parts():
    """An ablation removes its part of the method from the ownership table."""
    def table(**changes):
        strategy = make_strategy("pilot", changes)
        rows = strategy.roles().adapter_rows
        return {r.subtree: (r.modes.get("stage1"), r.modes.get("stage2")) for r in rows}, strategy

    full, _ = table()
    without, _ = table(client_adapter="none")
    assert set(full) - set(without) == {"client"}
    first, _ = table(client_adapter="stage1")
    assert first["client"] == ("trained", "-")
    single, strategy = table(cross_task=False)
    assert set(single) == {"text_adapter", "task", "client"}
    assert strategy.stages(True, 1) == ("stage1", "stage1") and strategy.stages(False, 2) == ("stage1",)
    cohort = Cohort({}, np.asarray([10, 30, 20]), np.asarray([0, 0, 1]), np.arange(3), 1)
    between = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (3, 3)))
    _, mean = table(text_aggregation="mean")
    np.testing.assert_allclose(mean.weights(between, cohort), np.tile([1 / 6, 1 / 2, 1 / 3], (3, 1)))
    _, per_task = table(text_aggregation="per_task_mean")
    np.testing.assert_allclose(per_task.weights(between, cohort), [[0.25, 0.75, 0], [0.25, 0.75, 0], [0, 0, 1]])


@pytest.mark.parametrize("space", ["factors", "product"])
def test_the_preset_notes_overrides_all_keys_but_neighbors(space):
    """It takes distances between the factors A and B, and w ∝ exp(−d) over the two nearest and the client, unsized."""
    others = {"weighting": "share", "temperature": 3.0, "auto_factor": 2.0, "include_self": False,
              "size_weighted": True, "space": space}
    strategy = make_strategy("pilot", {"ata": {"preset": "notes", "neighbors": 2, **others}})
    rng = np.random.default_rng(0)
    lora = {"layers": {"q": {"a": rng.normal(size=(4, 2, 3, 5)).astype(np.float32),
                             "b": rng.normal(size=(4, 2, 6, 3)).astype(np.float32)}}}
    flat = np.concatenate([leaf.reshape(4, -1) for leaf in lora["layers"]["q"].values()], 1)
    d = np.linalg.norm(flat[:, None] - flat[None], axis=-1)
    between = strategy.distances(lora)
    np.testing.assert_allclose(between, d, rtol=1e-5, atol=1e-6)
    expected = np.where(d <= np.sort(d, axis=1)[:, 2:3], np.exp(-d), 0)  # column 0 of a sorted row is d_kk = 0
    cohort = Cohort({}, np.asarray([10, 30, 20, 5]), np.zeros(4, int), np.arange(4), 1)
    np.testing.assert_allclose(strategy.weights(between, cohort), expected / expected.sum(1, keepdims=True), rtol=1e-4)


# Rounds of several federations, and bytes.


def test_a_federation_that_diverges_leaves_the_others_as_they_were():
    """If one of three federations uploads NaN, it becomes None, and the others end as if they had trained alone."""
    def federation(seed):
        return toy_federation(make_strategy("scaffold"), toy_clients(seed=seed), seed=seed)

    feds = [federation(seed) for seed in range(3)]
    feds[1] = dataclasses.replace(feds[1], tamper=lambda client, round_, upload, start: jax.tree.map(
        lambda x: x * np.float32(np.nan), upload))
    states, records = [toy_state(fed) for fed in feds], [Records() for _ in feds]
    with pytest.raises(FloatingPointError, match=r"the upload of c\d is not finite"):
        rounds.run_round(feds, states, executor.Executor(4))
    after = rounds.run_round(feds, states, executor.Executor(4), records, survive=True)
    assert after[1] is None and [s.round for s in (after[0], after[2])] == [2, 2]
    for i in (0, 2):
        mine = Records()
        alone, = rounds.run_round([feds[i]], [states[i]], executor.Executor(4), [mine])
        for a, b in zip(alone.population, after[i].population, strict=True):
            assert tree_max_difference(a.adapters, b.adapters) <= 1e-6
        assert tree_max_difference(alone.server["control"], after[i].server["control"]) <= 1e-6
        assert [(r["phase"], r.get("client")) for r in mine.records] == [
            (r["phase"], r.get("client")) for r in records[i].records]
        assert list(mine.mixing) == list(records[i].mixing) == [(1, "plain1"), (1, "plain2")]
    assert not records[1].mixing


W, A, B = (4 * n for n in (CLASSES * FEATURES, RANK * FEATURES, CLASSES * RANK))


@pytest.mark.parametrize(("name", "each"), [
    ("fedavg", W + A + B), ("scaffold", 2 * (W + A + B)), ("local", 0), *slow_except((), [
        ("fedadam", W + A + B), ("feddpa", W + A + B), ("ffa_lora", W + B), ("fedsa_lora", W + A),
        ("median", W + A + B), ("similarity", 0)])])
def test_a_returning_client_fetches_what_has_changed_and_nothing_else(name, each):
    """c0 takes part in all rounds, c1 not in round 2, c2 only in round 3: c1 and c2 download what has changed since."""
    settings = FederationConfig(rounds=3, local_steps=1, participation=[
        {"round": 1, "clients": ["c0", "c1"]}, {"round": 2, "clients": ["c0"]}])
    fed = toy_federation(make_strategy(name), settings=settings)
    state, fetched = toy_state(fed), {}
    for _ in range(3):
        while (plan := rounds.begin_phase(fed, state)) is not None:
            fetched[plan.round, plan.label] = plan.bytes_fetched
            before = state.bytes_down
            trained, = executor.Executor().train([
                executor.Work(fed, plan.adapters, plan.round, plan.stage, plan.label)])
            state = rounds.finish_phase(fed, state, plan, trained, RunObserver())
            down = sum(fed.strategy.sent_bytes(plan.adapters[0])[1].values())
            assert state.bytes_down - before == len(plan.clients) * down + plan.bytes_fetched
        state = rounds.end_round(fed, state)
    assert fetched == {(1, "plain1"): 0, (1, "plain2"): 0, (2, "plain"): 0, (3, "plain"): 2 * each}


def test_the_toys_own_example_runs():
    text, = re.findall(r"\n\n((?:    .*\n|\n)+)\n?\Z", toy.__doc__ + "\n")
    scope = {"pilot_jax": pilot_jax, "mixing": mixing}
    exec(textwrap.dedent(text), scope)
    alone = run_toy(toy_federation(make_strategy("local")))
    assert tree_max_difference(scope["state"].population[0].adapters, alone.population[0].adapters) == 0
    with pytest.raises(ValueError, match="does not know the subtree 'task'"):
        toy_adapters(make_strategy("pilot"))


def test_single_phases():
    """With `federation.schedule: single`, a run of R rounds has R phases, and its first is that of a plain run."""
    single, double = (toy.run_toy(toy.toy_federation(make_strategy("fedavg", schedule=schedule),
                                                     settings=FederationConfig(rounds=rounds, local_epochs=3)))
                      for schedule, rounds in (("single", 2), ("first_time", 1)))
    for one, other in zip(single.population, double.population, strict=True):
        assert tree_max_difference(one.adapters, other.adapters) < 1e-6  # the batches are whole, in another order
    assert single.version == double.version == 2
    with pytest.raises(InputError, match=r"federation\.schedule: single, but pilot trains stage1 and then stage2"):
        make_strategy("pilot", schedule="single")
    assert make_strategy("pilot", {"cross_task": False}, schedule="single").stages(True, 1) == ("stage1",)
