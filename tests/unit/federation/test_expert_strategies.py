"""Tests of the strategies whose clients mix several LoRA per token against NumPy float64, written sample by sample."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import DiesAt, Killed, Records, same_run, small_config, toy_instead_of_model, tree_max_difference
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import silhouette_score

import pilot_jax
from pilot_jax.config import FederationConfig, parse_config
from pilot_jax.errors import InputError
from pilot_jax.evaluation.personalised import evaluate
from pilot_jax.federation.strategies import fedlease, make_strategy
from pilot_jax.runs import prepare, restore, simulate
from pilot_jax.runs.export import export_client
from pilot_jax.testing.toy import (
    CLASSES,
    DESCENT,
    FEATURES,
    RANK,
    run_toy,
    toy_adapters,
    toy_clients,
    toy_federation,
    toy_numbers,
    toy_state,
)

EPOCHS, RATE = 3, DESCENT.lr_connector
SIZES = (4, 8, 6, 5, 7, 6, 9)
OWN = "own"  # stands for a client's own expert in a list of slots; numbers are experts of its bank; None: out of use


def start(strategy):
    """Returns the toy's initial parameters of one client, float64; the router is the one that the package draws."""
    numbers = {k: v for k, v in toy_numbers().items() if k in "wab"}
    router = np.float64(toy_adapters(strategy)["expert_router"]["q"][0])
    return numbers | {"router": router, "bank": []}


def weights_of(logits, slots):
    """Returns the weight of each row of the router: a softmax over the M largest in use, M the number of experts."""
    used = [s for s, expert in enumerate(slots) if expert is not None]
    most = len({slots[s] for s in used})
    kept = sorted(used, key=lambda s: (-logits[s], s))[:most]
    powers = np.exp(logits[kept] - max(logits[kept]))
    return dict(zip(kept, powers / powers.sum(), strict=True))


def gradient(p, slots, x, y):
    """Returns the gradients of the mean cross-entropy of z = W·x + Σ_s p_s·B_s·A_s·x by w, a, b and router."""
    grads = {k: np.zeros_like(p[k]) for k in ("w", "a", "b", "router")}
    for token, label in zip(x, y, strict=True):
        shares = weights_of(p["router"] @ token, slots)
        experts = {s: (p["a"], p["b"]) if slots[s] == OWN else p["bank"][slots[s]] for s in shares}
        added = {s: b @ (a @ token) for s, (a, b) in experts.items()}
        z = p["w"] @ token + sum(shares[s] * added[s] for s in shares)
        z = np.exp(z - z.max())
        dz = (z / z.sum() - np.eye(CLASSES)[label]) / len(x)
        grads["w"] += np.outer(dz, token)
        mean = sum(shares[s] * (dz @ added[s]) for s in shares)
        for s, share in shares.items():
            grads["router"][s] += share * (dz @ added[s] - mean) * token
            if slots[s] == OWN:
                grads["b"] += share * np.outer(dz, p["a"] @ token)
                grads["a"] += share * np.outer(p["b"].T @ dz, token)
    return grads


def descended(p, slots, x, y, trained=("w", "a", "b", "router")):
    """Returns the parameters after full-batch gradient descent at the schedule's rates."""
    for i in range(EPOCHS):
        grads, rate = gradient(p, slots, x, y), RATE * 0.5 * (1 + np.cos(np.pi * i / EPOCHS))
        p = p | {k: p[k] - rate * grads[k] for k in trained}
    return p


def mean(values, weights=None):
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    return sum(w * v for w, v in zip(weights, values, strict=True)) / weights.sum()


def data_of(clients):
    return [(np.float64(c.features), c.train["target_ids"][:, 0]) for c in clients]


def numbers(adapters):
    """Returns a client's parameters under the names of the NumPy loops, float64."""
    pair, bank = adapters["text_adapter"]["layers"]["q"], adapters["expert_bank"]["layers"]["q"]
    out = {"w": adapters["projector"]["w"] if "projector" in adapters else toy_numbers()["w"],
           "a": pair["a"][0], "b": pair["b"][0], "router": adapters["expert_router"]["q"][0]}
    return {k: np.float64(v) for k, v in out.items()} | {
        "bank": [(np.float64(a), np.float64(b)) for a, b in zip(bank["a"][0], bank["b"][0], strict=True)]}


def agree(ours, theirs, tolerance=3e-5):
    for got, want in zip(ours, theirs, strict=True):
        for key in ("w", "a", "b", "router"):
            np.testing.assert_allclose(got[key], want[key], atol=tolerance, err_msg=key)
        for (a, b), (a2, b2) in zip(got["bank"], want["bank"], strict=False):
            np.testing.assert_allclose(a, a2, atol=tolerance)
            np.testing.assert_allclose(b, b2, atol=tolerance)


def federation(name, clients=3, settings=None, **params):
    held = toy_clients(SIZES[:clients], ("t0", "t0", "t1", "t1", "t0", "t2", "t1")[:clients])
    return toy_federation(make_strategy(name, params), held,
                          settings or FederationConfig(rounds=2, local_epochs=EPOCHS))


# FedALT.


def fedalt(fed, cohorts, trained=("w", "a", "b", "router")):
    """Returns the clients' parameters after FedALT's phases; `cohorts`: who takes part in each."""
    data = data_of(fed.clients)
    everyone = [start(fed.strategy) for _ in data]
    for p in everyone:
        p["bank"] = [(p["a"], np.zeros_like(p["b"]))]
    w = everyone[0]["w"]
    for cohort in cohorts:
        for k in cohort:
            everyone[k] = descended(everyone[k] | {"w": w}, [OWN, 0], *data[k], trained)
        w = mean([everyone[k]["w"] for k in cohort], [SIZES[k] for k in cohort])
        for k in cohort:
            rest = [everyone[j] for j in cohort if j != k]
            if rest:
                everyone[k]["bank"] = [(mean([p["a"] for p in rest]), mean([p["b"] for p in rest]))]
        for k in cohort:
            everyone[k] = everyone[k] | {"w": w}
    return everyone


def test_fedalt():
    fed = federation("fedalt")
    seen = Records()
    state = run_toy(fed, observer=seen)
    ours, theirs = [numbers(c.adapters) for c in state.population], fedalt(fed, [range(3)] * 3)
    agree(ours, theirs)
    begin = start(fed.strategy)
    for p in ours:  # everything has moved by far more than the tolerance, and no two clients are alike
        assert all(np.abs(p[k] - begin[k]).max() > 5e-3 for k in ("w", "a", "b", "router"))
        assert np.abs(p["bank"][0][1]).max() > 0.1
    assert all(np.abs(ours[0][k] - ours[1][k]).max() > 5e-3 for k in ("a", "b", "router"))
    for log in seen.mixing.values():
        np.testing.assert_allclose(log["weights"], (1 - np.eye(3)) / 2)
    lora, w = 4 * RANK * (FEATURES + CLASSES), 4 * CLASSES * FEATURES
    up, down = fed.strategy.sent_bytes(state.population[0].adapters)
    assert up == {"text_adapter": lora, "projector": w} and down == {"expert_bank": lora, "projector": w}
    assert state.bytes_up == state.bytes_down == 9 * (lora + w)


def test_fedalt_of_parts_of_the_clients():
    """A client that is alone keeps its rest-of-world LoRA, and one that is absent its whole LoRA."""
    settings = FederationConfig(rounds=4, local_epochs=EPOCHS, participation=[
        {"round": 2, "clients": ["c1"]}, {"round": 3, "clients": ["c0", "c2"]}, {"round": 4, "clients": ["c1"]}])
    fed = federation("fedalt", settings=settings)
    state = run_toy(fed)
    theirs = fedalt(fed, [range(3), range(3), [1], [0, 2], [1]])
    agree([numbers(state.population[1].adapters)], [theirs[1]])
    for k in (0, 2):  # their projectors are of round 3
        agree([numbers(state.population[k].adapters)], [theirs[k]])


@pytest.mark.slow
def test_fedalt_without_the_projector():
    fed = federation("fedalt", projector="frozen")
    state = run_toy(fed)
    agree([numbers(c.adapters) for c in state.population], fedalt(fed, [range(3)] * 3, ("a", "b", "router")))
    lora = 4 * RANK * (FEATURES + CLASSES)
    assert fed.strategy.sent_bytes(state.population[0].adapters) == ({"text_adapter": lora}, {"expert_bank": lora})


# FedLEASE.


def distances(bs):
    return np.asarray([[1 - np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y) for y in bs] for x in bs])


def clusters_by_sklearn(between, most):
    """Returns scikit-learn's clusters, in the order of their first clients, and the silhouettes of all counts."""
    between = between * (1 - np.eye(len(between)))
    options = {m: AgglomerativeClustering(m, metric="precomputed", linkage="average").fit_predict(between)
               for m in range(2, min(most, len(between) - 1) + 1)}
    scores = {m: silhouette_score(between, labels, metric="precomputed") for m, labels in options.items()}
    best = options[max(scores, key=scores.get)]
    order = list(dict.fromkeys(best.tolist()))
    return np.asarray([order.index(label) for label in best]), scores


def lease(fed, cohorts):
    """Returns (clients' parameters, experts [(a, b)], clusters by client) after FedLEASE's phases."""
    data, most = data_of(fed.clients), fed.strategy.params.max_experts
    everyone, clusters, experts, routers = [start(fed.strategy) for _ in data], {}, [], []
    w = everyone[0]["w"]
    for cohort in cohorts:
        for k in cohort:
            slots = [None] * (2 * most - 1)
            if k in clusters:
                m, own = len(experts), clusters[k]
                slots[:m], slots[most:most + m - 1] = [OWN if e == own else e for e in range(m)], [OWN] * (m - 1)
                (a, b), router = experts[own], routers[own]
                everyone[k] |= {"a": a, "b": b, "router": router, "bank": experts}
            else:
                slots[most] = OWN
            everyone[k] = descended(everyone[k] | {"w": w}, slots, *data[k])
        w = mean([everyone[k]["w"] for k in cohort], [SIZES[k] for k in cohort])
        count = [k for k in cohort if k in clusters or not clusters]
        if not clusters:
            labels, _ = clusters_by_sklearn(distances([everyone[k]["b"] for k in cohort]), most)
            clusters = dict(zip(cohort, labels.tolist(), strict=True))
            experts, routers = [None] * (1 + max(labels)), [None] * (1 + max(labels))
        for k in set(cohort) - set(clusters):
            clusters[k] = int(np.argmin(distances([everyone[k]["b"], *(b for _, b in experts)])[0, 1:]))
        for e in range(len(experts)):
            members = [everyone[k] for k in count if clusters[k] == e]
            if members:
                experts[e] = mean([p["a"] for p in members]), mean([p["b"] for p in members])
                routers[e] = mean([p["router"] for p in members])
        for k in cohort:
            (a, b), router = experts[clusters[k]], routers[clusters[k]]
            everyone[k] = everyone[k] | {"w": w, "a": a, "b": b, "router": router, "bank": list(experts)}
    return everyone, experts, clusters


def test_fedlease():
    fed = federation("fedlease", 6, max_experts=4)
    seen = Records()
    state = run_toy(fed, observer=seen)
    theirs, experts, clusters = lease(fed, [range(6)] * 3)
    ours = [numbers(c.adapters) for c in state.population]
    agree(ours, theirs)
    assert state.server["clusters"] == clusters and 2 <= len(experts) <= 4
    assert len(set(clusters.values())) == len(experts) < 6
    begin = start(fed.strategy)
    assert all(np.abs(p[k] - begin[k]).max() > 5e-3 for p in ours for k in ("w", "a", "b", "router"))
    assert all(len(p["bank"]) == 4 for p in ours)  # room for four
    phases = list(seen.mixing.values())
    same = np.asarray([[clusters[k] == clusters[j] for j in range(6)] for k in range(6)])
    for log in phases:
        np.testing.assert_allclose(log["weights"], same / same.sum(1, keepdims=True), atol=1e-6)
    assert "distances" in phases[0] and "distances" not in phases[1]
    lora, w, router = 4 * RANK * (FEATURES + CLASSES), 4 * CLASSES * FEATURES, 4 * 7 * FEATURES
    up, down = fed.strategy.sent_bytes(state.population[0].adapters)
    assert up == {"text_adapter": lora, "expert_router": router, "projector": w}
    assert down == {"expert_bank": 4 * lora, "expert_router": router, "expert_slots": 4 * 7 * 5, "projector": w}
    assert state.bytes_up == 18 * sum(up.values()) and state.bytes_down == 18 * sum(down.values())


@pytest.mark.slow
def test_fedlease_of_parts_of_the_clients():
    """Newcomers warm up alone, join the nearest cluster and count from their next phase on; absent clusters stay."""
    settings = FederationConfig(rounds=4, local_epochs=EPOCHS, joins={"c5": 2, "c6": 3}, participation=[
        {"round": 3, "clients": ["c0", "c6"]}])
    fed = federation("fedlease", 7, settings, max_experts=3)
    state = run_toy(fed)
    cohorts = [range(5), range(5), range(6), [0, 6], range(7)]
    theirs, experts, clusters = lease(fed, cohorts)
    assert state.server["clusters"] == clusters and set(clusters) == set(range(7))
    agree([numbers(c.adapters) for c in state.population], theirs)
    bank = state.server["bank"]["layers"]["q"]
    for e, (a, b) in enumerate(experts):
        np.testing.assert_allclose(bank["a"][0, e], a, atol=3e-5)
        np.testing.assert_allclose(bank["b"][0, e], b, atol=3e-5)


def test_in_the_warm_up_a_client_has_its_own_lora_alone():
    """Its phase is that of plain LoRA, whatever the router and the bank are; the router does not move."""
    fed, plain = federation("fedlease", 2), federation("local", 2)
    settings = FederationConfig(rounds=1, local_epochs=EPOCHS, schedule="single")
    states = []
    for one in (fed, plain):
        one = toy_federation(make_strategy(one.strategy.name, schedule="single"), one.clients, settings)
        states.append(run_toy(one, toy_state(one)))
    begin = toy_adapters(fed.strategy)
    for k, (mine, theirs) in enumerate(zip(*(state.population for state in states), strict=True)):
        assert states[0].server["clusters"] == {0: 0, 1: 1}
        for factor in "ab":  # two clients make two clusters, so the mean is the own
            np.testing.assert_allclose(mine.adapters["text_adapter"]["layers"]["q"][factor],
                                       theirs.adapters["text_adapter"]["layers"]["q"][factor], atol=1e-6)
        assert tree_max_difference(mine.adapters["expert_router"], begin["expert_router"]) == 0, k


@pytest.mark.parametrize("seed", range(4))
def test_clusters_are_those_of_scikit_learn(seed):
    """Distances, silhouettes and clusters of LoRA in two layers and targets, around three centres."""
    rng = np.random.default_rng(seed)
    centre = np.sort(rng.integers(3, size=9))
    centres = {n: rng.normal(size=(3, 2, d, 2)) for n, d in (("q", 3), ("up", 5))}
    bs = {n: c[centre] + 0.4 * rng.normal(size=(9, *c.shape[1:])) for n, c in centres.items()}
    lora = {"layers": {n: {"a": rng.normal(size=(9, 2, 2, 4)), "b": np.float32(b)} for n, b in bs.items()}}
    want = mean([distances([b[layer] for b in bs[n]]) for n in bs for layer in range(2)])
    between = fedlease.distances_of_b(lora)
    np.testing.assert_allclose(between, want * (1 - np.eye(9)), atol=1e-6)
    labels, scores = clusters_by_sklearn(between, 6)
    np.testing.assert_array_equal(fedlease.allocated(between, 6), labels)
    for count in scores:
        some = AgglomerativeClustering(count, metric="precomputed", linkage="average").fit_predict(between)
        np.testing.assert_allclose(fedlease.silhouette(between, some), scores[count], atol=1e-12)
    np.testing.assert_array_equal(labels, np.unique(centre, return_inverse=True)[1])


def test_clusters_of_few_and_of_equal_clients():
    assert fedlease.allocated(np.zeros((1, 1)), 4).tolist() == [0]
    assert fedlease.allocated(np.zeros((2, 2)), 4).tolist() == [0, 1]
    assert fedlease.silhouette(np.zeros((3, 3)), np.asarray([0, 0, 1])) == 0.0
    assert set(fedlease.allocated(np.zeros((5, 5)), 4)) == {0, 1}
    lora = {"layers": {"q": {"b": np.zeros((2, 1, 3, 2), np.float32)}}}
    np.testing.assert_array_equal(fedlease.distances_of_b(lora), 1 - np.eye(2))
    with pytest.raises(InputError, match=r"strategy\.max_experts: .*greater than or equal to 2"):
        parse_config({"strategy": {"name": "fedlease", "max_experts": 1}})


def test_slots():
    """The first rows are the experts', with the own expert in its cluster's place; M − 1 more are the own expert's."""
    np.testing.assert_array_equal(fedlease.slot_table(3, 2, 1), [
        [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    for count in (1, 2, 3):
        for cluster in range(count):
            table = fedlease.slot_table(3, count, cluster)
            assert fedlease.cluster_of(table) == cluster and table.sum() == 2 * count - 1
            assert table[:, 0].sum() == count  # so that the M largest of 2M − 1 always have one of them
    alone = fedlease.slot_table(3)
    assert fedlease.cluster_of(alone) is None and alone.sum() == alone[:, 0].sum() == 1


# Runs.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedalt", "fedlease"])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, name):
    """Also after a phase in which one of the clusters was absent, and a client had not been there before."""
    config = parse_config({"strategy": {"name": name}, "federation": {
        "rounds": 3, "local_epochs": 2, "joins": {"c4": 2}, "participation": [{"round": 3, "clients": ["c0", "c4"]}]}})
    with toy_instead_of_model(toy_clients(SIZES[:5], ("t0", "t0", "t1", "t1", "t0"))):
        simulate.simulate(config, out=tmp_path / "whole")
        for phase in (1, 3):
            folder = tmp_path / f"killed-{phase}"
            with pytest.raises(Killed):
                simulate.simulate(config, out=folder, observers=[DiesAt(phase, "phase")])
            simulate.simulate(config, out=folder, resume=True)
            same_run(tmp_path / "whole", folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedalt", "fedlease"])
def test_clients_on_disk_end_with_the_same_bits(tmp_path, name):
    sections = {"strategy": {"name": name}, "federation": {"rounds": 2, "local_epochs": 2, "clients_per_round": 3}}
    with toy_instead_of_model(toy_clients(SIZES[:5], ("t0", "t0", "t1", "t1", "t0"))):
        whole = simulate.simulate(parse_config(sections))
        stored = simulate.simulate(parse_config(sections | {"system": {"store": str(tmp_path)}}))
    for key in ("adapters_sha256", "bytes_up", "bytes_down"):
        assert stored.summary[key] == whole.summary[key], key


@pytest.mark.long
@pytest.mark.parametrize("name", ["fedlease", "fedalt"])
def test_on_the_real_model(tmp_path, name):
    """Trains, goes on with the same bits after a kill, is restored and evaluated, and refuses to be one LoRA."""
    config = small_config(strategy={"name": name}, federation={"rounds": 2, "local_steps": 2},
                          data={"digits": {"train": 6}})
    run = simulate.simulate(config, out=tmp_path / "whole")
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        simulate.simulate(config, out=folder, observers=[DiesAt(2, "phase")])
    simulate.simulate(config, out=folder, resume=True)
    same_run(tmp_path / "whole", folder)
    back = restore.restore(folder)
    assert evaluate(back.evaluation, back.population) == run.summary["score_by_client"]
    begin = prepare.initial_adapters(run.federation)
    for client in run.population:
        for subtree in ("text_adapter", "expert_router", "expert_bank", "projector"):
            assert tree_max_difference(client.adapters[subtree], begin[subtree]) > 1e-6, subtree
    with pytest.raises(InputError, match=f"{name} mixes several LoRA for every token.*pilot-jax generate"):
        export_client(back, "vqa_0", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert isinstance(pilot_jax.answer(back, "vqa_0", None, "which digits are there?"), str)


def test_clusters_have_no_common_model():
    assert not make_strategy("fedlease").has_common_model() and not make_strategy("fedalt").has_common_model()
    assert make_strategy("fedavg").has_common_model() and make_strategy("ffa_lora").has_common_model()
