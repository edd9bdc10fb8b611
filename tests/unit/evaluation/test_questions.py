"""Tests of single questions to a base model (`pilot_jax.load(path).ask`) against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import write_checkpoint, write_language_model
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil

import pilot_jax
from pilot_jax.data.images import read_image
from pilot_jax.errors import InputError
from pilot_jax.evaluation.questions import question_sample

STOP = 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Returns (folder, torch model) of a tiny checkpoint, and a picture in grey beside it."""
    folder = tmp_path_factory.mktemp("ask")
    reference = write_checkpoint(folder / "base", text={"max_position_embeddings": 512})
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)).save(folder / "grey.png")
    return folder, reference


def by_transformers(folder, reference, prompt, picture, count):
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    inputs = {"input_ids": torch.tensor([tokenizer(prompt)["input_ids"]])}
    if picture is not None:
        processor = CLIPImageProcessorPil.from_pretrained(folder / "base")
        inputs["pixel_values"] = processor(images=[picture.convert("RGB")], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tokens = reference.generate(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), do_sample=False,
                                    max_new_tokens=count, eos_token_id=STOP, pad_token_id=STOP)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()


@pytest.mark.slow
def test_answers_are_those_of_transformers(checkpoint):
    folder, reference = checkpoint
    model, picture = pilot_jax.load(folder / "base"), Image.open(folder / "grey.png")
    expected = by_transformers(folder, reference, f"USER: {'<image>' * 4}\nwhat is it? ASSISTANT:", picture, 8)
    assert expected
    for image in (str(folder / "grey.png"), folder / "grey.png", picture):  # the three forms of an image
        assert model.ask(image, "what is it?", template="vicuna_short", max_new_tokens=8) == expected
    blind = by_transformers(folder, reference, "USER: what is it? ASSISTANT:", None, 8)
    assert blind != expected and model.ask(None, "what is it?", template="vicuna_short", max_new_tokens=8) == blind


def test_the_template_is_the_checkpoints_or_vicunas(checkpoint, tmp_path):
    folder, _ = checkpoint
    assert pilot_jax.load(folder / "base").template() == "vicuna_v1"
    assert pilot_jax.load("embedded").template() == "vicuna_short"
    write_language_model(tmp_path, chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    model = pilot_jax.load_from_parts(None, tmp_path, None)
    assert model.template() == "tokenizer"
    with pytest.raises(InputError, match="takes no images"):
        model.ask(folder / "grey.png", "what is it?")


def test_wrong_questions(checkpoint):
    folder, _ = checkpoint
    model = pilot_jax.load(folder / "base")
    with pytest.raises(InputError, match=r"image: .*gone\.png does not exist"):
        model.ask(folder / "gone.png", "what is it?")
    with pytest.raises(InputError, match="cannot be decoded"):
        model.ask(folder / "base" / "config.json", "what is it?")
    with pytest.raises(InputError, match="the question has <image>, but there is no image"):
        model.ask(None, "<image>\nwhat is it?")
    with pytest.raises(InputError, match="a lone surrogate"):
        model.ask(None, "caf\udce9?")
    with pytest.raises(InputError, match="template"):
        model.ask(None, "what is it?", template="vicuna")


def test_a_picture_is_shown_to_the_model_as_in_training():
    """What is transparent is white, not the colour behind it."""
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(read_image(question_sample(hidden, "what colour?"))).min() == 255


def test_public_names_are_listed():
    assert {"load", "restore", "answer", "simulate", "load_config", "torch", "Run"} <= set(dir(pilot_jax))
    for name in dir(pilot_jax):
        assert getattr(pilot_jax, name) is not None
