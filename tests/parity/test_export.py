"""Tests that exported clients can be loaded in peft, and by the code on the page docs/exported-adapters.md."""

from __future__ import annotations

import ast
import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import ROOT, small_config
from PIL import Image

import pilot_jax
from pilot_jax.data.conversations import TEMPLATES
from pilot_jax.errors import InputError
from pilot_jax.evaluation.personalised import used_adapters
from pilot_jax.models.pretrained import model_directory
from pilot_jax.models.vlm import variables
from pilot_jax.runs.export import export_client

DOCS = ROOT / "docs" / "exported-adapters.md"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def finished():
    """A finished run with random numbers added to all adapters, so that a missing one would change the logits."""
    run = pilot_jax.simulate(small_config())
    rng = np.random.default_rng(0)
    moved = [dataclasses.replace(c, adapters=jax.tree.map(
        lambda a: (a + 0.05 * rng.normal(size=a.shape)).astype(np.float32), c.adapters)) for c in run.population]
    return dataclasses.replace(run, population=tuple(moved))


def code_blocks():
    return re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)


def page_in_torch(folder, base):
    """Returns the names that the three code blocks of the page define."""
    scope: dict = {"folder": str(folder), "base": base}
    for block in code_blocks():
        exec(block, scope)
    return scope


def in_torch(folder, base):
    """Returns the torch model that the page builds."""
    return page_in_torch(folder, base)["model"]


def inputs(model, tokenizer):
    text = "USER: " + "<image>" * model.config.num_image_tokens + "\nwhat colour is the 3? ASSISTANT: it is red"
    ids = np.asarray([tokenizer(text)["input_ids"]] * 2)
    pixels = np.random.default_rng(1).normal(size=(2, 3, 48, 48)).astype(np.float32)
    return ids, np.ones_like(ids), pixels


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_exported_client_gives_the_same_logits_in_torch(finished, tmp_path, stage):
    index = finished.client("ocr_1")
    population = list(finished.population)
    population[index] = dataclasses.replace(population[index], stage=stage)
    run = dataclasses.replace(finished, population=tuple(population))
    export_client(run, "ocr_1", tmp_path / "out")
    reference = in_torch(tmp_path / "out", str(model_directory("embedded")))
    fed = run.federation
    ids, mask, pixels = inputs(fed.model, run.tokenizer)
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask),
                             pixel_values=torch.tensor(pixels)).logits.numpy()
    used = used_adapters(fed, population[index])
    ours = fed.model.module.apply(variables(fed.model.base, used), jnp.asarray(ids), jnp.asarray(mask),
                                  fed.model.features(pixels), stage, fed.task_index(index), method="logits")
    plain = fed.model.logits(ids, mask, pixels)
    assert np.abs(np.asarray(plain) - expected).max() > 0.1  # the adapters matter
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE)


@pytest.mark.slow
def test_the_answer_of_the_page_is_that_of_pilot_jax(finished, tmp_path):
    export_client(finished, "ocr_1", tmp_path / "out")
    image = tmp_path / "scene.png"
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (48, 48, 3), np.uint8)).save(image)
    scope = page_in_torch(tmp_path / "out", str(model_directory("embedded")))
    assert finished.evaluation.data.template == "vicuna_short"
    settings = finished.setup.eval.model_copy(update={"max_new_tokens": 12})
    ours = pilot_jax.answer(finished, "ocr_1", image, "which digits are there?", settings)
    assert ours and scope["answer"](image, "which digits are there?", max_new_tokens=12) == ours


def test_the_prompts_on_the_page_are_the_templates():
    prompts = re.search(r"^PROMPTS = (\{.*?^\})", code_blocks()[2], re.M | re.S)[1]
    assert ast.literal_eval(prompts) == {name: t.system + t.human for name, t in TEMPLATES.items()}


@pytest.mark.slow
def test_projector_of_a_baseline_loads_too(tmp_path):
    run = pilot_jax.simulate(small_config(strategy={"name": "fedavg"}, data={"digits": {"train": 4}}))
    export_client(run, "vqa_0", tmp_path / "out")
    reference = in_torch(tmp_path / "out", str(model_directory("embedded")))
    index, model = run.client("vqa_0"), run.federation.model
    ids, mask, pixels = inputs(model, run.tokenizer)
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels)).logits.numpy()
    ours = model.module.apply(variables(model.base, run.population[index].adapters), jnp.asarray(ids),
                              jnp.asarray(mask), model.features(pixels), method="logits")
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE)


@pytest.mark.slow
def test_model_card_says_where_it_comes_from(finished, tmp_path):
    export_client(finished, "vqa_2", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for fact in ("base_model: \"embedded\"", "| client | vqa_2 |", "| task | vqa |", "| rounds taken part in | 1 |",
                 "| stage of the connector | stage2 |", f"{finished.summary['score_by_client']['vqa_2']:.3f} (exact)",
                 finished.summary["adapters_sha256"]):
        assert fact in card
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    with pytest.raises(InputError, match="exists already"):
        export_client(finished, "vqa_2", tmp_path / "out")


@pytest.mark.slow
def test_a_client_that_never_took_part_has_nothing_to_export(finished, tmp_path):
    index = finished.client("vqa_2")
    population = list(finished.population)
    population[index] = dataclasses.replace(population[index], stage="none")
    with pytest.raises(InputError, match="took part in no round"):
        export_client(dataclasses.replace(finished, population=tuple(population)), "vqa_2", tmp_path / "out")
    assert not (tmp_path / "out").exists()
