"""Tests of what every weighted mean must do, whatever its weights: one client, equal clients, one step."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import slow_except, tree_max_difference
from numpy_federation import EPOCHS, PHASES, gradient, numbers, problem

from pilot_jax.config import FederationConfig
from pilot_jax.federation import mixing
from pilot_jax.federation.strategies import STRATEGIES, Strategy, make_strategy
from pilot_jax.testing.toy import DESCENT, SIZES, run_toy, toy_clients, toy_federation, toy_numbers

ADAM = DESCENT.model_copy(update={"optimizer": "adamw", "lr_connector": 0.05, "lr_lora_stage1": 0.05})
# Strategies whose clients go on from a mean of the uploads, with weights that sum to 1.
MEANS = ("fedavg", "fedprox", "ffa_lora", "fedsa_lora", "feddpa", "rolora", "ditto", "similarity", "median",
         "trimmed_mean", "local")


def on_their_own(name):
    """Returns the strategy without a server: every client goes on with its own upload, of the same subtrees."""
    methods = {"one_model": False, "mix": lambda self, cohort: mixing.identity(len(cohort)),
               "aggregate": Strategy.aggregate, "combine": Strategy.combine}
    return type(f"Own{name}", (STRATEGIES[name],), methods)()


def differences(one, other):
    return [tree_max_difference(a.adapters, b.adapters) for a, b in zip(one.population, other.population, strict=True)]


@pytest.mark.parametrize(("name", "optimizer"), slow_except({("fedavg", "adamw"), ("rolora", "sgd")}, [
    (name, optimizer) for name in MEANS for optimizer in ("adamw", "sgd")]))
def test_one_client_trains_alone(name, optimizer):
    """With K = 1 the mean of one upload is that upload, bit for bit, and every phase resets the optimizer."""
    one, train = toy_clients()[1:2], ADAM if optimizer == "adamw" else DESCENT
    federated = run_toy(toy_federation(make_strategy(name), one, train=train))
    alone = run_toy(toy_federation(on_their_own(name), one, train=train))
    assert differences(federated, alone) == [0.0]
    if name in ("fedavg", "similarity", "median", "trimmed_mean"):  # all of a client's adapters are shared
        local = run_toy(toy_federation(make_strategy("local"), one, train=train))
        assert differences(federated, local) == [0.0]


def test_one_client_under_adam_in_numpy():
    """Kingma and Ba, 2015, algorithm 1, with both moments and the count at 0 again in every phase."""
    (x, y), p = problem()[1], {k: v for k, v in toy_numbers().items() if k in "wab"}
    for _ in range(PHASES):
        m, v = ({k: np.zeros_like(value) for k, value in p.items()} for _ in range(2))
        for i in range(EPOCHS):
            g, rate = gradient(p, x, y), ADAM.lr_connector * 0.5 * (1 + np.cos(np.pi * i / EPOCHS))
            m = {k: 0.9 * m[k] + 0.1 * g[k] for k in p}
            v = {k: 0.999 * v[k] + 0.001 * g[k] ** 2 for k in p}
            p = {k: p[k] - rate * m[k] / (1 - 0.9 ** (i + 1)) / (
                np.sqrt(v[k] / (1 - 0.999 ** (i + 1))) + ADAM.adam_epsilon) for k in p}
    state = run_toy(toy_federation(make_strategy("fedavg"), toy_clients()[1:2], train=ADAM))
    got = numbers(state.population[0].adapters)
    for key, want in p.items():
        np.testing.assert_allclose(got[key], want, atol=2e-5, err_msg=key)
        assert np.abs(want - toy_numbers()[key]).max() > 1e-2


@pytest.mark.parametrize("name", slow_except({"fedavg"}, ["fedavg", "median", "trimmed_mean", "similarity"]))
def test_equal_clients_train_as_if_alone(name):
    """Clients with the same data and full batches upload the same, of which every mean is the same again."""
    one = toy_clients()[1]
    clients = [dataclasses.replace(one, name=f"c{k}") for k in range(3)]
    federated, local = (run_toy(toy_federation(make_strategy(which), clients)) for which in (name, "local"))
    assert max(differences(federated, local)) < 1e-6


@pytest.mark.parametrize(("name", "trained"), [("fedavg", "wab"), ("rolora", "wb")])
def test_one_step_is_a_step_along_the_mean_gradient(name, trained):
    """w = w_0 − η·Σ n_k·g_k / Σ n_k after one full-batch step of SGD; RoLoRA's first step leaves A as it is."""
    settings = FederationConfig(rounds=1, local_epochs=1, schedule="single")
    state = run_toy(toy_federation(make_strategy(name, schedule="single"), settings=settings))
    begin = {k: v for k, v in toy_numbers().items() if k in "wab"}
    gradients = [gradient(begin, x, y) for x, y in problem()]
    got = numbers(state.population[0].adapters)
    for key, start in begin.items():
        mean = sum(n * g[key] for n, g in zip(SIZES, gradients, strict=True)) / sum(SIZES)
        np.testing.assert_allclose(got[key], start - DESCENT.lr_connector * mean * (key in trained), atol=1e-6)
