"""Tests of Ditto, FedAMP, FedMosaic and RoLoRA on the toy: their updates in NumPy float64, uploads, bytes, resuming."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy_federation
import pytest
from conftest import Records, slow_except, small_config, tree_max_difference
from numpy_federation import PHASES, average, federated, local_steps, numbers, problem
from resuming import goes_on_to_the_same_end
from test_strategies import ELSEWHERE

from pilot_jax.config import FederationConfig, apply_overrides, parse_config
from pilot_jax.errors import InputError
from pilot_jax.evaluation.personalised import evaluate, used_adapters
from pilot_jax.federation import executor, rounds
from pilot_jax.federation.cohort import Cohort
from pilot_jax.federation.observer import RunObserver
from pilot_jax.federation.roles import Roles
from pilot_jax.federation.state import all_steps, most_uploads
from pilot_jax.federation.strategies import make_strategy
from pilot_jax.runs import restore, simulate
from pilot_jax.runs.export import export_client
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

# The algorithms in NumPy. `shared` are the parameters that are trained: "wab", or "ab" with a frozen projector.


def begin(shared="wab"):
    return {k: v for k, v in toy_numbers().items() if k in "wab"}


def flat(models, keys):
    return np.stack([np.concatenate([m[k].ravel() for k in keys]) for m in models])


def ditto(data, strength, shared="wab"):
    """Li et al., 2021, algorithm 1. Returns the personal models under "personal", and the global one."""
    w, personal = begin(), [begin() for _ in data]
    for _ in range(PHASES):
        pull = lambda g, v, _, w=w: {k: g[k] + strength * (v[k] - w[k]) for k in g}  # noqa: E731
        personal = [local_steps(v, x, y, shared, pull)[0] for v, (x, y) in zip(personal, data, strict=True)]
        w = average([local_steps(w, x, y, shared)[0] for x, y in data], SIZES)
    return [{"": w, "personal_": v} for v in personal]


def rolora(data, shared="wab"):
    """Chen et al., 2024: B in the first phase, A in the second, and so on; the other factor is not touched."""
    model = begin()
    for phase in range(PHASES):
        trained = shared.replace("a" if phase % 2 == 0 else "b", "")
        model = average([local_steps(model, x, y, trained)[0] for x, y in data], SIZES)
    return [{"": model}] * len(data)


def attention(models, shared, sigma, step):
    """Huang et al., 2021: ξ_kj = α·A'(‖w_k − w_j‖²), with A'(x) = exp(−x/σ)/σ and α = step·σ."""
    rows = flat(models, shared)
    squares = np.sum((rows[:, None] - rows[None]) ** 2, axis=-1)
    count = len(models)
    sigma = squares.sum() / (count * (count - 1)) if sigma == "auto" else sigma
    alpha = (1 / count if step is None else step) * sigma
    xi = np.zeros((count, count))
    for k in range(count):
        for j in range(count):
            if j != k:
                xi[k, j] = alpha * np.exp(-squares[k, j] / sigma) / sigma
        xi[k, k] = 1 - xi[k].sum()
    return xi


def heuristic(models, shared, scale, own):
    """HeurFedAMP: ξ_kk is given, the others are e^{s·cos} / Σ_{h≠k} e^{s·cos}·(1 − ξ_kk)."""
    rows, count = flat(models, shared), len(models)
    own, xi = 1 / count if own is None else own, np.zeros((count, count))
    for k in range(count):
        for j in range(count):
            if j != k:
                xi[k, j] = np.exp(scale * rows[k] @ rows[j] / np.linalg.norm(rows[k]) / np.linalg.norm(rows[j]))
        xi[k] *= (1 - own) / xi[k].sum()
        xi[k, k] = own
    return xi


def fedamp(data, mu, weights, shared="wab"):
    """Huang et al., 2021: every client trains from its own w_k towards u_k = Σ_j ξ_kj·w_j."""
    models, clouds = [begin() for _ in data], [begin() for _ in data]
    for _ in range(PHASES):
        models = [local_steps(w, x, y, shared, lambda g, p, _, u=u: {k: g[k] + mu * (p[k] - u[k]) for k in g})[0]
                  for w, u, (x, y) in zip(models, clouds, data, strict=True)]
        clouds = [{k: sum(xi * w[k] for xi, w in zip(row, models, strict=True)) for k in "wab"}
                  for row in weights(models, shared)]
    return [{"": w, "cloud": u} for w, u in zip(models, clouds, strict=True)]


def fedmosaic(data, temperature, decay, shared="wab"):
    """The authors' code: a frozen mixture of the others' LoRAs, by the cosine of decayed gradients of B."""
    models, relevance = [dict(toy_numbers()) for _ in data], [None for _ in data]
    for _ in range(PHASES):
        done = [local_steps(p, x, y, shared) for p, (x, y) in zip(models, data, strict=True)]
        relevance = [mean["b"] if g is None else decay * g + (1 - decay) * mean["b"]
                     for g, (_, mean) in zip(relevance, done, strict=True)]
        models = [dict(p) for p, _ in done]
        unit = np.stack([g.ravel() / np.linalg.norm(g) for g in relevance])
        for k, model in enumerate(models):
            raw = {j: np.exp(unit[k] @ unit[j] / temperature) for j in range(len(data)) if j != k}
            for mixed, key in (("a2", "a"), ("b2", "b")):
                model[mixed] = sum(w / sum(raw.values()) * done[j][0][key] for j, w in raw.items())
    return [{"": p} for p in models]


FIXED = {"amp_sigma": 0.8, "amp_step": 0.35, "amp_mu": 0.7}
COSINE = {"amp_attention": "cosine", "amp_scale": 3.0, "amp_self": 0.2, "amp_mu": 0.7}
CASES = {
    "ditto": ("ditto", {"ditto_lambda": 0.7}, lambda d, s: ditto(d, 0.7, s)),
    "rolora": ("rolora", {}, rolora),
    "fedamp": ("fedamp", FIXED, lambda d, s: fedamp(d, 0.7, lambda m, s: attention(m, s, 0.8, 0.35), s)),
    "fedamp auto": ("fedamp", {}, lambda d, s: fedamp(d, 0.1, lambda m, s: attention(m, s, "auto", None), s)),
    "fedamp cosine": ("fedamp", COSINE, lambda d, s: fedamp(d, 0.7, lambda m, s: heuristic(m, s, 3.0, 0.2), s)),
    "fedmosaic": ("fedmosaic", {"relevance_temperature": 0.4, "relevance_decay": 0.3},
                  lambda d, s: fedmosaic(d, 0.4, 0.3, s)),
}
NAMES = tuple(dict.fromkeys(name for name, *_ in CASES.values()))


def test_these_are_the_strategies_that_test_strategies_leaves_out():
    assert set(NAMES) == ELSEWHERE - {"pilot", "split_half", "pilot_split_half", "fedalt", "fedlease"}


def models_of(adapters):
    """Returns a client's models under the names of the NumPy loops: "", "personal_" and "cloud"."""
    trained = {n.removeprefix("personal_"): t for n, t in adapters.items() if n.startswith("personal_")}
    own = {"private_adapter" if n == "others_adapter" else n: t for n, t in adapters.items()}
    out = {"": numbers(own)} | ({"personal_": numbers(trained)} if trained else {})
    return out | ({"cloud": numbers(adapters["cloud_model"])} if "cloud_model" in adapters else {})


@pytest.mark.parametrize(("case", "projector"), slow_except({(name, "trained") for name in NAMES}, [
    (case, projector) for case in CASES for projector in ("trained", "frozen")]))
def test_against_the_papers_own_update(case, projector, monkeypatch):
    name, settings, expected = CASES[case]
    state = run_toy(toy_federation(make_strategy(name, {**settings, "projector": projector})))
    if projector == "frozen":
        whole = numpy_federation.gradient
        monkeypatch.setattr(numpy_federation, "gradient", lambda p, x, y: whole(p, x, y) | {"w": np.zeros_like(p["w"])})
    plain = federated(problem())
    for client, want, average_of_all in zip(state.population, expected(problem(), "wab" if projector == "trained"
                                                                       else "ab"), plain, strict=True):
        got = models_of(client.adapters)
        assert set(got) == set(want) and ("projector" in client.adapters) == (projector == "trained")
        for kind, model in got.items():
            for key, value in model.items():
                np.testing.assert_allclose(value, want[kind][key], atol=2e-5, err_msg=f"{kind}{key}")
        last = got[list(got)[-1]]  # differs from FedAvg's model by far more than the tolerance
        assert max(np.abs(last[k] - average_of_all[k]).max() for k in "ab") > 1e-3


# What is sent, and when.

W, A, B = (4 * n for n in (CLASSES * FEATURES, RANK * FEATURES, CLASSES * RANK))
SENT = {  # bytes up and down of one client by phase
    "ditto": {(1, "personal1"): (0, 0), (1, "plain2"): (W + A + B,) * 2, (1, "personal3"): (0, 0),
              (1, "plain4"): (W + A + B,) * 2, (2, "personal"): (0, 0), (2, "plain"): (W + A + B,) * 2},
    "rolora": {(1, "train_b"): (W + B,) * 2, (1, "train_a"): (W + A,) * 2, (2, "train_b"): (W + B,) * 2,
               (3, "train_a"): (W + A,) * 2},
    "fedamp": {(1, "plain1"): (W + A + B,) * 2, (1, "plain2"): (W + A + B,) * 2, (2, "plain"): (W + A + B,) * 2},
    # LoRA and the gradient of B in the last layer, which is the toy's only one
    "fedmosaic": dict.fromkeys([(1, "plain1"), (1, "plain2"), (2, "plain")], (A + B + B, A + B)),
}


@pytest.mark.parametrize("name", slow_except({"fedmosaic"}, NAMES))
def test_bytes_of_each_phase(name):
    settings = FederationConfig(rounds=3 if name == "rolora" else 2, local_steps=1)
    fed, records = toy_federation(make_strategy(name), settings=settings), Records()
    run_toy(fed, observer=records)
    got = {(r["round"], r["phase"]): (r["bytes_up"] / 3, r["bytes_down"] / 3)
           for r in records.records if "bytes_up" in r}
    assert got == SENT[name]
    for (_, phase), arrays in records.mixing.items():
        rows = arrays["weights"]
        np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-6)
        if phase.startswith("personal"):
            np.testing.assert_array_equal(rows, np.eye(3))
        if name == "fedmosaic":
            np.testing.assert_array_equal(np.diag(rows), 0)


def test_a_returning_client_fetches_each_factor_that_has_changed():
    """c1 is absent in round 2, when B is trained, and c2 in rounds 2 and 3, when B and A are."""
    settings = FederationConfig(rounds=4, local_steps=1, participation=[
        {"round": 1, "clients": ["c0", "c1", "c2"]}, {"round": 2, "clients": ["c0"]},
        {"round": 3, "clients": ["c0", "c1"]}])
    fed = toy_federation(make_strategy("rolora"), settings=settings)
    state, fetched = toy_state(fed), {}
    while state.round <= 4:
        while (plan := rounds.begin_phase(fed, state)) is not None:
            fetched[plan.round, plan.stage] = plan.bytes_fetched
            trained, = executor.Executor().train([
                executor.Work(fed, plan.adapters, plan.round, plan.stage, plan.label)])
            state = rounds.finish_phase(fed, state, plan, trained, RunObserver())
        state = rounds.end_round(fed, state)
    assert fetched == {(1, "train_b"): 0, (1, "train_a"): 0, (2, "train_b"): 0, (3, "train_a"): W + B,
                       (4, "train_b"): W + A + B}
    assert [sorted({s for s in (st for st, c in all_steps(fed) if c == k)}) for k in range(3)] == [
        ["train_a", "train_b"]] * 3


def test_ditto_uploads_nothing_in_its_personal_phase():
    """Clipping and noise, which are for uploads, touch neither model, and only global phases count as uploads."""
    settings = FederationConfig(rounds=1, local_steps=1, privacy={"clip": 0.5, "noise_multiplier": 2.0})
    fed = toy_federation(make_strategy("ditto"), settings=settings)
    assert most_uploads(fed) == 2
    state = toy_state(fed)
    plan = rounds.begin_phase(fed, state)
    trained, = executor.Executor().train([executor.Work(fed, plan.adapters, 1, plan.stage, plan.label)])
    after = rounds.finish_phase(fed, state, plan, trained, RunObserver())
    assert plan.stage == "personal" and after.uploads == (0, 0, 0) and after.bytes_up == 0
    for k, client in enumerate(after.population):
        assert trained.records[k]["update_norm"] == 0
        assert tree_max_difference(client.adapters["text_adapter"], state.server["model"]["text_adapter"]) == 0
        assert tree_max_difference(client.adapters["personal_text_adapter"],
                                   state.population[k].adapters["personal_text_adapter"]) > 1e-3
    assert tree_max_difference(after.server, state.server) == 0


def test_ditto_is_fedavg_and_answers_with_the_personal_models():
    fed = toy_federation(make_strategy("ditto"))
    state, average_of_all = run_toy(fed), run_toy(toy_federation(make_strategy("fedavg")))
    for mine, other in zip(state.population, average_of_all.population, strict=True):
        for name in ("text_adapter", "projector"):
            assert tree_max_difference(mine.adapters[name], other.adapters[name]) < 1e-6
        used = used_adapters(fed, mine)
        assert set(used) == {"text_adapter", "projector"} and mine.stage == "personal"
        assert all(tree_max_difference(used[n], mine.adapters[f"personal_{n}"]) == 0 for n in used)
        assert tree_max_difference(used["projector"], mine.adapters["projector"]) > 1e-3


def test_the_model_reads_one_subtree_for_a_name():
    rows = [*make_strategy("ditto").roles().rows]
    rows[-1] = dataclasses.replace(rows[-1], modes={"personal": "trained", "plain": "frozen"})
    with pytest.raises(AssertionError, match="in plain, two subtrees have one name in the model"):
        Roles(tuple(rows)).check(toy_adapters(make_strategy("ditto")))


@pytest.mark.parametrize(("name", "settings"), slow_except((), [
    ("ditto", {"ditto_lambda": 0.0}), ("fedmosaic", {}), ("fedamp", {"amp_mu": 0.0})]))
def test_without_the_others_it_is_local_training(name, settings):
    """Ditto without its term, FedAMP without its own, and FedMosaic with one client, are local training."""
    clients = toy_clients()[:1] if name == "fedmosaic" else toy_clients()
    fed = toy_federation(make_strategy(name, settings), clients)
    state, alone = run_toy(fed), run_toy(toy_federation(make_strategy("local"), clients))
    for mine, other in zip(state.population, alone.population, strict=True):
        used = used_adapters(fed, mine)
        assert all(tree_max_difference(used[n], other.adapters[n]) < 1e-6 for n in ("text_adapter", "projector"))
        if name == "fedmosaic":  # there is nobody whose LoRA could be mixed, so the initial one stays, with B = 0
            assert not np.any(mine.adapters["others_adapter"]["layers"]["q"]["b"])


@pytest.mark.parametrize(("schedule", "expected"), [
    ("first_time", [("train_b", "train_a"), ("train_b",), ("train_a",), ("train_b",)]),
    ("single", [("train_b",), ("train_a",), ("train_b",), ("train_a",)]),
    ("every_round", [("train_b", "train_a")] * 4)])
def test_rolora_alternates_from_phase_to_phase(schedule, expected):
    strategy = make_strategy("rolora", schedule=schedule)
    assert [strategy.stages(round_ == 1, round_) for round_ in (1, 2, 3, 4)] == expected


def test_fedamp_refuses_settings_that_give_no_mixture():
    lora = {"layers": {"q": {"a": np.ones((4, 1, 2, 3), np.float32), "b": np.ones((4, 1, 3, 2), np.float32)}}}
    cohort = Cohort({"text_adapter": lora}, np.ones(4, int), np.zeros(4, int), np.arange(4), 1)
    np.testing.assert_allclose(make_strategy("fedamp").mix(cohort), np.full((4, 4), 1 / 4), atol=1e-6)
    with pytest.raises(InputError, match=r"strategy\.amp_step: 0\.5 gives the 3 other .* at most 0\.333, or to null"):
        make_strategy("fedamp", {"amp_step": 0.5}).mix(cohort)
    for key, bad in (("amp_sigma", 0), ("amp_sigma", "much"), ("amp_self", 1), ("ditto_lambda", -1),
                     ("relevance_temperature", 0)):
        with pytest.raises(InputError, match=rf"strategy\.{key}"):
            parse_config({"strategy": {"name": "fedamp", key: bad}})


# Whole runs.


@pytest.mark.parametrize(("name", "chunks"), slow_except({("ditto", 3)}, [
    (name, chunks) for name in NAMES for chunks in (1, 2, 3, 4, 5)]))
def test_a_stopped_run_goes_on_to_the_same_end(on_toy, tmp_path, name, chunks):
    whole = goes_on_to_the_same_end(apply_overrides(on_toy, [f"strategy.name={name}"]), tmp_path / "run", chunks)
    back = restore.restore(tmp_path / "run")
    assert tree_max_difference(back.population[1].adapters, whole.population[1].adapters) == 0


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_on_the_real_model(tmp_path, name):
    """A run of the small model is evaluated, restored to the same scores, and exported."""
    config = small_config(strategy={"name": name}, federation={"local_steps": 1, "rounds": 2},
                          data={"digits": {"train": 4}})
    run = simulate.simulate(config, out=tmp_path / "run")
    back = restore.restore(tmp_path / "run")
    assert evaluate(back.evaluation, back.population) == run.summary["score_by_client"]
    export_client(back, "vqa_0", tmp_path / "vqa_0")
    assert "| stage of the connector | plain |" in (tmp_path / "vqa_0" / "README.md").read_text()
    assert (tmp_path / "vqa_0" / "adapter_model.safetensors").stat().st_size > 0
    assert (tmp_path / "vqa_0" / "connector.safetensors").stat().st_size > 0
