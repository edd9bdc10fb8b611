"""Tests that what is remembered of tokenizers and configs equals what they give, and is not used once they change."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import small_config
from transformers import PreTrainedTokenizerFast

import pilot_jax
from pilot_jax.cache import Cache, remember_in
from pilot_jax.data import tokenizer as tokenizers
from pilot_jax.embedded.scenarios import scenario_clients, scene_samples
from pilot_jax.errors import InputError
from pilot_jax.models import pretrained
from pilot_jax.models.checkpoints import hf_config, parts
from pilot_jax.models.packaged import ASSETS, EMBEDDED, model_directory
from pilot_jax.runs import prepare


@pytest.fixture
def memory(tmp_path):
    kept = Cache(tmp_path / "kept", 2**30)
    kept.folder.mkdir()
    remember_in(kept)
    yield kept
    remember_in(None)


@pytest.fixture
def loads(monkeypatch):
    """Counts how often a tokenizer is loaded and a config read by transformers."""
    count = {"tokenizer": 0, "config": 0}

    def counted(name, function):
        def call(*args):
            count[name] += 1
            return function(*args)
        return call

    monkeypatch.setattr(pretrained, "load_tokenizer", counted("tokenizer", pretrained.load_tokenizer))
    monkeypatch.setattr(hf_config, "_read_vlm_config", counted("config", hf_config._read_vlm_config))
    return count


@pytest.fixture
def checkpoint(tmp_path):
    """Returns a copy of the embedded base, which a test may change."""
    return shutil.copytree(model_directory(EMBEDDED), tmp_path / "base")


def prepared(checkpoint, **data):
    """Prepares a run on the checkpoint and returns the arrays of its clients, as a later process would."""
    config = small_config(model={"path": str(checkpoint)}, eval={"scoring": "teacher_forced"}, data=data)
    samples = list(scene_samples(scenario_clients("a", 4, 2, 2), 0))
    setup = prepare.prepare(config, samples=samples)
    arrays = [({k: v for k, v in client.train.items() if k != "features"},
               {split: (p.input_ids, p.attention_mask, p.answered.rows, p.answered.prompt)
                for split, p in client.evaluation.items()}) for client in setup.federation.clients]
    return arrays, setup.evaluation.decoder.how


def test_what_is_remembered_equals_what_is_computed(memory, loads, checkpoint):
    remember_in(None)
    right, how = prepared(checkpoint)
    remember_in(memory)
    loads.update(tokenizer=0, config=0)
    prepared(checkpoint)
    assert loads == {"tokenizer": 1, "config": 1}
    again, how_again = prepared(checkpoint)
    assert loads == {"tokenizer": 1, "config": 1}  # neither is loaded a second time
    assert how == how_again
    jax.tree.map(np.testing.assert_array_equal, again, right)
    assert jax.tree.map(lambda x: x.dtype, again) == jax.tree.map(lambda x: x.dtype, right)


def test_a_setting_that_changes_the_ids_is_noticed(memory, loads, checkpoint):
    first, _ = prepared(checkpoint)
    other, _ = prepared(checkpoint, template="vicuna_v1", max_length=400)
    assert loads["tokenizer"] == 2
    assert first[0][0]["input_ids"].shape != other[0][0]["input_ids"].shape


def test_what_a_chat_template_writes_is_not_remembered(memory, loads, checkpoint):
    """It is a program, which may write the date."""
    file = checkpoint / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    for count in (1, 2):
        prepared(checkpoint, template="tokenizer")
        assert loads["tokenizer"] == count


def test_a_changed_tokenizer_is_noticed(memory, loads, checkpoint):
    first, _ = prepared(checkpoint)
    file = checkpoint / "tokenizer.json"
    content = json.loads(file.read_text())
    merges = content["model"]["merges"]
    file.write_text(json.dumps(content | {"model": content["model"] | {"merges": merges[:len(merges) // 2]}}))
    changed, _ = prepared(checkpoint)
    assert loads["tokenizer"] == 2
    assert not np.array_equal(first[0][0]["input_ids"], changed[0][0]["input_ids"])


def test_a_changed_config_is_noticed(memory, loads, checkpoint):
    assert hf_config.read_vlm_config(checkpoint).text.rms_norm_eps == 1e-5
    file = checkpoint / "config.json"
    content = json.loads(file.read_text())
    content["text_config"]["rms_norm_eps"] = 2e-5
    file.write_text(json.dumps(content))
    assert hf_config.read_vlm_config(checkpoint).text.rms_norm_eps == 2e-5
    assert hf_config.read_vlm_config(checkpoint).text.rms_norm_eps == 2e-5
    assert loads["config"] == 2


def test_a_refused_config_is_refused_again(memory, loads, checkpoint):
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"projector_hidden_act": "tanh"}))
    for _ in range(2):
        with pytest.raises(InputError, match="projector_hidden_act"):
            hf_config.read_vlm_config(checkpoint)
    assert loads["config"] == 2 and not list(memory.folder.glob("*.kept"))


def test_a_tokenizer_that_has_gone_is_missed(memory, checkpoint):
    prepared(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        prepared(checkpoint)


def test_a_late_tokenizer_has_what_transformers_tokenizer_has(checkpoint):
    loaded = []
    late = tokenizers.LateTokenizer(checkpoint, lambda: loaded.append(1) or pretrained.load_tokenizer(checkpoint))
    assert late.content is not None and not loaded
    assert not hasattr(late, "__array__") and not loaded
    right = pretrained.load_tokenizer(checkpoint)
    assert late("two words")["input_ids"] == right("two words")["input_ids"]
    assert late.eos_token == right.eos_token and late.decode([5, 6]) == right.decode([5, 6])
    assert loaded == [1]


@pytest.mark.parametrize("directory", sorted((ASSETS / "shapes").iterdir()), ids=lambda path: path.name)
def test_shapes_are_read_back_as_they_are(memory, directory):
    def read():
        kind = json.loads((directory / "config.json").read_text())["model_type"]
        if kind == "llava":
            return hf_config.read_vlm_config(directory)
        if kind in ("llama", "mistral", "qwen2"):
            return parts.read_language_config(directory)
        language = ASSETS / "shapes" / "vicuna-7b-v1.5"
        return parts.read_parts_config(directory, language, None, -2, "auto", 5)

    first = read()
    assert list(memory.folder.glob("*.kept")) and read() == first
    remember_in(None)
    assert read() == first


def test_a_run_has_transformers_own_tokenizer():
    run = pilot_jax.simulate(small_config())
    assert isinstance(run.tokenizer, PreTrainedTokenizerFast) and len(run.tokenizer) > 100
