"""Tests of differential privacy: clipping, noise and ε, against formulas written out in this file."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from conftest import small_config, tree_max_difference
from scipy.stats import norm

from pilot_jax.config import PrivacyConfig
from pilot_jax.errors import InputError
from pilot_jax.federation import executor, privacy, rounds
from pilot_jax.runs import prepare, simulate


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
    config = small_config(federation={"rounds": 2, "privacy": {"clip": 1.0, "epsilon": 8.0}})
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
