"""Federations of the toy in NumPy float64, each written from its paper's formulas."""

from __future__ import annotations

import numpy as np
from scipy.linalg import orthogonal_procrustes

from pilot_jax.federation import combining
from pilot_jax.federation.strategies import make_strategy
from pilot_jax.testing.toy import (
    CLASSES,
    DESCENT,
    RANK,
    ROUNDS,
    SIZES,
    toy_adapters,
    toy_clients,
    toy_numbers,
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
