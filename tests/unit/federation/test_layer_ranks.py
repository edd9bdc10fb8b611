"""Tests of LoRA ranks that differ by layer: they are those of a smaller LoRA, are kept in training, and are counted."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from conftest import small_config, tree_max_difference

from pilot_jax.config import LoraConfig, PrivacyConfig, parse_config
from pilot_jax.errors import InputError
from pilot_jax.federation.strategies import make_strategy
from pilot_jax.runs import prepare
from pilot_jax.testing.phases import train_phase
from pilot_jax.testing.toy import ROUNDS, run_toy, toy_federation


@pytest.mark.parametrize(("keys", "expected"), [
    ({}, ()), ({"0": 2}, (2, 8, 8, 8)), ({"0-1": 2, "3": 4}, (2, 2, 8, 4)), ({"0-3": 8}, (8, 8, 8, 8))])
def test_layers_are_named_one_by_one_or_from_first_to_last(keys, expected):
    assert LoraConfig(rank=8, layer_ranks=keys).ranks_of(4) == expected


@pytest.mark.parametrize(("keys", "message"), [
    ({"4": 2}, "4: the model has the layers 0 to 3"), ({"2-1": 2}, "2-1: the model has"),
    ({"0": 9}, "0 has rank 9, above"), ({"0-2": 2, "2": 4}, "2: layer 2 has a rank already")])
def test_what_is_wrong_is_named(keys, message):
    with pytest.raises(InputError, match=rf"model\.lora\.layer_ranks: {message}"):
        LoraConfig(rank=8, layer_ranks=keys).ranks_of(4)


def test_bytes_are_those_of_the_ranks():
    adapters = {"text_adapter": {"layers": {"q": {"a": np.zeros((2, 8, 5), np.float32),
                                                  "b": np.zeros((2, 5, 8), np.float32)}}}}
    strategy = dataclasses.replace(make_strategy("fedavg", {"projector": "frozen"}), layer_ranks=(2, 8))
    assert strategy.traffic(adapters, None, 8, 8)[0] == {"text_adapter": 4 * (2 + 8) * (5 + 5)}
    assert strategy.traffic(adapters, None, 4, 8)[0] == {"text_adapter": 4 * (2 + 4) * (5 + 5)}


@pytest.mark.slow
def test_a_layer_trains_as_with_a_lora_of_its_rank():
    """Rank 4 with all layers at 2 is rank 2 with half of alpha, from the same start."""
    def federation(lora):
        return prepare.prepare(small_config(model={"lora": lora}, strategy={"name": "local"}, train={
            "optimizer": "sgd", "lr_lora_stage1": 0.05})).federation

    cut = federation({"rank": 4, "alpha": 8, "layer_ranks": {"0-3": 2}})
    small = federation({"rank": 2, "alpha": 4})
    assert cut.strategy.layer_ranks == (2,) * 4, cut.strategy.layer_ranks
    start = prepare.initial_adapters(cut)
    wide = start["text_adapter"]["layers"]
    assert all(not pair["a"][:, 2:].any() and pair["a"][:, :2].all() for pair in wide.values())
    first_two = jax.tree.map(lambda leaf: leaf, {"layers": {
        n: {"a": pair["a"][:, :2], "b": pair["b"][:, :, :2]} for n, pair in wide.items()}})
    stage = cut.strategy.first_stages[0]
    after, _ = train_phase(cut, {0: start}, 1, stage, stage)
    expected, _ = train_phase(small, {0: {**prepare.initial_adapters(small), "text_adapter": first_two,
                                          "projector": start["projector"]}}, 1, stage, stage)
    trained = after[0]["text_adapter"]["layers"]
    assert all(not pair["a"][:, 2:].any() and not pair["b"][:, :, 2:].any() for pair in trained.values())
    found = {"layers": {n: {"a": pair["a"][:, :2], "b": pair["b"][:, :, :2]} for n, pair in trained.items()}}
    assert tree_max_difference(found, first_two) > 1e-3
    assert tree_max_difference(found, expected[0]["text_adapter"]) < 1e-6


def test_what_would_not_keep_the_ranks_refuses_them():
    for name, key in (("flexlora", "product"), ("fedex_lora", "exact"), ("flora", "exact")):
        strategy = make_strategy(name)
        with pytest.raises(InputError, match=rf"model\.lora\.layer_ranks: {name} has strategy\.combine: {key}"):
            dataclasses.replace(strategy, layer_ranks=(1,))
    private = ROUNDS.model_copy(update={"privacy": PrivacyConfig(clip=1.0, noise_multiplier=1.0)})
    strategy = dataclasses.replace(make_strategy("fedavg"), layer_ranks=(1,))
    with pytest.raises(InputError, match=r"model\.lora\.layer_ranks: the noise of federation\.privacy"):
        _ = toy_federation(strategy, settings=private).noise_multiplier


def test_the_toys_ranks_are_kept_by_a_mean():
    strategy = dataclasses.replace(make_strategy("fedavg"), layer_ranks=(1,))
    for client in run_toy(toy_federation(strategy)).population:
        pair = client.adapters["text_adapter"]["layers"]["q"]
        assert not pair["a"][:, 1:].any() and pair["a"][:, :1].all()


@pytest.mark.parametrize("name", ["first", "1-", "-1", "1-2-3", "1.5", "all"])
def test_a_key_that_names_no_layer(name):
    with pytest.raises(InputError, match=r"model\.lora\.layer_ranks: .*names no layer: give a number"):
        parse_config({"model": {"lora": {"layer_ranks": {name: 2}}}})
