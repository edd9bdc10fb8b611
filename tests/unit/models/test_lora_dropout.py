"""Tests of LoRA's dropout: its masks, its mean, and what it must not touch."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config, tree_max_difference

from pilot_jax.config import TrainConfig
from pilot_jax.errors import InputError
from pilot_jax.federation.strategies import make_strategy
from pilot_jax.models.lora import lora_linears, with_dropout
from pilot_jax.runs import prepare
from pilot_jax.testing.phases import train_phase
from pilot_jax.testing.toy import run_toy, toy_federation

RATE, SAMPLES, LENGTH, WIDTH, RANK = 0.25, 3, 40, 16, 2


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def keys(seed):
    return jnp.asarray(np.random.default_rng(seed).integers(2**32, size=(SAMPLES, 2), dtype=np.uint32))


def dropped_linears(x, w, pairs, keys, layer=0):
    """Returns x·W + LoRA after dropout, of one layer of two."""
    stacked = {n: {k: jnp.stack([v, v]) for k, v in pair.items()} for n, pair in pairs.items()}
    lora = with_dropout({"layers": stacked}, keys, RATE)
    one = {n: {k: leaf[layer] for k, leaf in pair.items()} for n, pair in lora["layers"].items()}
    return lora_linears(x, w, one, ("q", "v"), 0.5)


def test_dropout_zeroes_a_share_and_scales_the_rest():
    """With A the identity, B the identity and W = 0, the output is the input after dropout."""
    x, eye = numbers(SAMPLES * LENGTH, WIDTH), jnp.eye(WIDTH)
    pairs = {n: {"a": eye, "b": 2 * eye} for n in "qv"}  # 2 · the scale 0.5
    zeros = (jnp.zeros((WIDTH, WIDTH)),) * 2
    q, v = (np.asarray(y) for y in dropped_linears(x, zeros, pairs, keys(1)))
    for y in (q, v):
        kept = y != 0
        np.testing.assert_allclose(y[kept], np.asarray(x / (1 - RATE))[kept], rtol=1e-6)
        assert kept.mean() == pytest.approx(1 - RATE, abs=4 * np.sqrt(RATE * (1 - RATE) / kept.size))
    other = np.asarray(dropped_linears(x, zeros, pairs, keys(1), layer=1)[0])
    again = np.asarray(dropped_linears(x, zeros, pairs, keys(1))[0])
    masks = [y.reshape(SAMPLES, -1) != 0 for y in (q, v, other)]
    assert np.array_equal(q, again)
    rows = [mask[i] for mask in masks for i in range(SAMPLES)]  # each sample, target and layer has its own mask
    for i, one in enumerate(rows):
        assert all((one != two).mean() > RATE / 2 for two in rows[:i])


def test_the_mean_over_masks_is_the_output_without_dropout():
    x, w = numbers(SAMPLES * LENGTH, WIDTH), (numbers(WIDTH, WIDTH, seed=1), numbers(WIDTH, 8, seed=2))
    pairs = {"q": {"a": numbers(RANK, WIDTH, seed=3), "b": numbers(WIDTH, RANK, seed=4)},
             "v": {"a": numbers(RANK, WIDTH, seed=5), "b": numbers(8, RANK, seed=6)}}
    many = jnp.stack([keys(seed) for seed in range(200)])
    draws = np.asarray(jax.jit(jax.vmap(lambda own: dropped_linears(x, w, pairs, own)[1]))(many))
    exact = x @ w[1] + 0.5 * (x @ pairs["v"]["a"].T) @ pairs["v"]["b"].T
    error = (draws.mean(0) - exact) / (draws.std(0) / np.sqrt(len(draws)) + 1e-6)
    assert np.abs(error.mean()) < 0.1 and 0.9 < error.std() < 1.1  # as a standard normal


@pytest.mark.slow
def test_dropout_in_training(federation):
    """Microbatches and companions draw the same masks, steps different ones, and without a rate nothing changes."""
    fed = prepare.prepare(small_config(federation={"local_steps": 2}, strategy={"name": "local"})).federation
    adapters = prepare.initial_adapters(fed)

    def trained(**keys):
        one = dataclasses.replace(fed, train=fed.train.model_copy(update={"optimizer": "sgd"} | keys))
        stage = one.strategy.first_stages[0]
        return train_phase(one, {0: adapters, 1: adapters}, 1, stage, stage)[0]

    plain, dropped, parts = trained(), trained(lora_dropout=0.5), trained(lora_dropout=0.5, microbatch=2)
    for client in (0, 1):
        assert tree_max_difference(dropped[client], plain[client]) > 1e-5
        assert tree_max_difference(dropped[client], parts[client]) < 2e-6


@pytest.mark.parametrize("name", ["fedalt", "fedlease"])
def test_strategies_with_a_router_refuse_it(name):
    with pytest.raises(InputError, match=r"train\.lora_dropout: .*router.*Set it to 0"):
        run_toy(toy_federation(make_strategy(name), train=TrainConfig(lora_dropout=0.1)))
