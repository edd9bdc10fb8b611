"""A short fuzz test that runs with all other tests: samples and configs with known keys and random values."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pilot_jax.config import known_keys, parse_config
from pilot_jax.data.llava.reading import read_samples
from pilot_jax.errors import InputError

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from(["<image>", "human", "gpt", "train", "../x", "/x", "x.png", "a\0", "\ud800", "\x1b[1m"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["from", "value", "image", "conversations", "task", "client", "split", "id", "answers"]), inner,
        max_size=5), max_leaves=12)
QUIET = settings(max_examples=300, deadline=None, derandomize=True,
                 suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
TURNS = st.lists(st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]) | ANYTHING, "value": ANYTHING}),
                 max_size=4)


@pytest.mark.slow
@QUIET
@given(entries=st.lists(st.fixed_dictionaries({}, optional={
    "conversations": TURNS | ANYTHING, "image": ANYTHING, "task": ANYTHING, "client": ANYTHING, "split": ANYTHING,
    "id": ANYTHING, "answers": ANYTHING}) | ANYTHING, max_size=3))
def test_samples(tmp_path, entries):
    file = tmp_path / "d.json"
    file.write_text(json.dumps(entries), encoding="utf-8")
    try:
        samples = read_samples(file)
    except InputError as error:
        assert str(error).startswith((f"{file}", "data."))  # the message begins with the file or the key
        return
    assert len(samples) == len(entries)
    for sample in samples:
        assert sample.turns[-1][0] == "gpt" and (sample.client + sample.task).isprintable()


@pytest.mark.slow
@QUIET
@given(st.lists(st.tuples(st.sampled_from(sorted(known_keys())), ANYTHING), max_size=4))
def test_configs(pairs):
    raw: dict = {}
    for key, value in pairs:
        node = raw
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                return
        node[leaf] = value
    try:
        config = parse_config(raw)
    except InputError as error:
        assert len(str(error)) < 20_000
        return
    assert parse_config(yaml.safe_load(config.to_yaml())) == config  # writing and reading a config changes nothing
