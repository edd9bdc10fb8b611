"""Tests of DINOv2 towers against transformers: features, resized positions, types, whole models, separate parts."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import IMAGE_TOKEN, slow_except, write_llava, write_tokenizer
from safetensors.torch import save_file
from transformers import AutoConfig, BitImageProcessorPil, Dinov2Model

import pilot_jax
from pilot_jax.errors import InputError
from pilot_jax.models.vision import bicubic_matrix

TOWER = {"model_type": "dinov2", "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "mlp_ratio": 2,
         "image_size": 40, "patch_size": 8}


def write_processor(folder, side, **settings):
    """Writes the settings of an image processor as DINOv2's, which crops images to squares of `side` pixels."""
    BitImageProcessorPil(size={"shortest_edge": side + 8}, crop_size={"height": side, "width": side}, **settings
                         ).save_pretrained(folder)


def features(folder, pixels, layers, **options):
    """Returns the features of `layers`, CLS token included, by transformers' tower of the checkpoint and by ours."""
    reference = Dinov2Model(AutoConfig.for_model(**TOWER)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        states = reference(torch.tensor(pixels), output_hidden_states=True).hidden_states
        theirs = np.concatenate([states[i].numpy() for i in layers], -1)
    reference.save_pretrained(folder)
    rest = folder.parent / "language", folder.parent / "projector.safetensors"
    return theirs, pilot_jax.load_from_parts(folder, *rest, feature_layer=list(layers), feature_select="full",
                                             **options)


@pytest.fixture
def parts(tmp_path):
    """Writes the other parts of a model whose tower is in `tmp_path / "tower"`; returns a function of their width."""
    write_tokenizer(tmp_path / "language", size=390, image=False)

    def write(width):
        torch.manual_seed(0)
        whole = write_llava(tmp_path / "whole", text={"vocab_size": 400})
        text = whole.config.text_config
        (tmp_path / "language" / "config.json").write_text(json.dumps(text.to_dict() | {"model_type": "llama"}))
        tensors = {f"model.{k}": v.clone() for k, v in whole.model.language_model.state_dict().items()}
        save_file(tensors | {"lm_head.weight": whole.lm_head.weight.detach().clone()},
                  tmp_path / "language" / "model.safetensors", metadata={"format": "pt"})
        save_file({"mm_projector.0.weight": torch.randn(32, width), "mm_projector.0.bias": torch.randn(32),
                   "mm_projector.2.weight": torch.randn(32, 32), "mm_projector.2.bias": torch.randn(32)},
                  tmp_path / "projector.safetensors")
        return tmp_path / "tower"

    return write


@pytest.mark.parametrize(("source", "target"), [(37, 4), (37, 8), (37, 16), (37, 37), (5, 9), (3, 1), (1, 3)])
def test_rows_are_resized_as_torch_does(source, target):
    """Compared in float64 with the interpolation that DINOv2's positions get in transformers."""
    values = np.random.default_rng(0).normal(size=(1, 2, source, source))
    theirs = torch.nn.functional.interpolate(torch.tensor(values), size=(target, target), mode="bicubic",
                                             align_corners=False).numpy()
    matrix = bicubic_matrix(source, target).astype(np.float64)
    np.testing.assert_allclose(np.einsum("ai,bj,...ij->...ab", matrix, matrix, values), theirs, atol=1e-5)


@pytest.mark.parametrize("side", slow_except([24, 52], [40, 24, 52]))
def test_features_of_any_size(parts, side):
    """A processor may give larger or smaller images than the tower was trained on. Pixels that fill no patch (52 is
    6·8 + 4) are left out. Layers 0 to 3 are the embeddings and the three layers."""
    pixels = np.random.default_rng(1).normal(size=(2, 3, side, side)).astype(np.float32)
    tower = parts(96)
    write_processor(tower, side)
    theirs, model = features(tower, pixels, (0, 1, 2, 3))
    assert model.config.vision.image_size == side and model.config.vision.trained_side == 5
    assert model.config.num_image_tokens == (side // 8) ** 2 + 1
    np.testing.assert_allclose(model.features(pixels), theirs, atol=1e-4)


@pytest.mark.slow
def test_bfloat16(parts):
    """The features' mean error in bfloat16 is at most 1.5 times torch's."""
    pixels = np.random.default_rng(1).normal(size=(2, 3, 24, 24)).astype(np.float32)
    tower = parts(24)
    write_processor(tower, 24)
    exact, model = features(tower, pixels, (3,), dtype="bfloat16")
    with torch.no_grad():
        theirs = Dinov2Model.from_pretrained(tower, dtype=torch.bfloat16)(
            torch.tensor(pixels).bfloat16(), output_hidden_states=True).hidden_states[3].float().numpy()
    ours = np.asarray(model.features(pixels).astype(jnp.float32))
    assert 0 < np.abs(ours - exact).mean() <= 1.5 * np.abs(theirs - exact).mean()


@pytest.mark.parametrize(("select", "tokens"), slow_except([("full", 10)], [("default", 9), ("full", 10)]))
def test_whole_models(tmp_path, select, tokens):
    """A LLaVA directory with a DINOv2 tower gives transformers' logits, with the CLS token dropped or kept.

    Layers behind the one that is used are not read: without their tensors, the result is the same.
    """
    reference = write_llava(tmp_path, vision=TOWER, vision_feature_select_strategy=select, vision_feature_layer=-3)
    write_processor(tmp_path, 24)
    model = pilot_jax.load(tmp_path)
    assert model.config.num_image_tokens == tokens and model.config.vision.num_layers == 1
    ids = np.random.default_rng(0).integers(6, 64, (2, 16))
    ids[:, 1:1 + tokens] = IMAGE_TOKEN
    pixels = np.random.default_rng(1).normal(size=(2, 3, 24, 24)).astype(np.float32)
    with torch.no_grad():
        theirs = reference(input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels)).logits.numpy()
    np.testing.assert_allclose(model.logits(ids, None, pixels), theirs, atol=1e-4)

    from safetensors.torch import load_file

    kept = {k: v for k, v in load_file(tmp_path / "model.safetensors").items()
            if "layer.1." not in k and "layer.2." not in k and "mask_token" not in k and ".layernorm." not in k}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_array_equal(pilot_jax.load(tmp_path).logits(ids, None, pixels), model.logits(ids, None, pixels))


def test_auto_drops_the_cls_token(parts):
    tower = parts(24)
    write_processor(tower, 24)
    Dinov2Model(AutoConfig.for_model(**TOWER)).save_pretrained(tower)
    model = pilot_jax.load_from_parts(tower, tower.parent / "language", tower.parent / "projector.safetensors")
    assert model.config.drop_first and model.config.num_image_tokens == 9


@pytest.mark.parametrize(("change", "message"), [
    ({"use_swiglu_ffn": True}, "use_swiglu_ffn: true is not supported. Use DINOv2 small, base or large"),
    ({"qkv_bias": False}, "qkv_bias: false is not supported"), ({"mlp_ratio": -1}, "mlp_ratio: -1, expected a number"),
    ({"patch_size": 32}, "patch_size: 32 pixels, larger than the 24 pixels of an image in preprocessor_config.json")])
def test_other_towers_are_refused(tmp_path, change, message):
    write_llava(tmp_path, vision=TOWER)
    write_processor(tmp_path, 24)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["vision_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError) as caught:
        pilot_jax.load(tmp_path)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


def test_images_that_are_not_square_are_refused(tmp_path):
    write_llava(tmp_path, vision=TOWER)
    write_processor(tmp_path, 24, do_center_crop=False)
    with pytest.raises(InputError, match="the image processor makes no square images"):
        pilot_jax.load(tmp_path)
