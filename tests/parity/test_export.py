"""Tests that exported clients can be loaded in peft, and by the code on the page docs/exported-adapters.md."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import ROOT, slow_except, small_config, write_checkpoint
from jinja2 import TemplateError
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoProcessor

import pilot_jax.torch
from pilot_jax.data.conversations import TEMPLATES, encode
from pilot_jax.errors import InputError
from pilot_jax.evaluation.personalised import used_adapters
from pilot_jax.models.checkpoints import stock
from pilot_jax.models.checkpoints.hf_config import read_vlm_config
from pilot_jax.models.checkpoints.processors import load_tokenizer
from pilot_jax.models.packaged import model_directory
from pilot_jax.models.vlm import variables
from pilot_jax.runs.export import export_client, merge_client
from pilot_jax.runs.prompt_form import chat_template

DOCS = ROOT / "docs" / "exported-adapters.md"
TOLERANCE = 1e-4
QUESTION = "is there a 2?"  # that of the page


def moved(run):
    """Returns a run with random numbers added to all adapters, so that a missing one would change the logits."""
    rng = np.random.default_rng(0)
    return dataclasses.replace(run, population=tuple(dataclasses.replace(c, adapters=jax.tree.map(
        lambda a: (a + 0.05 * rng.normal(size=a.shape)).astype(np.float32), c.adapters)) for c in run.population))


@pytest.fixture(scope="module")
def finished():
    return moved(pilot_jax.simulate(small_config()))


@pytest.fixture(scope="module")
def averaged():
    """A run of FedAvg, whose model is a stock LLaVA."""
    return moved(pilot_jax.simulate(small_config(strategy={"name": "fedavg"}, data={"digits": {"train": 4}})))


@pytest.fixture
def scene(tmp_path, monkeypatch):
    """Makes scene.png, which the page asks about, in the current directory, and returns its path."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (48, 48, 3), np.uint8)).save("scene.png")
    return tmp_path / "scene.png"


def code_blocks():
    """Returns the page's code by what it begins with: the merged model, `pilot_jax.torch.load`, the same by hand."""
    return re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)


def in_torch(folder, base):
    """Returns the torch model that the page builds by hand."""
    scope: dict = {"folder": str(folder), "base": base, "pilot_jax": pilot_jax}
    exec(code_blocks()[2], scope)
    return scope["model"]


def inputs(model, tokenizer):
    text = "USER: " + "<image>" * model.config.num_image_tokens + "\nwhat colour is the 3? ASSISTANT: it is red"
    ids = np.asarray([tokenizer(text)["input_ids"]] * 2)
    pixels = np.random.default_rng(1).normal(size=(2, 3, 48, 48)).astype(np.float32)
    return ids, np.ones_like(ids), pixels


@pytest.mark.parametrize("stage", slow_except((), ["stage1", "stage2"], {"stage2"}))
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


@pytest.mark.parametrize("strategy", slow_except((), ["finished", "averaged"], {"finished"}))
def test_torch_answers_as_pilot_jax(strategy, request, tmp_path, scene, capsys):
    """The page's code prints the answer of the run; so does the model that `load` returns, for other questions."""
    run = request.getfixturevalue(strategy)
    export_client(run, "ocr_1", tmp_path / "out")
    scope: dict = {"folder": str(tmp_path / "out")}
    exec(code_blocks()[1], scope)
    printed = capsys.readouterr().out.strip()
    assert printed and printed == run.ask("ocr_1", scene, QUESTION)
    client, picture = scope["client"], Image.open(scene).convert("L")
    for image, question in ((picture, "which digits are there?"), (None, "which digits are there?")):
        assert client.ask(image, question, 8) == run.ask("ocr_1", image, question, max_new_tokens=8)


@pytest.mark.slow
def test_a_merged_model_answers_as_pilot_jax(averaged, tmp_path, scene, capsys):
    """The page's code, which imports transformers alone; the base's weights are float16, and so the merged ones."""
    merge_client(averaged, "ocr_1", tmp_path / "merged", licence="apache-2.0")
    scope: dict = {"merged": str(tmp_path / "merged")}
    exec(code_blocks()[0], scope)
    printed = capsys.readouterr().out.strip()
    assert printed and printed == averaged.ask("ocr_1", scene, QUESTION)
    assert scope["model"].dtype == torch.float16
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert 'license: "apache-2.0"' in card and 'library_name: "transformers"' in card
    assert "| training samples | 4 |" in card and "| training samples of all clients | 36 of 9 clients |" in card
    again = pilot_jax.load(tmp_path / "merged")
    assert again.template() == "tokenizer" and again.ask(scene, QUESTION) == printed
    with pytest.raises(InputError, match="exists already"):
        merge_client(averaged, "ocr_1", tmp_path / "merged")


@pytest.mark.slow
def test_visual_adapters_are_not_merged(finished, tmp_path):
    with pytest.raises(InputError, match=r"--merged: pilot trains visual adapters.*--out DIR.*pilot_jax\.torch"):
        merge_client(finished, "ocr_1", tmp_path / "merged")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_projector_of_a_baseline_loads_too(averaged, tmp_path):
    run = averaged
    export_client(run, "vqa_0", tmp_path / "out")
    reference = in_torch(tmp_path / "out", str(model_directory("embedded")))
    index, model = run.client("vqa_0"), run.federation.model
    ids, mask, pixels = inputs(model, run.tokenizer)
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels)).logits.numpy()
    ours = model.module.apply(variables(model.base, run.population[index].adapters), jnp.asarray(ids),
                              jnp.asarray(mask), model.features(pixels), method="logits")
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE)


CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " how many? "}]},
        {"role": "assistant", "content": [{"type": "text", "text": "two "}]},
        {"role": "user", "content": "what colour?"}]
TURNS = (("human", "<image>\n how many? "), ("gpt", "two "), ("human", "what colour?"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_chat_template_writes_what_was_trained(name, tmp_path):
    """Of a conversation with an image, with and without a system message: the ids of transformers' LlavaProcessor."""
    write_checkpoint(tmp_path / "base")
    tokenizer = load_tokenizer(tmp_path / "base")
    stock.add_chat(tmp_path / "base", chat_template(name, tokenizer), (2,))
    stock.add_processor(tmp_path / "base", read_vlm_config(tmp_path / "base"))
    processor = AutoProcessor.from_pretrained(tmp_path / "base")

    def ids_of(chat):
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        out = processor(text=text, images=[Image.new("RGB", (20, 30))], add_special_tokens=False, return_tensors="np")
        return text, out["input_ids"][0]

    text, ids = ids_of(CHAT)
    np.testing.assert_array_equal(ids, encode(tokenizer, TURNS, name, 4).input_ids)
    for content in (" Be brief. ", [{"type": "text", "text": " Be brief. "}]):
        chat = [{"role": "system", "content": content}, *CHAT]
        if TEMPLATES[name].system_turn:
            expected = encode(tokenizer, (("system", " Be brief. "), *TURNS), name, 4).input_ids
            np.testing.assert_array_equal(ids_of(chat)[1], expected)
        else:
            with pytest.raises(TemplateError, match="a message of the role system has no place here"):
                ids_of(chat)
    if name == "llama2":
        assert text == "<s>[INST] <image>\nhow many? [/INST] two </s><s>[INST] what colour? [/INST]"
    if name == "chatml_short":
        assert text == ("<s><|im_start|>user\n<image>\nhow many?<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
                        "<|im_start|>user\nwhat colour?<|im_end|>\n<|im_start|>assistant\n")


def test_a_folder_that_is_no_export(tmp_path):
    with pytest.raises(InputError, match=r"pilot_jax\.json does not exist\. Give a folder that `pilot-jax export"):
        pilot_jax.torch.load(tmp_path)
    (tmp_path / "pilot_jax.json").write_text('{"format": 2}')
    with pytest.raises(InputError, match="format 2, expected 1"):
        pilot_jax.torch.load(tmp_path)
    about = {"format": 1, "base": "nowhere", "parts": None, "template": "plain", "image_fit": "processor"}
    (tmp_path / "pilot_jax.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match=r"base: nowhere is no directory here.*load\(folder, base=…\)"):
        pilot_jax.torch.load(tmp_path)
    with pytest.raises(InputError, match="dtype: 'half a byte' is not known"):
        pilot_jax.torch.load(tmp_path, dtype="half a byte")
    (tmp_path / "text").write_text("hello")
    save_file({"task.linear_1.weight": torch.ones(2, 2)}, tmp_path / "half.safetensors",
              {"stage": "stage1", "task_index": "0", "tasks": "[]"})
    for name in ("text", "half.safetensors", "gone"):
        with pytest.raises(InputError, match=f"{name}: not an exported connector"):
            pilot_jax.torch.Connector(tmp_path / name)


@pytest.mark.slow
def test_the_connector_needs_no_jax(tmp_path):
    """`pilot_jax.torch` is imported, and reads a connector, in a process in which JAX cannot be imported."""
    save_file({f"projector.linear_{i}.weight": torch.ones(2, 2) for i in (1, 2)}, tmp_path / "c.safetensors",
              {"stage": "plain", "task_index": "0", "tasks": '["t"]'})
    code = ("import sys; sys.modules['jax'] = None; import torch, pilot_jax.torch; "
            "print(pilot_jax.torch.Connector(sys.argv[1])(torch.zeros(1, 2)).tolist())")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "c.safetensors"], capture_output=True, text=True)
    assert done.stdout.strip() == "[[0.0, 0.0]]", done.stderr[-1000:]


@pytest.mark.slow
def test_model_card_says_where_it_comes_from(finished, tmp_path):
    export_client(finished, "vqa_2", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for fact in ("| base model | embedded |", "| client | vqa_2 |", "| task | vqa |", "| rounds taken part in | 1 |",
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
