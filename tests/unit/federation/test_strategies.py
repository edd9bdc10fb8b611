"""Tests of every strategy against its paper's update in NumPy float64, on softmax regression with LoRA."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
import textwrap
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
import yaml
from conftest import Records, slow_except, small_config, tree_max_difference
from pydantic import Field
from scipy.linalg import orthogonal_procrustes

import pilot_jax
from pilot_jax.config import (
    STRATEGY_PARAMS,
    FederationConfig,
    StrategyParams,
    apply_overrides,
    json_schema,
    known_keys,
    load_config,
    parse_config,
)
from pilot_jax.errors import InputError, Interrupted
from pilot_jax.evaluation.personalised import evaluate
from pilot_jax.federation import combining, executor, mixing, rounds
from pilot_jax.federation.cohort import Cohort
from pilot_jax.federation.observer import RunObserver
from pilot_jax.federation.state import stack
from pilot_jax.federation.strategies import ENTRY_POINTS, STRATEGIES, Strategy, make_strategy, use
from pilot_jax.runs import prepare, restore, simulate
from pilot_jax.runs.export import export_client
from pilot_jax.runs.resume import Snapshots
from pilot_jax.testing import toy
from pilot_jax.testing.phases import train_phase
from pilot_jax.testing.toy import (
    CLASSES,
    DESCENT,
    FEATURES,
    RANK,
    ROUNDS,
    SIZES,
    run_toy,
    toy_adapters,
    toy_clients,
    toy_federation,
    toy_numbers,
    toy_state,
)

EPOCHS, RATE = ROUNDS.local_epochs, DESCENT.lr_connector


def problem():
    """Returns (features, labels) of each client, float64."""
    return [(np.float64(c.features), c.train["target_ids"][:, 0]) for c in toy_clients()]


def numbers(adapters):
    """Returns the adapters under the names that the NumPy loops use."""
    whole = adapters.get("text_adapter")
    a = whole["layers"]["q"]["a"] if whole else adapters["text_adapter_a"]["q"]
    b = whole["layers"]["q"]["b"] if whole else adapters["text_adapter_b"]["q"]
    w = adapters["projector"]["w"] if "projector" in adapters else toy_numbers()["w"]  # frozen
    if "text_residual" in adapters:  # the toy's frozen weight and the projector are added up, so W has ΔW too
        pair = adapters["text_residual"]["layers"]["q"]
        w = w + pair["b"][0] @ pair["a"][0]
    out = {"w": w, "a": a[0], "b": b[0]}
    if "private_adapter" in adapters:
        pair = adapters["private_adapter"]["layers"]["q"]
        out |= {"a2": pair["a"][0], "b2": pair["b"][0]}
    return {k: np.asarray(v, np.float64) for k, v in out.items()}


def run(name, **settings):
    """Runs the package's rounds on the toy and returns every client's final parameters."""
    state = run_toy(toy_federation(make_strategy(name, settings)))
    return [numbers(c.adapters) for c in state.population]


# The same algorithms in NumPy.


def gradient(p, x, y):
    """Returns the gradient of the mean cross-entropy with respect to every parameter."""
    ba = p["b"] @ p["a"] + (p["b2"] @ p["a2"] if "a2" in p else 0)
    z = x @ (p["w"] + ba).T
    z = np.exp(z - z.max(1, keepdims=True))
    g = (z / z.sum(1, keepdims=True) - np.eye(CLASSES)[y]).T @ x / len(x)
    out = {"w": g, "a": p["b"].T @ g, "b": g @ p["a"].T}
    return out | ({"a2": p["b2"].T @ g, "b2": g @ p["a2"].T} if "a2" in p else {})


def local_steps(p, x, y, trained="wab", correct=None):
    """Trains by full-batch SGD with the schedule's rates. Returns the parameters and the mean gradient."""
    p, total = dict(p), {k: 0.0 for k in p}
    begin, grads = dict(p), None
    for i in range(EPOCHS):
        grads = gradient(p, x, y)
        total = {k: total[k] + grads[k] / EPOCHS for k in p}
        rate = RATE * 0.5 * (1 + np.cos(np.pi * i / EPOCHS))
        if correct is not None:
            grads = correct(grads, p, begin)
        p = {k: p[k] - rate * grads[k] if k in trained else p[k] for k in p}
    return p, total


def finetuned(clients, data):
    """Trains every client's parameters for one more phase on its own data, without an average afterwards."""
    return [local_steps(c, x, y)[0] for c, (x, y) in zip(clients, data, strict=True)]


def average(uploads, weights):
    weights = np.asarray(weights, float) / np.sum(weights)
    return {k: sum(w * u[k] for w, u in zip(weights, uploads, strict=True)) for k in uploads[0]}


PHASES = ROUNDS.rounds + 1  # the first round has two


def federated(data, server_step=average, shared="wab", trained="wab", correct=None, private=False):
    """Runs FedAvg's loop with `server_step(uploads, sizes) → model`. Parameters not in `shared` stay local."""
    p = {k: v for k, v in toy_numbers().items() if private or k in "wab"}
    clients = [dict(p) for _ in data]
    for _ in range(PHASES):
        clients = [local_steps(c, x, y, trained, correct)[0] for c, (x, y) in zip(clients, data, strict=True)]
        model = server_step(clients, SIZES)
        clients = [{k: model[k] if k in shared else c[k] for k in c} for c in clients]
    return clients


def with_server(rule):
    """Returns the server step x ← x + rule(Δ, state, k), Δ the mean change of the clients in parameter k."""
    model = {k: v for k, v in toy_numbers().items() if k in "wab"}
    state = {}

    def step(uploads, sizes):
        mean = average(uploads, sizes)
        for k in model:
            model[k] = model[k] + rule(mean[k] - model[k], state, k)
        return dict(model)

    return step


def momentum(delta, state, k):  # Hsu et al., 2019: v ← βv + Δ, w ← w + ηv
    state[k] = 0.9 * state.get(k, 0) + delta
    return 0.5 * state[k]


def adaptive(second):
    def rule(delta, state, k):  # Reddi et al., 2021, algorithm 2
        m, v = state.get(k, (0.0, np.full_like(delta, 0.01**2)))
        m = 0.8 * m + 0.2 * delta
        v = second(v, delta**2)
        state[k] = m, v
        return 0.03 * m / (np.sqrt(v) + 0.01)

    return rule


def scaffold(data):
    """Karimireddy et al., 2020: x ← x + mean(y − x); c_k is the client's mean gradient, c the mean of all c_k."""
    model = {k: v for k, v in toy_numbers().items() if k in "wab"}
    own = [{k: np.zeros_like(v) for k, v in model.items()} for _ in data]
    for _ in range(PHASES):
        everyone = average(own, SIZES)
        results = [local_steps(model, x, y, correct=lambda g, p, begin, own=c, all_=everyone: {
            k: g[k] - own[k] + all_[k] for k in g}) for c, (x, y) in zip(own, data, strict=True)]
        model = average([r[0] for r in results], SIZES)
        own = [r[1] for r in results]
    return [model] * len(data)


def similarity(data, temperature=0.5):
    begin = {k: v for k, v in toy_numbers().items() if k in "wab"}
    clients = [dict(begin) for _ in data]
    for _ in range(PHASES):
        clients = [local_steps(c, x, y)[0] for c, (x, y) in zip(clients, data, strict=True)]
        moved = np.stack([np.concatenate([(c[k] - begin[k]).ravel() for k in "wab"]) for c in clients])
        unit = moved / np.linalg.norm(moved, axis=1, keepdims=True)
        weights = np.exp(unit @ unit.T / temperature)
        clients = [average(clients, row) for row in weights]
    return clients


def centralised(data):
    x, y = np.concatenate([x for x, _ in data]), np.concatenate([y for _, y in data])
    model = {k: v for k, v in toy_numbers().items() if k in "wab"}
    for _ in range(PHASES):
        model, _ = local_steps(model, x, y)
    return [model]


def mean_product(uploads, sizes):
    return sum(n * u["b"] @ u["a"] for n, u in zip(sizes, uploads, strict=True)) / np.sum(sizes)


def by_svd(uploads, sizes):
    """Bai et al., 2024: the mean of the products, and its best approximation of LoRA's rank as B = UΣ, A = Vᵀ.

    Each row of A has its largest entry positive, since an SVD is unique up to signs only.
    """
    u, s, vt = np.linalg.svd(mean_product(uploads, sizes), full_matrices=False)
    a, b = vt[:RANK], (u * s)[:, :RANK]
    sign = np.sign([row[np.argmax(np.abs(row))] for row in a])
    return {"w": average(uploads, sizes)["w"], "a": a * sign[:, None], "b": b * sign}


def rotated():
    """Zhang et al., 2026: B before A by turns, not in round 1; the last of the toy's three phases is round 2."""
    models = [toy_numbers()]

    def step(uploads, sizes):
        if len(models) == PHASES:
            turns = [orthogonal_procrustes(u["b"], models[-1]["b"])[0] for u in uploads]
            uploads = [u | {"a": q.T @ u["a"], "b": u["b"] @ q} for u, q in zip(uploads, turns, strict=True)]
        models.append(average(uploads, sizes))
        return models[-1]

    return step


def with_residual(uploads, sizes):
    """Singhal et al., 2024: W ← W + Σ w_j B_jA_j − B̄Ā, where the clients' W is already their model's."""
    mean = average(uploads, sizes)
    return mean | {"w": mean["w"] + mean_product(uploads, sizes) - mean["b"] @ mean["a"]}


def stacked():
    """Wang et al., 2024: W ← W + Σ w_j B_jA_j, and a new LoRA with B = 0, whose A is the package's draw."""
    start, phases = toy_adapters(make_strategy("fedavg"))["text_adapter"], []

    def step(uploads, sizes):
        phases.append(None)
        drawn = combining.redrawn(start, 1 if len(phases) < PHASES else 2)["layers"]["q"]
        assert sorted(np.ravel(drawn["a"])) == sorted(np.ravel(start["layers"]["q"]["a"]))
        return {"w": average(uploads, sizes)["w"] + mean_product(uploads, sizes), "a": np.float64(drawn["a"][0]),
                "b": np.zeros((CLASSES, RANK))}

    return step


def trimmed(uploads, sizes):
    return {k: np.sort([u[k] for u in uploads], axis=0)[1:-1].mean(0) for k in uploads[0]}


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
    monkeypatch.setitem(globals(), "gradient", lambda p, x, y: whole(p, x, y) | {"w": np.zeros_like(p["w"])})
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


# A user's own strategy. Tests run it on the toy, which is faster, if they do not need the real model.


class Halfway(Strategy):
    """Each client receives a mixture of its own upload and the mean; the ownership table is the base class's."""

    one_model = False

    class Params(StrategyParams):
        share: float = Field(0.5, ge=0, le=1, description="halfway: weight of the mean")

    def mix(self, cohort):
        own, mean = mixing.identity(len(cohort)), mixing.mean(cohort.sizes)
        return (1 - self.params.share) * own + self.params.share * mean


MINE = f"{__name__}:Halfway"
MODULE = '''
from pathlib import Path
import jax.numpy as jnp
import pilot_jax
from pilot_jax import mixing

Path(__file__).with_name("imported").touch()


class Ring(pilot_jax.Strategy):
    one_model = False

    def mix(self, cohort):
        own = mixing.identity(len(cohort))
        return (own + jnp.roll(own, 1, axis=1)) / 2


NOTHING = 5
'''


@pytest.fixture
def module(tmp_path, monkeypatch, another_process):
    """Yields "module:Class" of a file in the working directory. Its import creates the file `imported` beside it."""
    name = f"mine_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield f"{name}:Ring"
    sys.modules.pop(name, None)


def goes_on_to_the_same_end(config, folder, chunks):
    """Checks that a run that stops after some chunks, and is resumed, ends as a whole one, which is returned."""
    whole = simulate.simulate(config)
    with pytest.raises(Interrupted):
        simulate.simulate(config, out=folder, observers=[Stops(chunks)])
    run = simulate.simulate(config, out=folder, resume=True)
    for key in ("adapters_sha256", "bytes_up", "bytes_down", "client_steps"):
        assert run.summary[key] == whole.summary[key], key
    return whole


class Stops(RunObserver):
    """Requests the end of the run after a number of chunks."""

    def __init__(self, after):
        self.left = after

    def chunk_trained(self, progress):
        self.left -= 1

    def stop_requested(self):
        return 0 if self.left > 0 else 15


def files(folder):
    """Returns the hash of each file in a folder, except of the lock."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_strategy_of_ones_own_in_a_file_is_found_by_its_name(module, on_toy, another_process):
    """An override or `use` finds it, and the run equals that with the object."""
    with pytest.raises(InputError):
        apply_overrides(on_toy, ["strategy={name: " + module + "}"])  # a whole section may come from a file
    config = apply_overrides(on_toy, [f"strategy.name={module}"])
    assert config.strategy.name == module and Path("imported").exists()
    run = simulate.simulate(config)
    assert run.summary["strategy"] == module and type(run.federation.strategy).__name__ == "Ring"
    another_process()
    assert use(module) == module and use(STRATEGIES[module]) == module
    found = STRATEGIES[module]
    as_object = simulate.simulate(on_toy, strategy=found())
    assert as_object.summary["adapters_sha256"] == run.summary["adapters_sha256"]
    assert run.summary["adapters_sha256"] != simulate.simulate(on_toy).summary["adapters_sha256"]
    for bad, message in ((f"{module}s", "has no Rings"), (module.replace("Ring", "NOTHING"), "not a subclass"),
                         ("no_such_module:Ring", "cannot be imported"), ("fedavgg", "Did you mean 'fedavg'")):
        with pytest.raises(InputError, match=message):
            use(bad)


def test_a_file_alone_imports_nothing(module, on_toy, another_process, tmp_path):
    """A config file or run directory that names a module is refused with one line that says what to do."""
    config = apply_overrides(on_toy, [f"strategy.name={module}"])
    simulate.simulate(config, out=tmp_path / "run")
    another_process()
    sys.modules.pop(module.split(":")[0])
    Path("imported").unlink()
    before = files(tmp_path / "run")
    (tmp_path / "their.yaml").write_text(config.to_yaml())
    attempts = [lambda: load_config(tmp_path / "their.yaml"), lambda: restore.restore(tmp_path / "run"),
                lambda: load_config(tmp_path / "their.yaml", ["federation.rounds=3"]),
                lambda: parse_config({"strategy": {"name": module}}), lambda: make_strategy(module),
                lambda: simulate.simulate(on_toy, out=tmp_path / "run", resume=True)]
    for attempt in attempts:
        with pytest.raises(InputError, match="a file alone imports no code") as error:
            attempt()
        assert f"--strategy {module}" in one_line(error)
    assert not Path("imported").exists() and files(tmp_path / "run") == before
    assert restore.restore(tmp_path / "run", strategy=module).federation.strategy.name == module
    assert Path("imported").exists()


@pytest.mark.parametrize("named", ["class", "object", "name"])
def test_an_interrupted_run_of_ones_own_goes_on_with_it_alone(on_toy, another_process, tmp_path, named):
    """Without the strategy, or with another, the run is refused in one line, and its snapshots stay. With the strategy
    it continues."""
    mine = Halfway(Halfway.Params(share=0.25))
    whole = simulate.simulate(on_toy, strategy=mine)
    with pytest.raises(Interrupted):
        simulate.simulate(on_toy, out=tmp_path / "run", strategy=mine, observers=[Stops(3)])
    assert load_config(tmp_path / "run" / "config.yaml").strategy == mine.params
    before = files(tmp_path / "run")
    assert any("resume/000001/manifest.json" in name for name in before)
    with pytest.raises(InputError, match=r"strategy\.name: '.*Halfway' → 'fedavg'"):  # both known
        simulate.simulate(on_toy, out=tmp_path / "run", resume=True)
    another_process()
    for attempt in (lambda: simulate.simulate(on_toy, out=tmp_path / "run", resume=True),
                    lambda: simulate.simulate(parse_config({}), out=tmp_path / "run", resume=True),
                    lambda: restore.restore(tmp_path / "run")):
        with pytest.raises(InputError, match="--strategy") as error:
            attempt()
        assert MINE in one_line(error)
    with pytest.raises(InputError, match=f"but .* is a run of {MINE}") as error:
        use(Halfway)
        restore.restore(tmp_path / "run", strategy="fedavg")
    one_line(error)
    assert files(tmp_path / "run") == before
    another_process()
    use({"class": Halfway, "object": mine, "name": MINE}[named])
    back = restore.restore(tmp_path / "run", strategy={"class": Halfway, "object": mine, "name": MINE}[named])
    assert type(back.federation.strategy) is Halfway and back.federation.strategy.params.share == 0.25
    config = load_config(tmp_path / "run" / "config.yaml")
    run = simulate.simulate(config, out=tmp_path / "run", resume=True)
    assert run.summary["adapters_sha256"] == whole.summary["adapters_sha256"]
    assert restore.restore(tmp_path / "run", strategy=Halfway).summary["strategy"] == MINE


def test_snapshots_of_another_strategy_are_refused_and_stay(on_toy, tmp_path):
    """A snapshot loaded under the wrong strategy is reported as such, and neither called damaged nor removed."""
    with pytest.raises(Interrupted):
        simulate.simulate(on_toy, out=tmp_path / "run", observers=[Stops(3)])
    folder = tmp_path / "run" / "checkpoints" / "resume"
    before = files(folder)
    told = []
    for name in ("ffa_lora", "scaffold", "feddpa"):
        fed = toy_federation(make_strategy(name))
        with pytest.raises(InputError, match="another strategy"):
            Snapshots(folder, fed.names, fed.strategy.roles()).load(toy_state(fed), None, told.append)
    assert not told and files(folder) == before


@pytest.mark.slow
def test_a_run_of_ones_own_is_evaluated_and_exported(another_process, tmp_path):
    """On the real model, a run restored with its class gives the scores of its summary and can be exported."""
    config = small_config(federation={"local_steps": 1}, data={"digits": {"train": 4}})
    run = simulate.simulate(config, out=tmp_path / "run", strategy=Halfway())
    weights = np.load(tmp_path / "run" / "mixing" / "round_0001_plain2.npz")["weights"]
    np.testing.assert_allclose(weights, np.eye(9) / 2 + 1 / 18, atol=1e-6)
    another_process()
    with pytest.raises(InputError, match=f"--strategy {MINE}"):
        restore.restore(tmp_path / "run")
    back = restore.restore(tmp_path / "run", strategy=Halfway)
    assert type(back.federation.strategy) is Halfway and back.config.strategy.name == MINE
    assert evaluate(back.evaluation, back.population) == run.summary["score_by_client"]
    export_client(back, "vqa_0", tmp_path / "vqa_0")
    assert f"| method | {MINE} |" in (tmp_path / "vqa_0" / "README.md").read_text()
    assert (tmp_path / "vqa_0" / "adapter_model.safetensors").stat().st_size > 0


def test_entry_points_of_installed_packages_are_known(on_toy, another_process, monkeypatch):
    """An installed package was chosen by the user, so config files may name its strategies without `--strategy`."""
    point = types.SimpleNamespace(name="halfway", value=MINE, load=lambda: Halfway)
    wrong = types.SimpleNamespace(name="wrong", value="json:loads", load=lambda: 5)
    groups = {ENTRY_POINTS: [point, wrong]}
    monkeypatch.setattr("importlib.metadata.entry_points", lambda *, group: groups.get(group, []))
    config = parse_config({"strategy": {"name": "halfway", "share": 0.75}})
    assert STRATEGIES["halfway"] is Halfway and config.strategy.share == 0.75
    assert type(make_strategy(config.strategy)) is Halfway and make_strategy(config.strategy).name == "halfway"
    another_process()
    assert type(make_strategy(MINE)) is Halfway  # also by its value
    for bad, message in (("wrong", "not a subclass"), ("halfwayy", "is not a strategy")):
        with pytest.raises(InputError, match=message):
            make_strategy(bad)


# The section `strategy`.


def test_the_section_of_a_strategy_of_ones_own(another_process):
    name = use(Halfway)
    assert parse_config({"strategy": {"name": name, "share": 0.25}}).strategy == Halfway.Params(name=name, share=0.25)
    for section, message in (({"share": 2}, r"strategy\.share: .*less than or equal to 1 \(got 2\)"),
                             ({"share": "much"}, r"strategy\.share: .*valid number"),
                             ({"sahre": 0.5}, r"strategy\.sahre: unknown key\. Did you mean 'strategy\.share'\?")):
        with pytest.raises(InputError, match=message):
            parse_config({"strategy": {"name": name, **section}})
    assert "strategy.share" in known_keys()
    assert apply_overrides(parse_config({}), [f"strategy.name={name}", "strategy.share=1"]).strategy.share == 1
    assert yaml.safe_load(parse_config({"strategy": {"name": name}}).to_yaml())["strategy"] == {
        "name": name, "projector": "trained", "share": 0.5, "combine": "factors", "clip": None,
        "residual_rank": None, "rotation": 1.0}


def test_keys_of_other_strategies_are_checked_and_dropped():
    """One config can have keys of several strategies; a wrong value is refused under each of them."""
    several = {"ata": {"neighbors": 4}, "trim": 0.1, "prox_mu": 0.5, "server": {"momentum": 0.5}}
    for name in STRATEGIES:
        section = parse_config({"strategy": {"name": name, **several}}).strategy
        own = STRATEGY_PARAMS[name].model_fields
        assert type(section) is STRATEGY_PARAMS[name]
        assert set(section.model_dump()) == {"name"} | set(own) and section.name == name
        for key in set(several) & set(own):
            assert getattr(section, key) != own[key].default
        for key, bad in (("ata", {"neighbors": 0}), ("trim", 0.5), ("prox_mu", -1), ("server", {"tau": 0}),
                         ("ata", {"neighbours": 1})):
            with pytest.raises(InputError, match=rf"strategy\.{key}"):
                parse_config({"strategy": {"name": name, key: bad}})
    with pytest.raises(InputError, match=r"strategy\.trimm: unknown key\. Did you mean 'strategy\.trim'\?"):
        parse_config({"strategy": {"name": "fedavg", "trimm": 0.1}})
    for raw, message in ((5, "expected a mapping"), ({"name": 5}, "5 is not a strategy"), ({"name": ["a:b"]}, "is not"),
                         ({"name": "fed_avg"}, "Did you mean 'fedavg'")):
        with pytest.raises(InputError, match=message):
            parse_config({"strategy": raw})


def test_the_json_schema_knows_every_strategys_section(another_process):
    use(Halfway)
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    valid = jsonschema.Draft202012Validator(schema).is_valid
    for name, params in STRATEGY_PARAMS.items():
        section = params(name=name).model_dump(mode="json")
        assert valid({"strategy": section}) and valid({"strategy": {"name": name}}), name
        assert not valid({"strategy": section | {"no_such_key": 1}}), name
    assert valid({}) and valid({"strategy": {"ata": {"neighbors": 1}}})  # Pilot is the default
    assert not valid({"strategy": {"name": "no_such_strategy"}})
    assert not valid({"strategy": {"name": MINE, "share": 2}}) and not valid({"strategy": {"ata": {"neighbors": 0}}})


# Observers, and how they end a run.


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
