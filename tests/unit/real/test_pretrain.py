"""Tests of a real base as a whole on small parts in wheels: conversion, training in two stages, merge and scores."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import write
from gguf import GGMLQuantizationType
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration
from written_parts import write_gguf, write_onnx, write_wheel

import pilot_jax
from pilot_jax.models.lora import init_lora
from pilot_jax.models.vlm import variables
from pilot_jax.real import base as bases
from pilot_jax.real import emoji, emoji_tasks, lessons, pretrain, scores
from pilot_jax.real.trained import write_trained

CONFIG = ("{base: tiny, side: 42, projector_steps: 3, instruction_steps: 4, review_steps: 2, pictures: 2, tokens: 250, "
          "rank: 2}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Returns the description of a base of two small parts, and the cache in which their wheels lie."""
    folder = tmp_path_factory.mktemp("parts")
    gguf = write_gguf(folder / "model.gguf", kind=GGMLQuantizationType.Q8_0, tied=True).read_bytes()
    write_onnx(folder / "tower.onnx")
    wheels = []
    for name, content in (("language", gguf), ("vision", (folder / "tower.onnx").read_bytes())):
        (folder / name).mkdir()
        wheel = write_wheel(folder / name, content=content)
        (folder / name / wheel.file).rename(folder / f"{name}.whl")
        wheels.append(dataclasses.replace(wheel, file=f"{name}.whl"))
    return dataclasses.replace(bases.SMOLLM2_DINOV2, language=wheels[0], vision=wheels[1], feature_layer=-1, answer="",
                               feature_sizes={}), folder


@pytest.fixture
def known(tiny, monkeypatch):
    """Makes the small base known as "tiny", and few pictures the test pool."""
    base, cache = tiny
    monkeypatch.setenv("PILOT_JAX_CACHE", str(cache))
    monkeypatch.setitem(bases.BASES, "tiny", base)
    monkeypatch.setattr(scores, "askable", lambda *args: emoji_tasks.askable(*args)[:3])


def test_the_conversion_equals_transformers(known, call, tmp_path, monkeypatch):
    """The parts are read from their wheels; the LLaVA directory gives the same logits in transformers."""
    monkeypatch.chdir(tmp_path)
    code, _, err = call("base", "tiny", "out", "--side", 42)
    assert code == 0 and "random" in (tmp_path / "out" / "README.md").read_text(), err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"] and not list((tmp_path / "out").glob(".*"))
    model = pilot_jax.load(tmp_path / "out", dtype="float32")
    reference = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = np.random.default_rng(0).integers(3, 300, (2, 20))
    ids[:, 2:11] = model.config.image_token_id
    pixels = np.random.default_rng(1).normal(size=(2, 3, 42, 42)).astype(np.float32)
    with torch.no_grad():
        theirs = reference(input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels)).logits.numpy()
    np.testing.assert_allclose(model.logits(ids, None, pixels), theirs, atol=1e-4)


def test_projector_only(known, call, tmp_path, monkeypatch):
    """`base --projector-only` takes the trained projector and leaves the language model as it is in its file."""
    assert call("base", "tiny", tmp_path / "start", "--side", 42)[0] == 0
    model, trained = pilot_jax.load(tmp_path / "start", dtype="float32"), tmp_path / "trained"
    trained.mkdir()
    projector = jax.tree.map(lambda x: x + 0.5, model.base["projector"])
    adapter = jax.tree.map(jnp.ones_like, init_lora(jax.random.key(0), model.config.text, 2))
    write_trained(trained, {"projector": projector, "text_adapter": adapter}, 2, 0.01, "tiny")
    monkeypatch.setattr(bases, "trained_folder", lambda name: trained)
    assert call("base", "tiny", tmp_path / "whole", "--side", 42)[0] == 0
    code, _, err = call("base", "tiny", tmp_path / "half", "--side", 42, "--projector-only")
    assert code == 0 and "which is left out" in (tmp_path / "half" / "README.md").read_text(), err
    start, whole, half = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "whole", "half"))
    for name in start:
        same = name.startswith(("language_model", "vision_tower"))
        assert (half[name] == start[name]).all() == same, name
        assert name.startswith("language_model") or (half[name] == whole[name]).all(), name
    changed = [name for name in start if name.startswith("language_model") and (whole[name] != start[name]).any()]
    assert len(changed) == 14  # seven matrices in each of two layers


@pytest.mark.long
def test_training_and_merge(known, call, tmp_path):
    """`pretrain` writes the base and its trained part. PEFT merges that part into the same language model."""
    code, out, err = call("pretrain", write(tmp_path, "p.yaml", CONFIG), tmp_path / "out")
    assert code == 0 and "projector step 3/3" in out and "review step 2/2" in out, err
    trained = tmp_path / "out" / "trained"
    assert "| kind, of the right family |" in (trained / "README.md").read_text()
    assert not list((tmp_path / "out").glob(".*")) and "random" not in (tmp_path / "out" / "README.md").read_text()
    whole = load_file(tmp_path / "out" / "model.safetensors")
    projector = load_file(trained / "projector.safetensors")
    assert (whole["multi_modal_projector.linear_2.weight"] == projector["mm_projector.2.weight"]).all()

    assert call("base", "tiny", tmp_path / "start", "--side", 42)[0] == 0  # the same language model, untrained
    start = load_file(tmp_path / "start" / "model.safetensors")
    text = json.loads((tmp_path / "start" / "config.json").read_text())["text_config"]
    language = LlamaForCausalLM(LlamaForCausalLM.config_class(**text))
    language.load_state_dict({k.removeprefix("language_model."): torch.tensor(v.astype(np.float32))
                              for k, v in start.items() if k.startswith("language_model.")}, strict=False)
    merged = PeftModel.from_pretrained(language, trained).merge_and_unload().state_dict()
    changed = 0
    for name, value in whole.items():
        if name.startswith("language_model."):
            theirs = merged[name.removeprefix("language_model.")].numpy()
            np.testing.assert_allclose(value.astype(np.float32), theirs, atol=2e-3 * np.abs(theirs).max())
            changed += int((value != start[name]).any())
    assert changed == 14  # seven matrices in each of two layers


@pytest.mark.parametrize(("change", "message"), [
    ("tokens: 70", r"tokens: 70, expected at least \d+"), ("side: 50", "50, expected a multiple of 14"),
    ("base: gpt5", "'gpt5' is not known"), ("alpha: -1", "alpha: expected a positive float"),
    ("base: 3", "base: expected a text, got 3")])
def test_settings_that_cannot_be_used(known, call, tmp_path, change, message):
    key = change.split(":")[0]
    config = ", ".join(part for part in CONFIG[1:-1].split(", ") if not part.startswith(key + ":"))
    code, _, err = call("pretrain", write(tmp_path, "p.yaml", f"{{{config}, {change}}}"), tmp_path / "out")
    assert code == 2 and not (tmp_path / "out").exists()
    assert re.search(message, err), err


@pytest.mark.slow
def test_lessons_in_one_row_do_not_see_each_other(known, tmp_path):
    """The logits of each lesson in a row equal those of the lesson by itself, directly behind the image."""
    bases.build("tiny", tmp_path / "out", 42, lambda text: None)
    model = pilot_jax.load(tmp_path / "out", dtype="float32")
    packer = pretrain.Packer(model, 260)
    some = [("What is it?", "dog"), ("Which colour?", "light brown"), ("Eh?", "no")]
    row = packer.row(iter([*some, ("a" * 300, "does not fit")]))
    assert row["segment"].max() == 3
    pixels = np.random.default_rng(1).normal(size=(1, 3, 42, 42)).astype(np.float32)
    ours = np.asarray(model.module.apply(
        variables(model.base, {"projector": model.base["projector"]}), jax.tree.map(lambda x: x[None], row),
        model.features(pixels), method=pretrain.packed_logits))[0]
    expected, targets = [], []
    for question, answer in some:
        ids, supervised = packer.encoded(question, answer)
        logits = np.asarray(model.logits(ids[None], None, pixels))[0]
        expected.append(logits[np.flatnonzero(supervised) - 1])
        targets += ids[supervised].tolist()
    expected = np.concatenate(expected)
    np.testing.assert_allclose(ours[:len(expected)], expected, atol=1e-4)
    assert row["targets"][:len(targets)].tolist() == targets
    assert row["weight"].sum() == len(targets) == (row["weight"] > 0)[:len(targets)].sum()


def test_lessons_ask_nothing_that_the_tasks_ask():
    """No wording is a task's, and no picture of another pool is in the lessons; answers are true."""
    rng, chosen = np.random.default_rng(0), list(emoji.pictures("base"))[::7]
    names = [one.concept.name for one in chosen]
    asked = {q for make in emoji_tasks.TASKS.values() for one in chosen if one.concept.kinds and one.colours
             for q, _ in make([one, one])}
    found = set()
    for one in chosen:
        for stage in lessons.STAGES:
            for (question, answer), _ in zip(lessons.lessons(rng, one, stage, names), range(40), strict=False):
                assert question not in asked
                found.add(question.split()[0])
                concept = one.concept
                if question in lessons.WORDINGS["colour"]:
                    assert answer == one.colours[0]
                if question in lessons.WORDINGS["german"]:
                    assert answer == concept.translations["de"]
                for wording in lessons.WORDINGS["is_name"]:
                    before, after = wording.split("{a}")
                    if question.startswith(before) and question.endswith(after) and answer == "no":
                        assert question[len(before):-len(after)] != concept.name
    assert len(found) > 20


def test_pictures_are_changed_but_stay_on_white():
    image = next(emoji.pictures("base")).image
    changed = np.asarray(pretrain.augmented(np.random.default_rng(0), image))
    assert changed.shape == (56, 56, 3) and (changed != np.asarray(image)).any() and (changed[0] > 200).mean() > 0.5


def test_perplexity_is_that_of_transformers(known, tmp_path):
    bases.build("tiny", tmp_path / "out", 42, lambda text: None)
    model = pilot_jax.load(tmp_path / "out", dtype="float32")
    reference = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.tensor(model.tokenizer()(scores.PROSE.read_text(), add_special_tokens=False)["input_ids"])
    ids = ids[:len(ids) // 256 * 256].reshape(-1, 256)
    with torch.no_grad():
        expected = float(torch.exp(reference(input_ids=ids, labels=ids).loss))
    assert abs(scores.perplexity(model) / expected - 1) < 1e-3
