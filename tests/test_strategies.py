"""Every strategy against its own paper's update, in NumPy float64, on softmax regression with a LoRA beside it."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config, tree_max_difference

from pilot_jax.config import parse_config
from pilot_jax.data.arrays import ClientData, pooled
from pilot_jax.federation import executor, rounds
from pilot_jax.federation.state import ClientState, Federation, State
from pilot_jax.federation.strategies import STRATEGIES, make_strategy
from pilot_jax.runs import prepare

D, V, R = 5, 4, 2  # features, classes, LoRA rank
SIZES = (4, 8, 6)
TASKS = (0, 0, 1)
ROUNDS, EPOCHS, RATE = 2, 3, 0.4


@dataclasses.dataclass(frozen=True)
class Regression:
    """logits = X·(W + B·A)ᵀ: the projector is W, LoRA's only layer is A, B."""

    def apply(self, variables, batch, stage, task_index, method):
        w = variables["connector"]["connector"]["projector"]["w"]
        pair = variables["lora"]["decoder"]["layers"]["q"]
        return (batch["features"] @ (w + pair["b"][0] @ pair["a"][0]).T)[:, None], {}


def problem(sizes=SIZES, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(n, D)), rng.integers(V, size=n)) for n in sizes]


def client_data(number, x, y):
    n = len(x)
    train = {"input_ids": np.zeros((n, 8), np.int32), "attention_mask": np.ones((n, 8), np.int32),
             "target_positions": np.zeros((n, 1), np.int32), "target_ids": y[:, None].astype(np.int32),
             "target_weights": np.ones((n, 1), np.float32), "has_image": np.ones(n, np.float32),
             "features": x.astype(np.float32)}
    return ClientData(f"c{number}", f"t{TASKS[number]}", train, {})


def start():
    rng = np.random.default_rng(7)
    return {"w": rng.normal(size=(V, D)) * 0.3, "a": rng.normal(size=(R, D)) * 0.5, "b": rng.normal(size=(V, R)) * 0.2,
            "a2": rng.normal(size=(R, D)) * 0.5, "b2": np.zeros((V, R))}


def subtrees(name, p):
    """The start as the strategy's adapters."""
    lora = lambda a, b: {"layers": {"q": {"a": a[None], "b": b[None]}}}  # noqa: E731
    own = {"projector": {"w": p["w"]}}
    if name in ("ffa_lora", "fedsa_lora"):
        own |= {"text_adapter_a": {"q": p["a"][None]}, "text_adapter_b": {"q": p["b"][None]}}
    else:
        own["text_adapter"] = lora(p["a"], p["b"])
    if name == "feddpa":
        own["private_adapter"] = lora(p["a2"], p["b2"])
    if name == "scaffold":
        zero = jax.tree.map(np.zeros_like, own)
        own = {**own, "control": zero, "control_change": zero, "server_control": zero}
    return jax.tree.map(lambda x: np.asarray(x, np.float32), own)


def numbers(adapters):
    """The adapters as the NumPy loops name them."""
    whole = adapters.get("text_adapter")
    a = whole["layers"]["q"]["a"] if whole else adapters["text_adapter_a"]["q"]
    b = whole["layers"]["q"]["b"] if whole else adapters["text_adapter_b"]["q"]
    out = {"w": adapters["projector"]["w"], "a": a[0], "b": b[0]}
    if "private_adapter" in adapters:
        pair = adapters["private_adapter"]["layers"]["q"]
        out |= {"a2": pair["a"][0], "b2": pair["b"][0]}
    return {k: np.asarray(v, np.float64) for k, v in out.items()}


def run(name, data, **settings):
    """The package's rounds on the problem; every client's final numbers."""
    config = parse_config({
        "strategy": {"name": name, **settings}, "federation": {"rounds": ROUNDS, "local_epochs": EPOCHS},
        "train": {"batch_size": 64, "optimizer": "sgd", "warmup": 0.0, "lr_connector": RATE, "lr_lora_stage1": RATE},
        "system": {"client_chunk": 2}})
    strategy = make_strategy(config.strategy, "first_time")
    clients = tuple(client_data(i, x, y) for i, (x, y) in enumerate(data))
    model = types.SimpleNamespace(module=Regression(), base={})
    fed = Federation(config, strategy, model, clients, ("t0", "t1"))
    if strategy.pools_data:
        fed = dataclasses.replace(fed, clients=(pooled(list(clients)),), pool_of=clients)
    adapters = subtrees(name, start())
    strategy.roles().check(adapters)
    server = strategy.initial_server_state(adapters, np.asarray([c.size for c in fed.clients]),
                                           np.asarray([fed.task_index(i) for i in range(len(fed.clients))]))
    state = State(tuple(ClientState(adapters) for _ in fed.clients), server)
    for round_ in range(1, ROUNDS + 1):
        state = rounds.run_round(fed, state, round_, lambda e: None, lambda r: None, lambda *a: None)
    return [numbers(c.adapters) for c in state.population]


# The readable twin.


def gradient(p, x, y):
    """Of the mean cross-entropy, by every factor."""
    ba = p["b"] @ p["a"] + (p["b2"] @ p["a2"] if "a2" in p else 0)
    z = x @ (p["w"] + ba).T
    z = np.exp(z - z.max(1, keepdims=True))
    g = (z / z.sum(1, keepdims=True) - np.eye(V)[y]).T @ x / len(x)
    out = {"w": g, "a": p["b"].T @ g, "b": g @ p["a"].T}
    return out | ({"a2": p["b2"].T @ g, "b2": g @ p["a2"].T} if "a2" in p else {})


def local_steps(p, x, y, trained="wab", correct=None):
    """Full-batch SGD with the schedule's rates; also the mean gradient."""
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


def average(uploads, weights):
    weights = np.asarray(weights, float) / np.sum(weights)
    return {k: sum(w * u[k] for w, u in zip(weights, uploads, strict=True)) for k in uploads[0]}


PHASES = ROUNDS + 1  # two in the first round


def federated(data, server_step=average, shared="wab", trained="wab", correct=None, private=False):
    """FedAvg's loop: `server_step(uploads, sizes) → model`; entries not in `shared` stay with their client."""
    p = {k: v for k, v in start().items() if private or k in "wab"}
    clients = [dict(p) for _ in data]
    for _ in range(PHASES):
        clients = [local_steps(c, x, y, trained, correct)[0] for c, (x, y) in zip(clients, data, strict=True)]
        model = server_step(clients, SIZES)
        clients = [{k: model[k] if k in shared else c[k] for k in c} for c in clients]
    return clients


def with_server(rule):
    """Server step x ← x + η·direction(Δ), Δ the mean change of the clients; `rule(Δ, state, k) → step`."""
    model = {k: v for k, v in start().items() if k in "wab"}
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
    """Karimireddy et al., 2020: x ← x + mean(y − x), c_k by the mean of the client's gradients, c their mean."""
    model = {k: v for k, v in start().items() if k in "wab"}
    own = [{k: np.zeros_like(v) for k, v in model.items()} for _ in data]
    for _ in range(PHASES):
        everyone = average(own, SIZES)
        results = [local_steps(model, x, y, correct=lambda g, p, begin, own=c, all_=everyone: {
            k: g[k] - own[k] + all_[k] for k in g}) for c, (x, y) in zip(own, data, strict=True)]
        model = average([r[0] for r in results], SIZES)
        own = [r[1] for r in results]
    return [model] * len(data)


def similarity(data, temperature=0.5):
    begin = {k: v for k, v in start().items() if k in "wab"}
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
    model = {k: v for k, v in start().items() if k in "wab"}
    for _ in range(PHASES):
        model, _ = local_steps(model, x, y)
    return [model]


def trimmed(uploads, sizes):
    return {k: np.sort([u[k] for u in uploads], axis=0)[1:-1].mean(0) for k in uploads[0]}


SERVER = {"server": {"learning_rate": 0.03, "momentum": 0.8, "beta2": 0.7, "tau": 0.01}}
CASES = {
    "local": ({}, lambda d: federated(d, shared="")),
    "centralised": ({}, centralised),
    "fedavg": ({}, federated),
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
    "median": ({}, lambda d: federated(d, lambda ups, _: {k: np.median([u[k] for u in ups], axis=0) for k in ups[0]})),
    "trimmed_mean": ({"trim": 0.34}, lambda d: federated(d, trimmed)),
}


def test_every_strategy_is_here():
    assert set(CASES) == set(STRATEGIES) - {"pilot"}  # Pilot's parts: test_mixing, test_objectives, test_federation


@pytest.mark.parametrize("name", CASES)
def test_against_the_papers_own_update(name):
    settings, expected = CASES[name]
    data = problem()
    ours, theirs = run(name, data, **settings), expected(data)
    for got, want in zip(ours, theirs, strict=True):
        for key in got:
            np.testing.assert_allclose(got[key], want[key], atol=2e-5, err_msg=key)
    begin = start()
    assert all(np.abs(got["w"] - begin["w"]).max() > 1e-2 for got in ours)
    if name not in ("fedavg", "centralised"):  # each differs from FedAvg by far more than the tolerance
        plain = federated(data)
        assert max(np.abs(got[k] - want[k]).max() for got, want in zip(ours, plain, strict=True) for k in "wab") > 1e-3


def test_absent_clients_keep_their_control():
    """SCAFFOLD with one client away: c moves by the share of those who are there."""
    strategy = make_strategy(parse_config({"strategy": {"name": "scaffold"}}).strategy, "first_time")
    adapters = subtrees("scaffold", start())
    server = strategy.initial_server_state(adapters, np.asarray(SIZES), np.asarray(TASKS))
    ones = jax.tree.map(lambda x: np.ones((2, *x.shape), np.float32), adapters["control_change"])
    uploads = {n: jax.tree.map(lambda x: np.stack([x, x]), adapters[n]) for n in ("text_adapter", "projector")}
    out = strategy.aggregate({**uploads, "control_change": ones}, np.asarray(SIZES[:2]), np.asarray(TASKS[:2]),
                             np.arange(2), server)
    for leaf in jax.tree.leaves(out.server_state["control"]):
        np.testing.assert_allclose(leaf, (4 + 8) / 18, atol=1e-6)


def test_fedavg_with_one_sgd_step_is_centralised_sgd(federation):
    """Equal supervised-token counts, one local step: the mean of the clients' steps is the step on the pooled batch."""
    fed, _, _ = federation
    train = fed.config.train.model_copy(update={"optimizer": "sgd", "lr_connector": 0.1, "lr_lora_stage1": 0.1,
                                                "batch_size": 3})
    clients = tuple(dataclasses.replace(c, train={k: v[:3] for k, v in c.train.items()} | {
        "target_weights": np.concatenate([np.ones((3, 1)), np.zeros((3, c.train["target_ids"].shape[1] - 1))], 1
                                         ).astype(np.float32)}) for c in fed.clients)
    config = fed.config.model_copy(update={
        "train": train, "federation": fed.config.federation.model_copy(update={"local_steps": None})})
    fed = dataclasses.replace(fed, clients=clients, config=config)
    fed = prepare.with_strategy(fed, make_strategy(config.strategy.model_copy(update={"name": "fedavg"}), ""))
    adapters = prepare.initial_adapters(fed)
    each, _ = executor.train_phase(fed, dict.fromkeys(range(9), adapters), 1, "plain", "plain", lambda e: None)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(each[i] for i in range(9)))
    mean = fed.strategy.aggregate(stacked, np.full(9, 3), np.zeros(9, int), np.arange(9),
                                  prepare.initial_state(fed).server).server_state["model"]
    large = config.model_copy(update={"train": train.model_copy(update={"batch_size": 27})})
    pool = prepare.with_strategy(fed, make_strategy(config.strategy.model_copy(update={"name": "centralised"}), ""),
                                    large)
    assert pool.full_steps(0) == fed.full_steps(0) == 1
    together, _ = executor.train_phase(pool, {0: adapters}, 1, "plain", "plain", lambda e: None)
    assert tree_max_difference(mean, {n: together[0][n] for n in mean}) <= 1e-6
    assert tree_max_difference(mean["text_adapter"], adapters["text_adapter"]) > 1e-4


def test_pilot_without_its_parts():
    """Ablations leave out of the table what they leave out of the method."""
    def table(**changes):
        strategy = make_strategy(small_config(strategy=changes).strategy, "first_time")
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
    uploads = np.asarray([10, 30, 20]), np.asarray([0, 0, 1])
    between = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (3, 3)))
    _, mean = table(text_aggregation="mean")
    np.testing.assert_allclose(mean.weights(between, *uploads, np.arange(3)), np.tile([1 / 6, 1 / 2, 1 / 3], (3, 1)))
    _, per_task = table(text_aggregation="per_task_mean")
    np.testing.assert_allclose(per_task.weights(between, *uploads, np.arange(3)),
                               [[0.25, 0.75, 0], [0.25, 0.75, 0], [0, 0, 1]])
