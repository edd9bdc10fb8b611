"""Tests of differential privacy: clipping, noise and ε, against formulas written out in this file."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest
from conftest import Records, small_config, tree_max_difference
from scipy.stats import kstest, norm

from pilot_jax.config import FederationConfig, PrivacyConfig, TrainConfig
from pilot_jax.errors import InputError
from pilot_jax.federation import executor, privacy, rounds, uploads
from pilot_jax.federation.state import Trained
from pilot_jax.federation.strategies import make_strategy
from pilot_jax.runs import prepare, simulate
from pilot_jax.testing import audit, toy


def delta_of(epsilon: float, mu: float) -> float:
    """Returns δ(ε) of a Gaussian mechanism with sensitivity/deviation μ (Balle and Wang, ICML 2018, theorem 8)."""
    return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize(("z", "uploads"), [(1.0, 1), (4.0, 4), (20.0, 16), (0.7, 2)])
def test_epsilon_is_the_accountants_and_the_closed_form(z, uploads):
    """ε agrees with the closed form and with an accountant that composes releases; the RDP accountant bounds it."""
    import dp_accounting

    got = privacy.epsilon(z, uploads, 1e-5)
    assert delta_of(got, math.sqrt(uploads) / z) <= 1e-5 * 1.001  # ε is large enough
    assert delta_of(0.99 * got, math.sqrt(uploads) / z) > 1e-5  # 1 % less would be too small
    pld = dp_accounting.pld.PLDAccountant()
    pld.compose(dp_accounting.GaussianDpEvent(z), uploads)
    assert abs(pld.get_epsilon(1e-5) / got - 1) < 1e-3
    rdp = dp_accounting.rdp.RdpAccountant()
    rdp.compose(dp_accounting.GaussianDpEvent(z), uploads)
    assert got <= rdp.get_epsilon(1e-5) <= 1.5 * got
    assert privacy.epsilon(z, 0, 1e-5) == 0


@pytest.mark.parametrize("target", [1.0, 4.0, 8.0])
def test_noise_for_an_epsilon(target):
    z = privacy.multiplier(PrivacyConfig(clip=1, epsilon=target), 4)
    assert 0.999 * target <= privacy.epsilon(z, 4, 1e-5) <= 1.001 * target
    assert privacy.multiplier(PrivacyConfig(clip=1, noise_multiplier=3), 4) == 3


def test_clip_and_noise():
    start = {"a": np.float32([1, 1]), "b": {"c": np.ones((200, 200), np.float32)}}
    upload = {"a": np.float32([4, 5]), "b": {"c": np.ones((200, 200), np.float32)}}  # a change of norm 5
    rng = np.random.default_rng(0)
    none = privacy.noised(upload, start, 2.5, 0.0, rng)
    np.testing.assert_allclose(none["a"], [2.5, 3], rtol=1e-6)
    assert none["a"].dtype == np.float32 and (privacy.noised(upload, start, 10.0, 0.0, rng)["a"] == upload["a"]).all()
    noisy = privacy.noised(upload, start, 2.5, 0.3, rng)["b"]["c"] - 1
    assert abs(noisy.std() - 0.3) < 0.005 and abs(noisy.mean()) < 0.006  # 40,000 draws: 4 standard errors
    broken = privacy.noised({**upload, "a": np.float32([np.nan, 1])}, start, 2.5, 0.0, rng)
    assert (broken["a"] == start["a"]).all()


def test_the_operating_systems_noise_is_normal(monkeypatch):
    """Each number is the quantile of the 53 high bits that were drawn; 100,000 follow the normal distribution."""
    drawn = privacy.SystemNoise().standard_normal((250, 400))
    assert drawn.shape == (250, 400) and kstest(drawn.ravel(), norm.cdf).statistic < 0.01
    assert np.abs(np.corrcoef(drawn[:2])[0, 1]) < 0.25
    bits = np.asarray([0, 2**63, 2**64 - 1, 12345 << 40], np.uint64)
    monkeypatch.setattr(privacy.os, "urandom", lambda count: bits.tobytes())
    shares = [(int(b) // 2**11 + 0.5) / 2**53 for b in bits]
    np.testing.assert_allclose(privacy.SystemNoise().standard_normal((4,)), norm.ppf(shares), rtol=1e-12)


def noisy_federation(name="fedavg", sizes=(8, 2, 6), **changes):
    settings = {"rounds": 1, "local_steps": 2, "privacy": {"clip": 0.5, "noise_multiplier": 1.0, **changes}}
    return toy.toy_federation(make_strategy(name), toy.toy_clients(sizes, ("t0",) * len(sizes)),
                              settings=FederationConfig(**settings))


def upload_of(fed, seed_of_run=0):
    fed = dataclasses.replace(fed, seed=seed_of_run)
    start = toy.toy_adapters(fed.strategy)
    after = jax.tree.map(lambda x: x + 1, start)
    return uploads.after_upload(fed, 0, 1, "plain", "plain", start, after)[0]


def test_noise_repeats_only_with_a_seed_of_its_own():
    """The seed of the run, which results name, says nothing about the noise."""
    secret, seeded = noisy_federation(), noisy_federation(seed=5)
    assert tree_max_difference(upload_of(secret), upload_of(secret)) > 0.1
    assert tree_max_difference(upload_of(seeded), upload_of(seeded, seed_of_run=1)) == 0
    assert tree_max_difference(upload_of(seeded), upload_of(noisy_federation(seed=6))) > 0.1


def test_several_processes_need_a_common_seed(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match=r"federation\.privacy\.seed: the processes"):
        _ = noisy_federation().noise_multiplier
    assert noisy_federation(seed=5).noise_multiplier == 1.0


@pytest.mark.parametrize("name", ["fedavg", "feddpa"])
def test_sizes_do_not_reach_the_server(name):
    """With privacy, the same uploads give the same means whatever the numbers of samples are; without, they do not."""
    def mixed(fed):
        state, seen = toy.toy_state(fed), Records()
        plan = rounds.begin_phase(fed, state)
        adapters = {k: jax.tree.map(lambda x, k=k: x + 0.1 * k, plan.adapters[0]) for k in range(3)}
        trained = Trained(adapters, {k: {"step": 2, "loss": 1.0, "update_norm": 1.0} for k in range(3)})
        after = rounds.finish_phase(fed, state, plan, trained, seen)
        return [seen.mixing[1, plan.label]["weights"], after.server, [one.adapters for one in after.population]]

    sizes = (8, 2, 6), (2, 6, 8)
    one, other = (mixed(noisy_federation(name, n, seed=1)) for n in sizes)
    assert tree_max_difference(one, other) == 0
    one, other = (mixed(dataclasses.replace(noisy_federation(name, n), settings=FederationConfig())) for n in sizes)
    assert tree_max_difference(one, other) > 1e-3


@pytest.mark.parametrize(("epsilon", "count"), [(1.0, 1), (4.0, 2)])
def test_an_attack_proves_less_than_the_promise_and_more_if_the_noise_is_too_small(epsilon, count):
    promise, rng = PrivacyConfig(clip=0.7, epsilon=epsilon), np.random.default_rng(0)
    assert 0.1 * epsilon < audit.worst_case(promise, count, 4000, rng) < epsilon

    def quarter(upload, start, clip, deviation, rng):
        return privacy.noised(upload, start, clip, deviation / 4, rng)

    assert audit.worst_case(promise, count, 4000, rng, quarter) > epsilon


def test_canaries_in_the_data_stay_hidden():
    """A client is trained on two data sets, one of them with wrong labels. Whoever sees its upload, and knows both
    outcomes of training, cannot tell them apart beyond ε."""
    clients = toy.toy_clients((8, 2, 6), ("t0",) * 3)
    labels = (clients[0].train["target_ids"] + 1) % toy.CLASSES
    canary = dataclasses.replace(clients[0], train={**clients[0].train, "target_ids": labels})
    fed = noisy_federation(seed=2)
    privacy_of = PrivacyConfig(clip=0.05, epsilon=2.0, seed=2)
    fed = dataclasses.replace(fed, settings=FederationConfig(rounds=1, local_steps=2, privacy=privacy_of),
                              most_uploads=1, train=TrainConfig(optimizer="sgd", lr_connector=0.5, lr_lora_stage1=0.5))
    start, trained = toy.toy_adapters(fed.strategy), []
    for client in (canary, clients[0]):
        plain = dataclasses.replace(fed, clients=(client, *clients[1:]), settings=FederationConfig(local_steps=2))
        done, = executor.Executor().train([executor.Work(plain, {0: start}, 1, "plain", "plain")])
        trained.append(done.adapters[0])

    def flat(tree):
        return np.concatenate([np.ravel(np.float64(leaf)) for leaf in jax.tree.leaves(tree)])

    moved = [flat(after) - flat(start) for after in trained]
    way = np.subtract(*[0.05 * change / np.linalg.norm(change) for change in moved])
    assert np.linalg.norm(way) > 0.01  # the labels have changed the training
    seen = [[flat(uploads.after_upload(fed, 0, round_, "plain", "plain", start, after)[0]) @ way
             for round_ in range(first, first + 1000)] for first, after in ((1, trained[0]), (4001, trained[1]))]
    assert audit.lower_bound(*map(np.asarray, seen), privacy_of.delta) < 2.0
    assert audit.lower_bound(np.asarray([flat(trained[0]) @ way] * 1000) + np.arange(1000) * 1e-12,
                             np.asarray([flat(trained[1]) @ way] * 1000), 1e-5) > 2.0  # without noise it is plain


@pytest.mark.slow
def test_the_server_sees_noised_uploads_alone(monkeypatch):
    """Uploads that reach `aggregate` differ from the start, which the server knows, by the clipped change and noise of
    the configured size. The local subtree equals that of a run without privacy."""
    clip, z = 0.5, 0.05
    config = small_config(federation={"privacy": {"clip": clip, "noise_multiplier": z}})
    plain = prepare.prepare(small_config()).federation
    fed = prepare.prepare(config).federation
    seen, exact = {}, {}
    for name, one in (("noised", fed), ("plain", plain)):
        start = prepare.initial_state(one)
        plan = rounds.begin_phase(one, start)
        done, = executor.Executor().train([executor.Work(one, plan.adapters, 1, plan.stage, plan.label)])
        (exact if name == "plain" else seen).update(done.adapters)
        origin = start.population[0].adapters
    moved = []
    for client in range(9):
        shared = fed.strategy.roles().names(scope="shared")
        apart = np.concatenate([np.ravel(np.subtract(x, o, dtype=np.float64)) for n in shared for x, o in zip(
            jax.tree.leaves(seen[client][n]), jax.tree.leaves(origin[n]), strict=True)])
        true = np.concatenate([np.ravel(np.subtract(x, o, dtype=np.float64)) for n in shared for x, o in zip(
            jax.tree.leaves(exact[client][n]), jax.tree.leaves(origin[n]), strict=True)])
        size = np.linalg.norm(true)
        clipped = true * min(1, clip / size)
        noise = apart - clipped
        assert abs(noise.std() / (2 * z * clip) - 1) < 0.02
        moved.append(noise)
        assert tree_max_difference(seen[client]["client"], exact[client]["client"]) == 0  # not uploaded
    assert abs(np.corrcoef(moved[0], moved[1])[0, 1]) < 0.02  # clients have independent noise


@pytest.mark.slow
def test_a_run_prints_epsilon_and_repeats():
    config = small_config(federation={"rounds": 2, "privacy": {"clip": 1.0, "epsilon": 8.0, "seed": 0}})
    run, again = simulate.simulate(config), simulate.simulate(config)
    assert run.summary["adapters_sha256"] == again.summary["adapters_sha256"]
    spent = [r["epsilon"] for r in run.records if "epsilon" in r]
    assert len(spent) == 3 and spent == sorted(spent) and abs(spent[-1] - 8) < 1e-3
    assert run.summary["epsilon"] == spent[-1]
    assert simulate.simulate(small_config()).summary["epsilon"] is None


def test_a_missing_accountant_is_found_before_training(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(InputError, match="pip install dp-accounting"):
        prepare.prepare(small_config(federation={"privacy": {"clip": 1, "noise_multiplier": 1}}))


@pytest.mark.parametrize("keys", [{"clip": 1}, {"epsilon": 1}, {"clip": 1, "epsilon": 1, "noise_multiplier": 1}])
def test_half_a_promise_is_refused(keys):
    with pytest.raises(InputError, match=r"federation\.privacy: .*clip and one of"):
        small_config(federation={"privacy": keys})
