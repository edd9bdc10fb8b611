"""Tests of configs that are based on others, and of messages about overrides of keys that do not exist."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pilot_jax
from pilot_jax.config import apply_overrides, json_schema, load_config, parse_config, scaled_rates
from pilot_jax.config.reading import MEANT, known_keys
from pilot_jax.errors import InputError


def written(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_a_config_changes_and_adds_to_the_one_that_it_names(tmp_path):
    (tmp_path / "below").mkdir()
    written(tmp_path / "below", first="train: {batch_size: 4, lr_connector: 0.5}\neval: {metrics: {a: iou, b: vqa}}\n",
            second="base: first.yaml\ntrain: {batch_size: 2}\n")
    written(tmp_path, third="base: below/second.yaml\neval: {metrics: {b: anls}}\ndata: {max_length: 99}\n")
    config = load_config(tmp_path / "third.yaml", ["train.warmup=0.5"])
    assert (config.train.batch_size, config.train.lr_connector, config.train.warmup) == (2, 0.5, 0.5)
    assert config.eval.metrics == {"a": "iou", "b": "anls"} and config.data.max_length == 99
    assert "base" not in config.to_yaml().split("\n")[0]


def test_another_strategy_has_its_own_defaults(tmp_path):
    """flexlora's `combine` is not the other's default."""
    written(tmp_path, one=pilot_jax.Config(strategy={"name": "fedavg"}).to_yaml(),
            two="base: one.yaml\nstrategy: {name: flexlora}\n")
    assert load_config(tmp_path / "two.yaml").strategy.combine == "product"


def test_another_strategy_has_its_own_defaults_within_a_section(tmp_path):
    """pilot_split_half's `ata.weighting` and `ata.mixes` are not Pilot's, whatever else Pilot's section says."""
    written(tmp_path, one="strategy: {name: pilot, ata: {neighbors: 2, temperature: 4.0}}\n",
            two="base: one.yaml\nstrategy: {name: pilot_split_half}\n")
    pilot, override = load_config(tmp_path / "one.yaml"), ["strategy.name=pilot_split_half"]
    for config in (load_config(tmp_path / "two.yaml"), load_config(tmp_path / "one.yaml", override),
                   apply_overrides(pilot, override)):
        ata = config.strategy.ata
        assert (ata.weighting, ata.mixes, ata.neighbors, ata.temperature) == ("split_half", "updates", 2, 4.0)
    assert apply_overrides(apply_overrides(pilot, override), ["strategy.name=pilot"]) == pilot


def test_another_strategy_has_its_own_defaults_in_a_new_process(tmp_path):
    """Where nothing has imported the strategies yet."""
    written(tmp_path, one="strategy: {name: fedavg, combine: factors}\n",
            two="base: one.yaml\nstrategy: {name: flexlora}\neval: {metrics: {name: iou}}\n")
    code = "import sys, pilot_jax.config as c; print(c.load_config(sys.argv[1]).strategy.combine)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "two.yaml"], capture_output=True, text=True,
                          check=False)
    assert done.stdout.strip() == "product", done.stderr


def test_editors_know_the_key():
    assert json_schema()["properties"]["base"]["type"] == "string"


@pytest.mark.parametrize(("files", "message"), [
    ({"c": "base: c.yaml\n"}, "c.yaml: base: c.yaml has this file as its base in turn"),
    ({"c": "base: d.yaml\n", "d": "base: c.yaml\n"}, "d.yaml: base: c.yaml has this file as its base in turn"),
    ({"c": "base: gone.yaml\n"}, "gone.yaml: cannot be read"), ({"c": "base: 3\n"}, "c.yaml: base: expected the path"),
    ({"c": "base: d.yaml\n", "d": "[1]\n"}, "d.yaml: a config is a mapping of sections")])
def test_a_wrong_base_is_named(tmp_path, files, message):
    with pytest.raises(InputError, match=message):
        load_config(written(tmp_path, **files) / "c.yaml")


@pytest.mark.parametrize(("key", "hint"), [
    ("train.learning_rate", "Did you mean train.lr_connector, train.lr_lora_stage1 or train.lr_lora_stage2?"),
    ("federation.num_rounds", "Did you mean federation.rounds?"),
    ("train.batchsize", "Did you mean 'train.batch_size'?"), ("batch_size", "Did you mean 'train.batch_size'?"),
    ("model.lora.r", "Did you mean model.lora.rank?"),
    ("xyz", "`pilot-jax schema` prints the known keys.")])
def test_an_unknown_key_is_named_as_that_of_the_option(key, hint):
    with pytest.raises(InputError) as caught:
        apply_overrides(pilot_jax.Config(), [f"{key}=1"])
    assert str(caught.value) == f"--set {key}=1: {key}: unknown key. {hint}"


def test_entries_of_mappings_are_keys():
    config = apply_overrides(pilot_jax.Config(), [
        "eval.metrics.vqa=vqa", "train.clients.phone.lr_connector=0.5", "federation.joins.phone=2"])
    assert config.train.clients["phone"].lr_connector == 0.5 and config.federation.joins == {"phone": 2}


def test_names_of_other_tools_point_to_keys_that_exist():
    known = known_keys()
    for meant in MEANT.values():
        assert "--out" in meant or all(key in known for key in meant.replace(" or ", ", ").split(", "))


@pytest.mark.parametrize(("given", "path"), [
    ("/data #1/a.json", "/data #1/a.json"), ("  /data/[1] ", "/data/[1]"), ("#1", "#1"), ("'/data #1'", "/data #1"),
    ('"\\u00e9"', "é"), ("it's", "it's"), ("C:\\data", "C:\\data")])
def test_a_path_is_taken_as_it_stands(given, path):
    """To YAML alone, " #" begins a comment."""
    assert apply_overrides(pilot_jax.Config(), [f"data.path={given}"]).data.path == path


def test_values_are_yaml_with_a_comment_or_without():
    config = apply_overrides(pilot_jax.Config(), ["federation.rounds=3 # few", "data.emoji.tasks=[kind, colour] # two",
                                                  "federation.local_steps=null # none"])
    assert (config.federation.rounds, config.federation.local_steps) == (3, None)
    assert config.data.emoji.tasks == ("kind", "colour")


def test_rates_of_a_client_with_any_name_are_scaled():
    config = parse_config({"train": {"clients": {"\U0001f3e5 a": {"lr_connector": 0.5}}}})
    again = apply_overrides(config, scaled_rates(config.train, 0.5))
    assert {name: own.lr_connector for name, own in again.train.clients.items()} == {"\U0001f3e5 a": 0.25}
