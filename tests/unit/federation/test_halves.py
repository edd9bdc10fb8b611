"""Tests of the split-half measure against NumPy float64 and a Gaussian model, and of the strategies that use it."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from conftest import slow_except, small_config, tree_max_difference
from numpy_federation import gradient, numbers, problem
from resuming import goes_on_to_the_same_end

from pilot_jax.config import FederationConfig, PrivacyConfig, apply_overrides
from pilot_jax.data.arrays import halved_order
from pilot_jax.errors import InputError
from pilot_jax.evaluation.personalised import evaluate
from pilot_jax.federation.cohort import Cohort
from pilot_jax.federation.halves import SKETCH, SKETCH_SIZE, measure, no_evidence, shares, sketch, with_phase
from pilot_jax.federation.observer import RunObserver
from pilot_jax.federation.strategies import make_strategy
from pilot_jax.federation.strategies.pilot import AtaConfig
from pilot_jax.runs import restore, simulate
from pilot_jax.runs.export import export_client
from pilot_jax.testing.toy import DESCENT, run_toy, toy_clients, toy_federation, toy_numbers

MATRIX = np.asarray([[0.7, 0.3, 0], [0.2, 0.5, 0.3], [0, 0, 1]], np.float32)
OWN = make_strategy("split_half", {"projector_from": "own"}).params  # LoRA alone is mixed
ONE_STEP = FederationConfig(rounds=1, local_epochs=1, schedule="single")


class Ratios(RunObserver):
    """Keeps the ratios and the weights of every phase."""

    def __init__(self, name="ratio"):
        self.name, self.ratios, self.weights = name, [], []

    def phase_ended(self, state, record, mixing, used):
        self.ratios.append(np.asarray(mixing[self.name]))
        self.weights.append(np.asarray(mixing["weights"]))


def lora_gradient(client, half, names="ab"):
    """Returns the signed roots of the gradient of LoRA's entries, A and then B, on a half of a toy client's samples, at
    the start; with the names "w", of the projector's."""
    x, y = problem()[client]
    g = gradient({k: v for k, v in toy_numbers().items() if k in "wab"}, x[half], y[half])
    entries = np.concatenate([g[name].ravel() for name in names])
    return np.sign(entries) * np.sqrt(np.abs(entries))


def test_measure_is_the_formula():
    halves = np.random.default_rng(0).normal(size=(5, 2, 40))
    apart, noise = (np.asarray(x) for x in measure(halves.astype(np.float32)))
    a, b = halves[:, 0], halves[:, 1]
    for k in range(5):
        assert noise[k] == pytest.approx(((a[k] - b[k]) ** 2).sum() / 4, rel=1e-5)
        for j in range(5):
            assert apart[k, j] == pytest.approx((a[k] - a[j]) @ (b[k] - b[j]), abs=1e-4)


def test_measure_is_unbiased_in_a_gaussian_model():
    """Halves with independent noise of variance 2s² per entry: E δ²_kj = ‖θ_k − θ_j‖², E σ²_k = P·s²."""
    rng, entries = np.random.default_rng(1), 2000
    truth = rng.normal(size=(3, entries)) * np.asarray([0.0, 0.0, 0.5])[:, None]
    spread = np.asarray([0.5, 1.0, 2.0])
    draws = [measure((truth[:, None] + rng.normal(size=(3, 2, entries)) * spread[:, None, None] * np.sqrt(2)
                      ).astype(np.float32)) for _ in range(300)]
    apart, noise = (np.mean([np.asarray(d[i]) for d in draws], axis=0) for i in (0, 1))
    np.testing.assert_allclose(noise, entries * spread**2, rtol=0.01)
    want = ((truth[:, None] - truth[None]) ** 2).sum(-1)
    # The standard error of an entry is below ‖a_k − a_j‖‖b_k − b_j‖/√(entries · draws).
    scale = (want + 2 * entries * (spread[:, None] ** 2 + spread[None] ** 2)) / np.sqrt(entries * 300)
    assert (np.abs(apart - want)[~np.eye(3, dtype=bool)] < 4 * scale[~np.eye(3, dtype=bool)]).all()


def test_a_sketch_is_exact_while_it_fits_and_keeps_inner_products_beyond():
    rng = np.random.default_rng(2)
    small = {"a": rng.normal(size=(2, 3, 5)), "b": rng.normal(size=(2, 4))}
    flat = np.concatenate([small["a"].reshape(2, -1), small["b"]], axis=1)
    np.testing.assert_allclose(np.asarray(sketch(small, 32))[:, :19], flat, rtol=1e-6)
    size, entries = 1024, 50_000
    one, other = ({"x": rng.normal(size=(2, entries)).astype(np.float32)} for _ in range(2))
    both = jax.tree.map(np.add, one, other)
    for u, v in ((one, one), (one, other), (both, other)):
        got = np.asarray(sketch(u, size), np.float64)[0] @ np.asarray(sketch(v, size), np.float64)[1]
        x, y = u["x"][0].astype(np.float64), v["x"][1].astype(np.float64)
        assert abs(got - x @ y) < 5 * np.linalg.norm(x) * np.linalg.norm(y) / np.sqrt(size)
    np.testing.assert_allclose(sketch(both, size), sketch(one, size) + sketch(other, size), atol=1e-3)


def test_batches_have_one_half_from_each_half_of_the_data():
    order, real = halved_order(np.random.default_rng(0), 11, 4, 6)  # 6 and 5 samples, three steps an epoch
    assert order.shape == real.shape == (6, 4)
    assert (order[:, :2][real[:, :2]] % 2 == 0).all() and (order[:, 2:][real[:, 2:]] % 2 == 1).all()
    for epoch in (slice(0, 3), slice(3, 6)):
        assert sorted(order[epoch][real[epoch]]) == list(range(11))
    order, real = halved_order(np.random.default_rng(0), 1, 4, 2)
    assert real.sum() == 2 and (order[real] == 0).all()


def test_the_ratio_is_that_of_the_clients_own_gradients():
    """One full-batch step of SGD, against gradients of the halves in NumPy float64."""
    seen = Ratios()
    state = run_toy(toy_federation(make_strategy("split_half", schedule="single"), settings=ONE_STEP), observer=seen)
    a, b = (np.stack([lora_gradient(k, slice(first, None, 2)) for k in range(3)]) for first in (0, 1))
    for k in range(3):
        kept = np.asarray(state.population[k].adapters[SKETCH]["text_adapter"])[:, :a.shape[1]]
        np.testing.assert_allclose(kept, np.stack([a[k], b[k]]), atol=1e-6)
    want = np.asarray([[(a[k] - a[j]) @ (b[k] - b[j]) / (((a[k] - b[k]) ** 2).sum() / 4) for j in range(3)]
                       for k in range(3)])
    np.testing.assert_allclose(seen.ratios[0], want, atol=1e-4)
    sizes = np.asarray([4, 8, 6])
    for k in range(3):
        raw = [sizes[j] * (1.0 if j == k else min(max(1 - want[k, j] / 0.5, 0), 1)) for j in range(3)]
        np.testing.assert_allclose(seen.weights[0][k], np.asarray(raw) / sum(raw), atol=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_halved_full_batches_are_plain_full_batches(optimizer):
    """The halves' losses are weighted by their samples, so that local training is the same but for rounding."""
    train = DESCENT.model_copy(update={"optimizer": optimizer, "lr_connector": 0.05, "lr_lora_stage1": 0.05})
    kind = type("Alone", (type(make_strategy("split_half")),), {
        "mix": lambda self, cohort: np.eye(len(cohort), dtype=np.float32)})
    alone, local = (run_toy(toy_federation(strategy, train=train)) for strategy in (kind(OWN), make_strategy("local")))
    for one, other in zip(alone.population, local.population, strict=True):
        ours = {n: t for n, t in one.adapters.items() if n != SKETCH}
        assert tree_max_difference(ours, other.adapters) < 1e-5


def test_mixtures_are_of_changes():
    """start + W·(upload − start) of LoRA in NumPy float64, in a second round, where the starts differ."""
    kind = type("Given", (type(make_strategy("split_half")),), {"mix": lambda self, cohort: MATRIX})
    settings = FederationConfig(rounds=1, local_epochs=3, schedule="single")
    first = run_toy(toy_federation(kind(OWN, schedule="single"), settings=settings))
    starts = [numbers(one.adapters) for one in first.population]
    assert np.abs(starts[0]["w"] - starts[1]["w"]).max() > 1e-3
    fed = toy_federation(kind(OWN, schedule="single"), settings=settings.model_copy(update={"rounds": 2}))
    alone = type("Alone", (kind,), {"mix": lambda self, cohort: np.eye(3, dtype=np.float32)})
    local = run_toy(dataclasses.replace(fed, strategy=alone(OWN, schedule="single")), first)
    mixed = run_toy(fed, first)
    for k in range(3):
        for key in "wab":
            changes = [numbers(local.population[j].adapters)[key] - starts[j][key] for j in range(3)]
            weights = np.eye(3)[k] if key == "w" else MATRIX[k]  # the projector is the client's own
            want = starts[k][key] + sum(float(weights[j]) * changes[j] for j in range(3))
            np.testing.assert_allclose(numbers(mixed.population[k].adapters)[key], want, atol=1e-6, err_msg=key)


def test_the_projector_is_mixed_by_its_own_measure():
    """The measure of the projector's gradients and the mixture of its changes, in NumPy float64 after one full-batch
    step of SGD; LoRA is mixed as without."""
    seen, settings = Ratios("ratio_projector"), ONE_STEP

    def run(observer=None, **params):
        limits = {"split_half_limit": 5.0, "projector_limit": 20.0}
        return run_toy(toy_federation(make_strategy("split_half", limits | params,
                                                    schedule="single"), settings=settings), observer=observer)

    mixed, own = run(seen), run(projector_from="own")
    alone = run_toy(toy_federation(make_strategy("local", schedule="single"), settings=settings))
    a, b = (np.stack([lora_gradient(k, slice(first, None, 2), "w") for k in range(3)]) for first in (0, 1))
    want = np.asarray([[(a[k] - a[j]) @ (b[k] - b[j]) / (((a[k] - b[k]) ** 2).sum() / 4) for j in range(3)]
                       for k in range(3)])
    np.testing.assert_allclose(seen.ratios[0], want, atol=1e-3)
    start, sizes = toy_numbers()["w"], np.asarray([4, 8, 6])
    changes = [numbers(alone.population[j].adapters)["w"] - start for j in range(3)]
    for k in range(3):
        raw = [sizes[j] * (1.0 if j == k else min(max(1 - want[k, j] / 20, 0), 1)) for j in range(3)]
        assert sum(weight > 0 for weight in raw) > 1
        found = numbers(mixed.population[k].adapters)
        expected = start + sum(weight / sum(raw) * changes[j] for j, weight in enumerate(raw))
        np.testing.assert_allclose(found["w"], expected, atol=1e-5)
        for key in "ab":
            np.testing.assert_allclose(found[key], numbers(own.population[k].adapters)[key], atol=1e-6)
    for whose, names in (("others", {"text_adapter", "projector", SKETCH}), ("own", {"text_adapter", SKETCH})):
        strategy = make_strategy("split_half", {"projector_from": whose})
        assert set(strategy.ownership().uploaded("plain")) == names


def test_evidence_is_of_the_phases_that_two_clients_share():
    halves = np.random.default_rng(3).normal(size=(4, 2, 30)).astype(np.float32)
    both, _ = with_phase(no_evidence(4), halves[[0, 1]], np.asarray([0, 1]), np.zeros(2, bool))
    later, ratio = with_phase(both, halves[[2, 3]], np.asarray([1, 3]), np.zeros(2, bool))
    apart, noise = (np.asarray(x) for x in measure(halves[[2, 3]]))
    assert later["apart"][1, 3] == pytest.approx(apart[0, 1]) and later["apart"][0, 3] == 0
    assert later["apart"][0, 1] == both["apart"][0, 1] and later["noise"][1, 0] == both["noise"][1, 0]
    assert ratio[0, 1] == pytest.approx(apart[0, 1] / noise[0], rel=1e-5)
    assert both["apart"][1, 3] == 0  # the evidence before is not changed


def test_a_new_client_is_compared_by_first_phases():
    """Clients 0 and 1 begin; client 2 is new in their second phase, when the gradients of 0 and 1 are elsewhere."""
    halves = np.random.default_rng(5).normal(size=(5, 2, 30))
    first, second = halves[:2], halves[2:]
    known, ratio = with_phase(no_evidence(3), first.astype(np.float32), np.arange(2), np.ones(2, bool))
    assert np.isfinite(ratio).all()
    kept, ratio = with_phase(known, second.astype(np.float32), np.asarray([0, 2, 1]), np.asarray([False, True, False]))
    ended, _ = with_phase(kept, second.astype(np.float32), np.asarray([0, 2, 1]), np.asarray([False, True, False]))

    def apart(x, y):
        return (x[0] - y[0]) @ (x[1] - y[1])

    def noise(x):
        return ((x[0] - x[1]) ** 2).sum() / 4

    for k in (0, 1):
        of_first = apart(second[1], first[k])
        assert kept["apart"][2, k] == pytest.approx(of_first, abs=1e-4)
        assert kept["apart"][k, 2] == pytest.approx(of_first, abs=1e-4)
        assert kept["noise"][2, k] == pytest.approx(noise(second[1]), rel=1e-5)
        assert kept["noise"][k, 2] == pytest.approx(noise(first[k]), rel=1e-5)
    assert kept["apart"][0, 1] == pytest.approx(apart(*first) + apart(second[0], second[2]), abs=1e-4)
    np.testing.assert_allclose(ratio[1, [0, 2]], kept["apart"][2, [0, 1]] / kept["noise"][2, [0, 1]], rtol=1e-5)
    assert np.isinf(ratio[[0, 2], 1]).all()  # until the new client has taken a mixture, others take nothing from it
    assert (ended["apart"][2] == kept["apart"][2]).all()  # of its first phase alone, in the round in which it is new
    assert [known["first"][k].shape for k in (0, 1)] == [(2, 30)] * 2
    assert kept["first"] == ended["first"] == dict.fromkeys((0, 1, 2))  # nobody else can be new


def test_first_sketches_are_kept_only_until_every_client_is_known():
    """They are most of the server's state in a snapshot; a client that takes part in round 1 is known from then on."""
    strategy = make_strategy("split_half")
    clients = toy_clients((8, 8, 8), ("t0",) * 3)
    for joins, known in (({}, [None] * 3), ({"c2": 3}, [(2, SKETCH_SIZE)] * 2)):
        settings = FederationConfig(rounds=2, local_epochs=1, joins=joins)
        state = run_toy(toy_federation(strategy, clients, settings=settings))
        for evidence in state.server["evidence"].values():
            assert [None if one is None else one.shape for one in evidence["first"].values()] == known


def test_a_new_client_takes_models_and_others_changes():
    """A new client has missed the earlier changes: its row is w·uploads, all others start + w·(uploads − starts)."""
    rng = np.random.default_rng(6)
    uploads, starts = (rng.normal(size=(4, 5, 3)).astype(np.float32) for _ in range(2))
    ratio, sizes = np.full((4, 4), 0.2), np.asarray([4, 8, 6, 5])
    ratio[:, 2] = np.inf
    weights = shares(ratio, sizes, 0.5).astype(np.float64)
    cohort = Cohort({"text_adapter": {"w": uploads}}, sizes, np.zeros(4, int), np.arange(4), 3,
                    {"text_adapter": {"w": starts}}, np.asarray([False, False, True, False]), {"text_adapter": ratio})
    want = starts + np.einsum("kj,jab->kab", weights, uploads.astype(np.float64) - starts)
    want[2] = np.einsum("j,jab->ab", weights[2], uploads.astype(np.float64))
    strategy = make_strategy("split_half", {"projector_from": "own"})
    np.testing.assert_allclose(strategy.aggregate(cohort, {}).downloads["text_adapter"]["w"], want, atol=1e-5)
    everyone = dataclasses.replace(cohort, new=np.ones(4, bool))
    plain = starts + np.einsum("kj,jab->kab", weights, uploads.astype(np.float64) - starts)
    np.testing.assert_allclose(strategy.aggregate(everyone, {}).downloads["text_adapter"]["w"], plain, atol=1e-5)


def test_a_newcomer_takes_from_clients_like_itself():
    """All clients have the same samples, and the third joins in round 3."""
    seen, one = Ratios(), toy_clients((16,), ("t0",))[0]
    clients = tuple(dataclasses.replace(one, name=f"c{k}") for k in range(3))
    settings = FederationConfig(rounds=4, local_epochs=1, joins={"c2": 3})
    run_toy(toy_federation(make_strategy("split_half"), clients, settings=settings), observer=seen)
    first, second = [w for w in seen.weights if len(w) == 3]
    assert first[2, :2].sum() > 0.3 and (first[:2, 2] == 0).all()
    assert second[:2, 2].min() > 0


@pytest.mark.parametrize(("ratio", "limit", "weights"), [
    ([[0, 5], [5, 0]], 1.0, [[1, 0], [0, 1]]), ([[0, -1], [0, 0]], 1.0, [[0.25, 0.75], [0.25, 0.75]]),
    ([[0, 0.5], [1, 0]], 1.0, [[0.4, 0.6], [0, 1]]), ([[0, 1], [1, 0]], 2.0, [[0.4, 0.6], [1 / 7, 6 / 7]]),
    ([[0, np.inf], [np.inf, 0]], 1.0, [[1, 0], [0, 1]])])
def test_shares(ratio, limit, weights):
    np.testing.assert_allclose(shares(np.asarray(ratio, float), np.asarray([1, 3]), limit), weights, atol=1e-6)


@pytest.mark.parametrize(("name", "chunks"), slow_except({("split_half", 3)}, [
    ("split_half", chunks) for chunks in (1, 2, 3, 4, 5)]))
def test_a_stopped_run_goes_on_to_the_same_end(on_toy, tmp_path, name, chunks):
    goes_on_to_the_same_end(apply_overrides(on_toy, [f"strategy.name={name}"]), tmp_path / "run", chunks)


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_a_run_with_a_newcomer_goes_on_to_the_same_end(on_toy, tmp_path, chunks):
    """What is kept of first phases is in the snapshot that the newcomer's round begins with."""
    config = apply_overrides(on_toy, ["strategy.name=split_half", "federation.rounds=3", "federation.joins={c2: 3}"])
    goes_on_to_the_same_end(config, tmp_path / "run", chunks)


@pytest.mark.long
@pytest.mark.parametrize("name", ["split_half", "pilot_split_half"])
def test_on_the_real_model(tmp_path, name):
    """A run of the small model is evaluated, resumed to the same models, restored to the same scores, and exported."""
    config = small_config(strategy={"name": name}, federation={"local_steps": 2, "rounds": 2, "joins": {"vqa_0": 2}},
                          data={"digits": {"train": 4}})
    goes_on_to_the_same_end(config, tmp_path / "part", 4)
    run = simulate.simulate(config, out=tmp_path / "run")
    back = restore.restore(tmp_path / "run")
    assert evaluate(back.evaluation, back.population) == run.summary["score_by_client"]
    export_client(back, "vqa_0", tmp_path / "vqa_0")
    assert (tmp_path / "vqa_0" / "adapter_model.safetensors").stat().st_size > 0


@pytest.mark.parametrize("without", [{"ata": {"preset": "notes"}}, {"text_aggregation": "mean"}])
def test_keys_of_ata_that_are_not_read_change_nothing(without):
    """With the preset `notes`, or without ATA, nothing is measured and models are mixed."""
    ata = {"weighting": "split_half", "mixes": "updates"} | without.get("ata", {})
    strategy = make_strategy("pilot_split_half", {**without, "ata": ata})
    assert not strategy.splits_halves and not strategy.mixes_updates
    assert SKETCH not in strategy.ownership().names()


def test_an_odd_batch_is_refused():
    odd = DESCENT.model_copy(update={"batch_size": 7})
    with pytest.raises(InputError, match=r"train\.batch_size: 7 is odd.*Set it to 8"):
        run_toy(toy_federation(make_strategy("split_half"), toy_clients(), train=odd))


def test_privacy_is_refused():
    private = ONE_STEP.model_copy(update={"privacy": PrivacyConfig(clip=1.0, noise_multiplier=1.0)})
    with pytest.raises(InputError, match=r"federation\.privacy\.clip: split_half measures .*such as pilot"):
        _ = toy_federation(make_strategy("split_half", schedule="single"), settings=private).noise_multiplier


def test_a_client_with_one_sample_and_no_noise_takes_nothing():
    seen = Ratios()
    state = run_toy(toy_federation(make_strategy("split_half"), toy_clients((1, 6, 6), ("t0",) * 3)), observer=seen)
    assert np.isfinite(seen.weights[-1]).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.population[0].adapters))


def test_a_config_that_sets_other_keys_of_ata_keeps_split_half_weights():
    given = make_strategy("pilot_split_half", {"ata": {"cap_one": 0.2, "neighbors": 3}}).params.ata
    assert (given.weighting, given.mixes, given.cap_one, given.neighbors) == ("split_half", "updates", 0.2, 3)
    assert make_strategy("pilot_split_half", {"ata": {"weighting": "softmax"}}).params.ata.weighting == "softmax"
    assert make_strategy("pilot_split_half").params.ata == AtaConfig(weighting="split_half", mixes="updates")
