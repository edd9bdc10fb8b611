"""Tests of reading checkpoints: shards, dtypes, layouts of tensor names, old configs, separate parts, damaged files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from conftest import IMAGE_TOKEN, TINY_VISION, slow_except, write_checkpoint, write_llava
from safetensors.torch import load_file, save_file
from written_parts import write_parts

import pilot_jax
from pilot_jax.errors import InputError
from pilot_jax.models.checkpoints.reading import load_base


def probe(model, vocab=64):
    rng = np.random.default_rng(0)
    ids = rng.integers(6, vocab, (2, 14))
    ids[:, 2:2 + model.config.num_image_tokens] = model.config.image_token_id
    side = model.config.vision.image_size
    return ids, np.ones_like(ids), rng.normal(size=(2, 3, side, side)).astype(np.float32)


def torch_logits(reference, ids, mask, pixels):
    with torch.no_grad():
        return reference(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask),
                         pixel_values=torch.tensor(pixels)).logits.numpy()


def rewrite(folder, change):
    """Applies `change` to the tensors of the only weights file in `folder`."""
    file = folder / "model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    save_file(change(tensors), file, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", slow_except(["bfloat16"], ["float32", "bfloat16", "float16"]))
def test_shards_of_any_dtype(tmp_path, dtype):
    reference = write_llava(tmp_path, save={"dtype": getattr(torch, dtype), "max_shard_size": "20KB"})
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    model = pilot_jax.load(tmp_path)
    ids, mask, pixels = probe(model)
    np.testing.assert_allclose(model.logits(ids, mask, pixels), torch_logits(reference, ids, mask, pixels), atol=1e-4)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.base)} == {"float32"}


@pytest.mark.slow
def test_bfloat16_computation_is_close(tmp_path):
    """In bfloat16, the logits' mean error is at most 1.5 times torch's. Both are a few hundredths."""
    reference = write_llava(tmp_path)
    model = pilot_jax.load(tmp_path, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.base["decoder"])} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.base["projector"])} == {"float32"}
    ids, mask, pixels = probe(model)
    expected = torch_logits(reference, ids, mask, pixels)
    with torch.no_grad():
        theirs = reference.to(torch.bfloat16)(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask),
            pixel_values=torch.tensor(pixels).bfloat16()).logits.float().numpy()
    ours = np.asarray(model.logits(ids, mask, pixels))
    assert np.abs(ours - expected).mean() <= 1.5 * np.abs(theirs - expected).mean()


LAYOUTS = {
    "vision_model inside, model.language_model": (
        ("vision_tower.", "model.vision_tower.vision_model."), ("language_model.model.", "model.language_model."),
        ("language_model.lm_head", "lm_head"), ("multi_modal_projector", "model.multi_modal_projector")),
    "vision_model inside, language_model.model": (("vision_tower.", "vision_tower.vision_model."),),
    "no vision_model, model.language_model": (
        ("vision_tower.", "model.vision_tower."), ("language_model.model.", "model.language_model."),
        ("language_model.lm_head", "lm_head"), ("multi_modal_projector", "model.multi_modal_projector")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_key_layouts(tmp_path, tiny, layout):
    write_llava(tmp_path)

    def rename(tensors):
        out = {}
        for key, value in tensors.items():
            key = key.replace("vision_tower.vision_model.", "vision_tower.", 1)
            for ours, theirs in LAYOUTS[layout]:
                if key.startswith(ours):
                    key = theirs + key.removeprefix(ours)
                    break
            out[key] = value
        return out

    rewrite(tmp_path, rename)
    ids, mask, pixels = probe(tiny[1])
    np.testing.assert_array_equal(pilot_jax.load(tmp_path).logits(ids, mask, pixels), tiny[1].logits(ids, mask, pixels))


@pytest.mark.parametrize("scaling", [*slow_except((), [None, {"type": "linear", "factor": 4.0}]), {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64}])
def test_older_rope_fields(tmp_path, scaling):
    """The keys `rope_theta` and `rope_scaling`, which transformers 4 wrote, give the same model."""
    from transformers import LlavaForConditionalGeneration

    write_llava(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["text_config"].pop("rope_parameters")
    raw["text_config"] |= {"rope_theta": 50.0, "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    reference = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model = pilot_jax.load(tmp_path)
    assert model.config.text.rope.theta == 50.0
    ids, mask, pixels = probe(model)
    np.testing.assert_allclose(model.logits(ids, mask, pixels), torch_logits(reference, ids, mask, pixels), atol=1e-4)


def drop(name):
    return lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(name)}


def nan_in(name):
    def change(tensors):
        for key, value in tensors.items():
            if key.endswith(name):
                value.view(-1)[3] = float("nan")
        return tensors

    return change


BROKEN = {
    "missing": (drop("layers.1.mlp.up_proj.weight"), "1 tensors are missing: language_model.layers.1.mlp.up_proj"),
    "unknown": (lambda t: t | {"language_model.model.layers.0.self_attn.q_norm.weight": torch.ones(8)},
                "belong to no part of the model that config.json describes: "
                "language_model.model.layers.0.self_attn.q_norm.weight"),
    "misshapen": (lambda t: {k: v[:, :-1].contiguous() if k.endswith("down_proj.weight") else v for k, v in t.items()},
                  "has shape (32, 47), config.json asks for (32, 48)"),
    "NaN": (nan_in("layers.0.mlp.gate_proj.weight"), "holds NaN or Inf"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_weights_are_refused(tmp_path, name):
    change, message = BROKEN[name]
    write_llava(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(InputError) as caught:
        load_base(tmp_path)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


def test_other_broken_checkpoints(tmp_path):
    write_llava(tmp_path / "a")
    shutil.copy(tmp_path / "a" / "model.safetensors", tmp_path / "a" / "stale.safetensors")
    with pytest.raises(InputError, match="is also in"):
        load_base(tmp_path / "a")
    (tmp_path / "a" / "stale.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(InputError, match=r"stale.safetensors: not a readable safetensors file"):
        load_base(tmp_path / "a")
    for file in (tmp_path / "a").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(InputError, match="Pickled weights are not read"):
        load_base(tmp_path / "a")


@pytest.mark.parametrize(("part", "change", "message"), [
    ("text_config", {"model_type": "gpt2"}, "text_config.model_type: 'gpt2' is not supported"),
    ("vision_config", {"model_type": "vit"}, "vision_config.model_type: 'vit' is not supported"),
    ("text_config", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0,
                                         "original_max_position_embeddings": 64}}, "'yarn' is not supported"),
    (None, {"vision_feature_layer": 9}, "9 is outside the tower's 3 layers"),
    (None, {"vision_feature_layer": []}, "the list is empty"),
    (None, {"projector_hidden_act": "relu"}, "projector_hidden_act: 'relu'"),
    (None, {"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy"),
])
def test_unsupported_configs_name_the_key(tmp_path, part, change, message):
    write_llava(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (raw if part is None else raw[part]).update(change)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError) as caught:
        load_base(tmp_path)
    assert message in str(caught.value) and "config.json" in str(caught.value)


MEMORY = """
import resource, sys
import jax, jax.numpy as jnp
import pilot_jax
from transformers import LlavaConfig
pilot_jax.load(sys.argv[2])  # loads code and compiler into memory
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
base = pilot_jax.load(sys.argv[1], dtype="float32").base
jax.block_until_ready(base)
placed = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before * 1024 - placed, placed)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
def test_loading_streams(tmp_path):
    """While loading, peak memory beyond the loaded arrays is little more than the largest shard."""
    write_llava(tmp_path / "small")
    write_llava(tmp_path / "large", text={"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 16,
                                          "vocab_size": 4000}, save={"max_shard_size": "50MB"})
    shards = [f.stat().st_size for f in (tmp_path / "large").glob("*.safetensors")]
    assert len(shards) > 6
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path / "large", tmp_path / "small"], capture_output=True,
                          text=True, check=True)
    extra, placed = map(int, done.stdout.split())
    assert placed > 400e6
    assert extra < max(shards) + 150e6  # 150 MB for XLA's own buffers; the whole checkpoint has 450 MB


@pytest.mark.parametrize(("siglip", "projector"), [(False, "safetensors"), (False, "bin"), (True, "safetensors")])
def test_separate_parts_equal_the_whole(tmp_path, siglip, projector):
    whole, tokenizer = write_parts(tmp_path, siglip=siglip, projector=projector)
    model = pilot_jax.load_from_parts(tmp_path / "tower", tmp_path / "language", tmp_path / f"mm_projector.{projector}")
    assert model.config.image_token_id == len(tokenizer)  # <image> is added at the end of the vocabulary
    assert model.tokenizer().convert_tokens_to_ids("<image>") == len(tokenizer)
    ids, mask, pixels = probe(model, 300)
    theirs = np.where(ids == model.config.image_token_id, IMAGE_TOKEN, ids)
    np.testing.assert_allclose(model.logits(ids, mask, pixels), torch_logits(whole, theirs, mask, pixels), atol=1e-4)


def test_whole_contrastive_models_lend_their_tower(tmp_path):
    """From a CLIP directory with both towers, only the vision tower is used."""
    from transformers import CLIPConfig, CLIPModel

    whole, _ = write_parts(tmp_path)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(vision_config=TINY_VISION | {"projection_dim": 8}, text_config=text, projection_dim=8))
    clip.vision_model.load_state_dict(whole.model.vision_tower.state_dict())
    clip.save_pretrained(tmp_path / "clip")
    projector = tmp_path / "mm_projector.safetensors"
    model = pilot_jax.load_from_parts(tmp_path / "clip", tmp_path / "language", projector)
    same = pilot_jax.load_from_parts(tmp_path / "tower", tmp_path / "language", projector)
    pixels = probe(model, 300)[2]
    np.testing.assert_array_equal(model.features(pixels), same.features(pixels))


def test_unsafe_pickles_run_nothing(tmp_path):
    import pickle

    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    write_parts(tmp_path)
    (tmp_path / "bad.bin").write_bytes(pickle.dumps({"mm_projector.0.weight": Attack()}))
    with pytest.raises(InputError, match="cannot load it safely"):
        pilot_jax.load_from_parts(tmp_path / "tower", tmp_path / "language", tmp_path / "bad.bin")
    assert not (tmp_path / "owned").exists()


def test_parts_of_the_wrong_kind(tmp_path):
    write_parts(tmp_path)
    projector = tmp_path / "mm_projector.safetensors"
    with pytest.raises(InputError, match=r"expected a CLIP, SigLIP or DINOv2 model. Correct model.parts.vision"):
        pilot_jax.load_from_parts(tmp_path / "language", tmp_path / "language", projector)
    with pytest.raises(InputError, match=r"model.parts.projector: .*nowhere"):
        pilot_jax.load_from_parts(tmp_path / "tower", tmp_path / "language", tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no two-layer mm_projector"):
        pilot_jax.load_from_parts(tmp_path / "tower", tmp_path / "language", tmp_path / "tower" / "model.safetensors")


def test_image_token_of_tokenizer_and_config_must_agree(tmp_path):
    write_checkpoint(tmp_path)
    assert pilot_jax.load(tmp_path).tokenizer().convert_tokens_to_ids("<image>") == IMAGE_TOKEN
    raw = json.loads((tmp_path / "config.json").read_text())
    raw.pop("image_token_id", None)
    raw["image_token_index"] = 7
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="image_token_index is 7"):
        pilot_jax.load(tmp_path).tokenizer()
