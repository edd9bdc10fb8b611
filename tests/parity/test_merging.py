"""Tests that a checkpoint with LoRA merged into it computes what peft computes with the LoRA beside it."""

from __future__ import annotations

import json
import os
import weakref

import numpy as np
import pytest
import torch
from conftest import IMAGE_TOKEN, write_checkpoint, write_language_model, write_llava
from gguf import GGMLQuantizationType
from peft import LoraConfig, PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel, LlavaForConditionalGeneration
from written_parts import write_gguf, write_parts

import pilot_jax.torch
from pilot_jax.config import ModelConfig
from pilot_jax.errors import InputError
from pilot_jax.files import LateTensor, new_folder, stream_safetensors, write_safetensors
from pilot_jax.models.checkpoints.gguf import GgufFile
from pilot_jax.models.checkpoints.merging import changes
from pilot_jax.models.checkpoints.merging import write_checkpoint as write_merged
from pilot_jax.models.checkpoints.peft import save_adapters
from pilot_jax.models.pretrained import read_shapes
from pilot_jax.models.spec import TARGETS
from pilot_jax.torch import Connector

RANK, FACTOR = 3, 2.0


def adapters_of(spec, scale=0.1):
    """Returns a random LoRA and projector for a model of these shapes."""
    rng, text = np.random.default_rng(0), spec.text
    draw = lambda *shape: (scale * rng.normal(size=shape)).astype(np.float32)  # noqa: E731
    lora = {"layers": {name: {"a": draw(text.num_layers, RANK, d_in), "b": draw(text.num_layers, d_out, RANK)}
                       for name, (d_in, d_out) in text.linear_shapes.items() if name in text.lora_targets}}
    if spec.vision is None:
        return {"text_adapter": lora}
    width, layers = text.hidden_size, {"linear_1": spec.feature_size, "linear_2": text.hidden_size}
    return {"text_adapter": lora, "projector": {name: {"kernel": draw(d_in, width), "bias": draw(width)}
                                                for name, d_in in layers.items()}}


def merged_and_beside(folder, model, kind="llava", targets=TARGETS):
    """Writes a model with merged adapters, and the adapters for peft; returns its shapes and both folders."""
    spec = read_shapes(model)[0].with_lora_on(targets)
    own = adapters_of(spec)
    with new_folder(folder / "merged") as out:
        write_merged(out, model, spec, changes(own["text_adapter"], FACTOR, own.get("projector")))
    about = {"format": 1, "base": model.path, "parts": model.parts and model.parts.model_dump(), "template": "plain",
             "image_fit": "processor"}
    save_adapters(folder / "beside", own, own["text_adapter"], stage="plain", tasks=("t",), task_index=0,
                  alpha_over_rank=FACTOR, kind=kind, base="base", about=about, card="",
                  exclude=r"(.*\.)?vision_tower\..*" if kind == "llava" else None)
    return spec, folder / "merged", folder / "beside"


def with_adapters(base, folder):
    """Returns torch's base with the exported projector and peft's LoRA."""
    if (folder / "connector.safetensors").is_file():
        base.model.multi_modal_projector = Connector(folder / "connector.safetensors")
    return PeftModel.from_pretrained(base, folder).eval()


def probe(spec, image_token=IMAGE_TOKEN):
    rng = np.random.default_rng(1)
    ids = rng.integers(6, 60, (2, 12))
    ids[:, 2:2 + spec.num_image_tokens] = image_token
    side = spec.tower.image_size
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(ids.shape, dtype=torch.long),
            "pixel_values": torch.tensor(rng.normal(size=(2, 3, side, side)), dtype=torch.float32)}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits.numpy()


@pytest.mark.parametrize(("text", "save", "targets"), [
    ({}, {}, TARGETS), ({"tie_word_embeddings": True}, {}, ("q", "v", "down")),
    ({"model_type": "qwen2"}, {"max_shard_size": "20KB"}, TARGETS)],
    ids=["one shard", "tied head, some targets", "several shards"])
def test_a_merged_llava_computes_what_peft_does(tmp_path, text, save, targets):
    base = write_checkpoint(tmp_path / "base", text=text, save=save)
    spec, merged, beside = merged_and_beside(tmp_path, ModelConfig(path=str(tmp_path / "base")), targets=targets)
    assert LoraConfig.from_pretrained(beside).target_modules == {f"{name}_proj" for name in targets}
    stock, info = LlavaForConditionalGeneration.from_pretrained(merged, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    plain = logits(base, probe(spec))
    theirs = logits(with_adapters(base, beside), probe(spec))
    assert np.abs(plain - theirs).max() > 0.1
    np.testing.assert_allclose(logits(stock, probe(spec)), theirs, atol=1e-4)
    assert (len(list(merged.glob("*.safetensors"))) > 1) == bool(save)
    assert (merged / "model.safetensors.index.json").exists() == bool(save)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_rounded_once(tmp_path, dtype):
    """Each merged weight is W + (α/r)·B·A, in float64, rounded to the base's type; others are the base's."""
    write_llava(tmp_path / "base", save={"dtype": dtype})
    spec, merged, _ = merged_and_beside(tmp_path, ModelConfig(path=str(tmp_path / "base")))
    own, changed = adapters_of(spec), 0
    with (safe_open(tmp_path / "base" / "model.safetensors", "pt") as old,
          safe_open(merged / "model.safetensors", "pt") as new):
        assert set(old.keys()) == set(new.keys())
        for name in old.keys():  # noqa: SIM118
            before, after = old.get_tensor(name), new.get_tensor(name)
            assert after.dtype == dtype
            parts = name.split(".")
            if "language_model" in parts and "layers" in parts and parts[-2].endswith("_proj"):
                pair, i = own["text_adapter"]["layers"][parts[-2].removesuffix("_proj")], int(parts[-4])
                change = FACTOR * pair["b"][i].astype(np.float64) @ pair["a"][i]
                exact = torch.tensor(before.double().numpy() + change)
                # One rounding is half a unit in the last place; float32's own error may tip a tie.
                spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
                assert bool(((after.double() - exact).abs() <= 0.51 * spacing + 1e-7).all()), name
                changed += not torch.equal(before, after)
            elif "multi_modal_projector" not in name:
                assert torch.equal(before, after), name
    assert changed == 7 * spec.text.num_layers


@pytest.mark.parametrize("siglip", [False, True])
def test_parts_are_joined_to_a_llava_model(tmp_path, siglip):
    base, tokenizer = write_parts(tmp_path, siglip=siglip)
    parts = {"vision": str(tmp_path / "tower"), "language": str(tmp_path / "language"),
             "projector": str(tmp_path / "mm_projector.safetensors")}
    (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 16, "width": 16}}))
    spec, merged, beside = merged_and_beside(tmp_path, ModelConfig(parts=parts), "language_model")
    stock, info = LlavaForConditionalGeneration.from_pretrained(merged, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    token = AutoTokenizer.from_pretrained(merged).convert_tokens_to_ids("<image>")
    assert token == len(tokenizer) == stock.config.image_token_id
    names = {f"base_model.model.{n}" for n in load_file(merged / "model-00001-of-00003.safetensors")}
    assert any(".language_model.model.layers.1.self_attn.q_proj.weight" in n for n in names)
    # The adapters of parts are those of a language model; here they are compared on the whole.
    save_adapters(tmp_path / "whole_adapters", (own := adapters_of(spec)), own["text_adapter"], stage="plain",
                  tasks=("t",), task_index=0, alpha_over_rank=FACTOR, kind="llava", base="b", about={}, card="",
                  exclude=r"(.*\.)?vision_tower\..*")
    theirs = logits(with_adapters(base, tmp_path / "whole_adapters"), probe(spec))
    np.testing.assert_allclose(logits(stock, probe(spec, token)), theirs, atol=1e-4)
    np.testing.assert_allclose(logits(pilot_jax.torch.load(beside).model, probe(spec, token)), theirs, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["Q8_0", "BF16"])
def test_a_gguf_file_becomes_a_stock_language_model(tmp_path, kind, arch):
    write_gguf(tmp_path / "model.gguf", kind=GGMLQuantizationType[kind], tied=True, arch=arch)
    parts = {"language": str(tmp_path / "model.gguf")}
    _, merged, beside = merged_and_beside(tmp_path, ModelConfig(parts=parts), "language_model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    inputs = {"input_ids": torch.tensor(np.random.default_rng(0).integers(3, 320, (2, 12)))}
    whole = PeftModel.from_pretrained(base, beside).merge_and_unload().eval()
    narrow = {"Q8_0": torch.float16, "BF16": torch.bfloat16}[kind]
    for parameter in whole.parameters():
        parameter.data = parameter.data.to(narrow).to(torch.float32)
    theirs = logits(whole, inputs)
    assert AutoModelForCausalLM.from_pretrained(merged, dtype="auto").dtype == narrow
    stock = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    np.testing.assert_allclose(logits(stock, inputs), theirs, atol=2e-3)
    text = "Hello 1234 world, it's naïve"
    ids = GgufFile(tmp_path / "model.gguf").tokenizer()(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(merged)(text)["input_ids"] == ids


def test_an_image_token_beyond_the_vocabulary_gets_a_row(tmp_path):
    """A GGUF model of 320 tokens with a tower: `<image>` is number 320, and no answer is ever that token."""
    whole = write_llava(tmp_path / "whole", text={"hidden_size": 64})
    tower = CLIPVisionModel(whole.config.vision_config)
    tower.load_state_dict(whole.model.vision_tower.state_dict())
    tower.save_pretrained(tmp_path / "tower")
    (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 16, "width": 16}}))
    torch.save({f"mm_projector.{n}.{k}": v.detach() for n, layer in (("0", "linear_1"), ("2", "linear_2"))
                for k, v in getattr(whole.model.multi_modal_projector, layer).named_parameters()},
               tmp_path / "projector.bin")
    parts = {"vision": str(tmp_path / "tower"), "language": str(write_gguf(tmp_path / "model.gguf")),
             "projector": str(tmp_path / "projector.bin")}
    spec, merged, beside = merged_and_beside(tmp_path, ModelConfig(parts=parts), "language_model")
    stock = LlavaForConditionalGeneration.from_pretrained(merged, dtype=torch.float32)
    assert stock.config.image_token_id == 320 and stock.get_output_embeddings().weight.shape[0] == 321
    got = logits(stock, probe(spec, 320))
    assert np.isfinite(got).all() and (got[..., 320] < got.max(-1)).all()
    base = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    text = {"input_ids": probe(spec)["input_ids"]}
    theirs = logits(PeftModel.from_pretrained(base, beside).eval(), text)
    np.testing.assert_allclose(logits(stock, text)[..., :320], theirs, atol=1e-4)
    joined = pilot_jax.torch.load(beside)
    np.testing.assert_allclose(logits(joined.model, probe(spec, 320)), got, atol=1e-4)
    assert (joined.inputs(Image.new("L", (9, 20)), "what?")["input_ids"] == 320).sum() == spec.num_image_tokens


def test_a_language_model_directory_stays_one(tmp_path):
    base = write_language_model(tmp_path / "base", tie_word_embeddings=True)
    (tmp_path / "base" / "LICENSE.txt").write_text("theirs")
    (tmp_path / "base" / "run_me.py").write_text("raise SystemExit")
    model = ModelConfig(parts={"language": str(tmp_path / "base")})
    _, merged, beside = merged_and_beside(tmp_path, model, "language_model")
    inputs = {"input_ids": torch.tensor(np.random.default_rng(0).integers(7, 400, (2, 12)))}
    theirs = logits(PeftModel.from_pretrained(base, beside).eval(), inputs)
    np.testing.assert_allclose(logits(AutoModelForCausalLM.from_pretrained(merged), inputs), theirs, atol=1e-4)
    alone = pilot_jax.torch.load(beside)
    np.testing.assert_allclose(logits(alone.model, inputs), theirs, atol=1e-4)
    with pytest.raises(InputError, match="takes no images"):
        alone.ask("x.png", "what is it?")
    names = {file.name for file in merged.iterdir()}
    assert {"LICENSE.txt", "tokenizer.json", "config.json", "model.safetensors"} <= names and "run_me.py" not in names


def test_values_beyond_the_base_s_type_are_refused(tmp_path):
    write_llava(tmp_path / "base", save={"dtype": torch.float16})
    model = ModelConfig(path=str(tmp_path / "base"))
    spec, _ = read_shapes(model)
    own = adapters_of(spec, scale=1e3)
    with pytest.raises(InputError, match=r"holds values that float16 cannot hold.*Nothing was written"), \
            new_folder(tmp_path / "merged") as out:
        write_merged(out, model, spec, changes(own["text_adapter"], FACTOR, None))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_the_adapter_config_is_the_one_of_peft(tmp_path):
    """Every field is known to peft, which reads the values that are written; vLLM wants a list of targets."""
    write_llava(tmp_path / "base")
    _, _, beside = merged_and_beside(tmp_path, ModelConfig(path=str(tmp_path / "base")))
    raw = json.loads((beside / "adapter_config.json").read_text())
    read = LoraConfig.from_pretrained(beside)
    for name in ("base_model_name_or_path", "peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias",
                 "use_rslora", "modules_to_save", "inference_mode", "exclude_modules"):
        assert getattr(read, name) == raw[name], name
    assert isinstance(raw["target_modules"], list) and read.target_modules == set(raw["target_modules"])
    assert (raw["r"], raw["lora_alpha"]) == (RANK, 6) and isinstance(raw["lora_alpha"], int)
    model = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(tmp_path / "base"), beside)
    placed = [name for name, _ in model.named_modules() if name.endswith("lora_A.default")]
    assert len(placed) == 7 * 2 and not any("vision_tower" in name for name in placed)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_of_weights_have_the_rights_that_the_umask_leaves(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_safetensors(tmp_path / "a.safetensors", {"x": np.zeros(2)})
        stream_safetensors(tmp_path / "b.safetensors", {"x": LateTensor((2,), "float64", lambda: np.zeros(2))}, {})
    finally:
        os.umask(before)
    assert [(tmp_path / f"{name}.safetensors").stat().st_mode & 0o777 for name in "ab"] == [mode, mode]


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    made = []

    def make():
        assert all(reference() is None for reference in made)  # those before it are gone
        made.append(weakref.ref(value := np.zeros(5)))
        return value

    stream_safetensors(tmp_path / "a.safetensors", {name: LateTensor((5,), "float64", make) for name in "abc"}, {})
    assert len(made) == 3


def test_the_library_reads_a_streamed_file(tmp_path):
    """Odd sizes and several dtypes, each tensor aligned to its own size."""
    rng = np.random.default_rng(0)
    tensors = {"half": rng.normal(size=(3, 5)).astype(np.float16), "byte": np.arange(7, dtype=np.uint8),
               "long": np.arange(3), "single": rng.normal(size=(5,)).astype(np.float32), "none": np.zeros((0, 2))}
    late = {name: LateTensor(value.shape, value.dtype.name, lambda value=value: value)
            for name, value in tensors.items()}
    stream_safetensors(tmp_path / "ours.safetensors", late, {"format": "pt"})
    for name, value in load_file(tmp_path / "ours.safetensors").items():
        np.testing.assert_array_equal(value, tensors[name])
        assert value.dtype == tensors[name].dtype
    with (tmp_path / "ours.safetensors").open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    assert size % 8 == 0
    for name, value in tensors.items():
        assert header[name]["data_offsets"][0] % value.dtype.itemsize == 0
