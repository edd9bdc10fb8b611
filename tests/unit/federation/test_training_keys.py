"""Tests of the section `train` on the toy federation, against its local training in NumPy float64."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from numpy_federation import gradient, problem

from pilot_jax.config import FederationConfig, TrainConfig, parse_config, scaled_rates
from pilot_jax.data.arrays import visiting_order
from pilot_jax.errors import InputError
from pilot_jax.federation.randomness import client_generator
from pilot_jax.federation.strategies import make_strategy
from pilot_jax.testing.toy import SIZES, TASKS, run_toy, toy_clients, toy_federation, toy_numbers

ONE_PHASE = FederationConfig(rounds=1, local_epochs=2, schedule="single")
PLAIN = {"batch_size": 4, "optimizer": "sgd", "warmup": 0.0, "lr_connector": 0.4, "lr_lora_stage1": 0.3}
OWN = {"c1": {"batch_size": 2, "lr_lora_stage1": 0.9}, "c2": {"lr_connector": 0.1}}


def trained_alone(client, keys):
    """Returns w, a and b after a client's own two epochs of SGD, float64."""
    keys = keys | keys.get("clients", {}).get(f"c{client}", {})
    x, y = problem()[client]
    params = {name: value for name, value in toy_numbers().items() if name in "wab"}
    steps = 2 * -(-len(x) // keys["batch_size"])
    rng = client_generator(0, f"c{client}", 1, make_strategy("local").first_stages[0])
    order, real = visiting_order(rng, len(x), keys["batch_size"], steps)
    for i, (rows, used) in enumerate(zip(order, real, strict=True)):
        g = gradient(params, x[rows[used]], y[rows[used]])
        norm = np.sqrt(sum((part**2).sum() for part in g.values()))
        scale = min(1.0, keys.get("clip_norm", np.inf) / norm)
        fall = {"cosine": 0.5 * (1 + np.cos(np.pi * i / steps)), "linear": 1 - i / steps,
                "constant": 1.0}[keys.get("schedule", "cosine")]
        for name, part in g.items():
            rate = keys["lr_connector"] if name == "w" else keys["lr_lora_stage1"]
            params[name] = params[name] - fall * rate * scale * part
    return params


@pytest.mark.parametrize("keys", [
    {"schedule": "linear"}, {"clip_norm": 0.3}, {"microbatch": 1}, {"microbatch": 2, "clip_norm": 0.3},
    {"clients": OWN}, {"clients": OWN, "schedule": "constant"}], ids=str)
def test_local_training_is_numpys(keys):
    """Batches of 4 from 4, 8 and 6 samples, the last batches of an epoch with padding."""
    keys = PLAIN | keys
    state = run_toy(toy_federation(make_strategy("local", schedule="single"), settings=ONE_PHASE,
                                   train=TrainConfig.model_validate(keys)))
    for client in range(len(SIZES)):
        expected, adapters = trained_alone(client, keys), state.population[client].adapters
        lora = adapters["text_adapter"]["layers"]["q"]
        for name, value in {"w": adapters["projector"]["w"], "a": lora["a"][0], "b": lora["b"][0]}.items():
            np.testing.assert_allclose(value, expected[name], atol=2e-6, err_msg=f"{name} of client {client}")
            assert np.abs(expected[name] - toy_numbers()[name]).max() > 1e-3


@pytest.mark.parametrize("keys", [{"clients": {f"c{k}": {"batch_size": 4} for k in range(3)}}, {"microbatch": 2}])
def test_split_half_measures_the_same_in_smaller_batches_and_parts(keys):
    """A client's batch of 4 is padded to 8 in each of its halves; parts are of a half."""
    def evidence(size, keys):
        train = TrainConfig.model_validate(PLAIN | {"batch_size": size} | keys)
        fed = toy_federation(make_strategy("split_half", schedule="single"), toy_clients((4, 8, 6), TASKS),
                             settings=ONE_PHASE, train=train)
        return run_toy(fed).server["evidence"]

    sizes = (4, 8) if "clients" in keys else (4, 4)
    expected, found = evidence(sizes[0], {}), evidence(sizes[1], keys)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(("keys", "message"), [
    ({"batch_size": 8, "microbatch": 3}, "microbatch: 3 does not divide batch_size, 8"),
    ({"batch_size": 8, "microbatch": 4, "ld_mode": "flat"}, "ld_mode flat compares the images of a whole batch"),
    ({"batch_size": 8, "clients": {"c0": {"batch_size": 9}}}, "clients.c0.batch_size: 9 is more than batch_size"),
    ({"clients": {"c0": {"optimizer": "sgd"}}}, "train.clients.c0.optimizer: unknown key"),
    ({"clients": {"c0": {"lr_connector": -1}}}, "train.clients.c0.lr_connector: .*greater than 0"),
    ({"clip_norm": 0}, "train.clip_norm: .*greater than 0"),
])
def test_wrong_keys_are_refused(keys, message):
    with pytest.raises(InputError, match=message):
        parse_config({"train": keys})


@pytest.mark.parametrize(("keys", "message"), [
    ({"clients": {"c1": {"batch_size": 3}}}, r"train\.clients\.c1\.batch_size: 3 is odd.*Set it to 4"),
    ({"batch_size": 4, "microbatch": 4}, "train.microbatch: 4 does not divide 2, the half of train.batch_size"),
])
def test_halves_need_even_batches_of_all_clients(keys, message):
    train = TrainConfig.model_validate(PLAIN | keys)
    with pytest.raises(InputError, match=message):
        run_toy(toy_federation(make_strategy("split_half"), toy_clients(), train=train))


def test_tuning_scales_the_rates_of_single_clients_too():
    config = parse_config({"train": PLAIN | {"clients": OWN}})
    changes = dict(change.split("=", 1) for change in scaled_rates(config.train, 0.5))
    assert float(changes["train.lr_connector"]) == 0.2
    assert changes["train.clients"] == (
        '{"c1": {"batch_size": 2, "lr_lora_stage1": 0.45}, "c2": {"lr_connector": 0.05}}')
