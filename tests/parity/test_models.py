"""Tests of the models against transformers and peft in float32: differences are at most 1e-4 (typically 1e-6)."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import IMAGE_TOKEN, TINY_TEXT, TINY_VISION, slow_except, write_llava

import pilot_jax
from pilot_jax.kernels.pointwise import rms_norm
from pilot_jax.models.checkpoints.hf_config import read_vlm_config
from pilot_jax.models.checkpoints.tensor_names import base_shapes
from pilot_jax.models.connector import mlp
from pilot_jax.models.llama import Decoder
from pilot_jax.models.lora import init_lora
from pilot_jax.models.pretrained import model_directory
from pilot_jax.models.vlm import Vlm, causal_mask, positions_of, variables

TOLERANCE = 1e-4


def inputs(tokens: int, size: int = 16, vocab: int = 64, length: int = 18, batch: int = 3):
    rng = np.random.default_rng(0)
    ids = rng.integers(6, vocab, (batch, length))
    ids[:, 2:2 + tokens] = IMAGE_TOKEN
    return ids, np.ones_like(ids), rng.normal(size=(batch, 3, size, size)).astype(np.float32)


def torch_logits(model, ids, mask, pixels):
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask),
                     pixel_values=None if pixels is None else torch.tensor(pixels)).logits.numpy()


def check_greedy_tokens(reference, model, ids, mask, pixels):
    """Asserts that 20 greedily decoded tokens equal those of transformers."""
    with torch.no_grad():
        tokens = reference.generate(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask),
                                    pixel_values=torch.tensor(pixels), max_new_tokens=20, do_sample=False,
                                    eos_token_id=63, pad_token_id=63)[:, ids.shape[1]:].numpy()
    ours = model.generate(ids, mask, pixels, max_new_tokens=20, eos_id=63)
    np.testing.assert_array_equal(ours[:, :tokens.shape[1]], tokens)


CASES = {
    "default": {},
    "full features keep CLS": {"vision_feature_select_strategy": "full"},
    "gelu tower, last layer": {"vision": {"hidden_act": "gelu"}, "vision_feature_layer": -1},
    "first layer, no projector bias": {"vision_feature_layer": 1, "multimodal_projector_bias": False},
    "no GQA, wide heads": {"text": {"num_key_value_heads": 4, "head_dim": 16}},
    "other RoPE base": {"text": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}},
    "tied head": {"text": {"tie_word_embeddings": True}, "tie_word_embeddings": True},
    "linear RoPE": {"text": {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}}},
    "llama3 RoPE": {"text": {"head_dim": 16, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 50.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}},
    "Llama with biases": {"text": {"attention_bias": True, "mlp_bias": True}},
    "Mistral": {"text": {"model_type": "mistral", "sliding_window": None, "head_dim": 16}},
    "Mistral, window 7": {"text": {"model_type": "mistral", "sliding_window": 7}},
    "Qwen2": {"text": {"model_type": "qwen2"}},
    "Qwen2, window 5 in its upper layer": {"text": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}},
    "SigLIP": {"vision": {"model_type": "siglip_vision_model"}, "vision_feature_select_strategy": "full"},
    "SigLIP, first token dropped, a rest of 3 pixels": {"vision": {"model_type": "siglip_vision_model",
                                                                   "image_size": 19}},
    "two feature layers": {"vision_feature_layer": [-2, 1]},
    "embeddings and last layer": {"vision_feature_layer": [0, -1], "vision_feature_select_strategy": "full"},
    "SigLIP and Qwen2, two layers": {"vision": {"model_type": "siglip_vision_model"}, "text": {"model_type": "qwen2"},
                                     "vision_feature_layer": [-1, -3], "vision_feature_select_strategy": "full"},
}


def shapes_by_init(spec):
    """Returns the shapes of the weights that the flax modules make themselves."""
    module, key, ids = Vlm(spec), jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    text = jax.eval_shape(lambda k, i: module.init(k, i, jnp.ones_like(i), None, method="logits"), key, ids)
    if spec.vision is None:
        return {"decoder": text["params"]["decoder"]}
    pixels = jax.ShapeDtypeStruct((1, spec.vision.image_size, spec.vision.image_size, 3), jnp.float32)
    tower = jax.eval_shape(lambda k, p: module.init(k, p, method="features"), key, pixels)
    return {"decoder": text["params"]["decoder"], "vision_tower": tower["params"]["vision_tower"]}


DINOV2 = {"vision": {"model_type": "dinov2", "hidden_size": 24, "mlp_ratio": 2}}


@pytest.mark.parametrize("name", [*CASES, "DINOv2"])
def test_base_shapes_are_those_of_the_modules(tmp_path, name):
    """The table of tensor names and the modules agree on the shape of every leaf; of a language model alone too."""
    case = dict((CASES | {"DINOv2": DINOV2})[name])
    config = {"model_type": "llava", "image_token_index": IMAGE_TOKEN,
              "vision_config": {"model_type": "clip_vision_model"} | TINY_VISION | case.pop("vision", {}),
              "text_config": {"model_type": "llama"} | TINY_TEXT | case.pop("text", {})} | case
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = read_vlm_config(tmp_path)
    for one in (spec, dataclasses.replace(spec, vision=None)):
        shapes = base_shapes(one)
        projector = shapes.pop("projector", {})
        assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
            lambda x: (x.shape, x.dtype), shapes_by_init(one))
    assert not projector and base_shapes(spec)["projector"]["linear_1"]["kernel"].shape == (
        spec.feature_size, spec.text.hidden_size)


@pytest.mark.parametrize("name", slow_except({"default"}, CASES, {
    "full features keep CLS", "no GQA, wide heads", "llama3 RoPE", "Mistral, window 7",
    "Qwen2, window 5 in its upper layer", "SigLIP, first token dropped, a rest of 3 pixels", "two feature layers"}))
def test_llava_logits_and_greedy_tokens(tmp_path, name):
    reference = write_llava(tmp_path, **CASES[name])
    model = pilot_jax.load(tmp_path)
    size = model.config.vision.image_size
    ids, mask, pixels = inputs(model.config.num_image_tokens, size)
    with torch.no_grad():
        features = reference.model.get_image_features(
            torch.tensor(pixels), vision_feature_layer=reference.config.vision_feature_layer,
            vision_feature_select_strategy=reference.config.vision_feature_select_strategy)
        projected = torch.stack(list(features.pooler_output)).numpy()
    ours = mlp(model.base["projector"], model.features(pixels))
    np.testing.assert_allclose(ours, projected.reshape(ours.shape), atol=TOLERANCE)
    expected = torch_logits(reference, ids, mask, pixels)
    assert np.ptp(expected) > 0.5  # the logits are not all alike, in which case agreement would mean little
    np.testing.assert_allclose(model.logits(ids, mask, pixels), expected, atol=TOLERANCE)
    check_greedy_tokens(reference, model, ids, mask, pixels)


@pytest.mark.parametrize(("tower", "text"), slow_except(
    (), [(tower, text) for tower in ("clip_vision_model", "siglip_vision_model")
         for text in ("llama", "mistral", "qwen2")],
    {("clip_vision_model", "qwen2"), ("siglip_vision_model", "llama")}))
def test_ladder(tmp_path, text, tower):
    """Each part agrees by itself, in order: patch embedding, tower, projector, decoder block, logits, greedy tokens."""
    select = "default" if tower == "clip_vision_model" else "full"
    reference = write_llava(tmp_path, text={"model_type": text}, vision={"model_type": tower},
                            vision_feature_select_strategy=select, vision_feature_layer=[0, -2])
    model = pilot_jax.load(tmp_path)
    ids, mask, pixels = inputs(model.config.num_image_tokens)
    first = 1 if select == "default" else 0
    with torch.no_grad():
        states = reference.model.vision_tower(torch.tensor(pixels), output_hidden_states=True).hidden_states
        image = torch.cat([states[0], states[-2]], -1)[:, first:]
        projected = reference.model.multi_modal_projector(image).numpy()
        embedded = reference.get_input_embeddings()(torch.tensor(ids))
        embedded[:, 2:2 + projected.shape[1]] = torch.tensor(projected)
        hidden = reference.model.language_model(inputs_embeds=embedded, output_hidden_states=True).hidden_states
    features = np.asarray(model.features(pixels))
    width = states[0].shape[-1]
    np.testing.assert_allclose(features[..., :width], states[0][:, first:].numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(features[..., width:], states[-2][:, first:].numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(mlp(model.base["projector"], features), projected, atol=TOLERANCE)
    one = dataclasses.replace(model.config.text, num_layers=1, sliding_layers=model.config.text.sliding_layers[:1])
    params = model.base["decoder"] | {"layers": jax.tree.map(lambda leaf: leaf[:1], model.base["decoder"]["layers"])}
    params = params | {"norm": jnp.ones_like(params["norm"])}  # the block's output, normalised without a weight
    block, _ = Decoder(one).apply({"params": params}, jnp.asarray(embedded.numpy()), positions_of(jnp.asarray(mask)),
                                  causal_mask(jnp.asarray(mask)), method="hidden")
    expected = rms_norm(jnp.asarray(hidden[1].numpy()), jnp.ones(32), model.config.text.rms_norm_eps)
    np.testing.assert_allclose(block, expected, atol=TOLERANCE)
    np.testing.assert_allclose(model.logits(ids, mask, pixels), torch_logits(reference, ids, mask, pixels),
                               atol=TOLERANCE)
    check_greedy_tokens(reference, model, ids, mask, pixels)


def test_clip_features(tiny):
    reference, model = tiny
    pixels = inputs(4)[2]
    with torch.no_grad():
        states = reference.model.vision_tower(torch.tensor(pixels), output_hidden_states=True).hidden_states
    np.testing.assert_allclose(model.features(pixels), states[-2][:, 1:].numpy(), atol=TOLERANCE)


def test_text_only_and_right_padding(tiny):
    reference, model = tiny
    ids, mask, _ = inputs(0)
    mask[1, 11:] = 0
    seen = mask.astype(bool)
    expected = torch_logits(reference, ids, mask, None)
    np.testing.assert_allclose(np.asarray(model.logits(ids, mask))[seen], expected[seen], atol=TOLERANCE)


@pytest.mark.slow
def test_padded_prompts_generate_what_each_alone_does(tiny):
    _, model = tiny
    ids, mask, pixels = inputs(4)
    mask[1, 13:] = 0
    both = model.generate(ids, mask, pixels, max_new_tokens=8, eos_id=63)
    alone = model.generate(ids[1:2, :13], mask[1:2, :13], pixels[1:2], max_new_tokens=8, eos_id=63)
    np.testing.assert_array_equal(both[1], alone[0])


@pytest.mark.slow
def test_lora_against_peft(tiny):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    reference, model = tiny
    rank, alpha, text = 4, 12, model.config.text
    llama = LlamaForCausalLM(reference.config.text_config).eval()
    llama.model.load_state_dict(reference.model.language_model.state_dict())
    llama.lm_head.load_state_dict(reference.lm_head.state_dict())
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft = get_peft_model(llama, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)).eval()
    lora = jax.tree.map(lambda a: np.random.default_rng(1).normal(size=a.shape).astype(np.float32) * 0.2,
                        init_lora(jax.random.key(0), text, rank))
    with torch.no_grad():
        for i, layer in enumerate(peft.base_model.model.model.layers):
            for name, pair in lora["layers"].items():
                block = layer.self_attn if name in "qkvo" else layer.mlp
                module = getattr(block, f"{name}_proj")
                module.lora_A["default"].weight.copy_(torch.tensor(pair["a"][i]))
                module.lora_B["default"].weight.copy_(torch.tensor(pair["b"][i]))
    ids, mask, _ = inputs(0)
    expected = peft(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.detach().numpy()
    module = Vlm(model.config, lora_scale=alpha / rank)
    ours = module.apply(variables(model.base, {"text_adapter": lora}), jnp.asarray(ids), jnp.asarray(mask), None,
                        method="logits")
    plain = model.logits(ids, mask)
    assert np.abs(np.asarray(plain) - expected).max() > 0.1  # the adapter matters
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE)


def test_shipped_base_is_what_transformers_loads():
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    folder = model_directory("embedded")
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 6e6
    reference = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    model = pilot_jax.load("embedded")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "USER: " + "<image>" * model.config.num_image_tokens + "\ndescribe the picture. ASSISTANT:"
    ids = np.asarray([tokenizer(text)["input_ids"]])
    pixels = np.random.default_rng(0).normal(size=(1, 3, 48, 48)).astype(np.float32)
    mask = np.ones_like(ids)
    np.testing.assert_allclose(model.logits(ids, mask, pixels), torch_logits(reference, ids, mask, pixels),
                               atol=TOLERANCE)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["model_type"] == "llava"


@pytest.mark.slow
def test_remat_and_unroll_change_nothing(tiny):
    """The decoder's gradients are the same with and without rematerialisation, of all or some activations, and
    unrolling."""
    _, model = tiny
    lora = init_lora(jax.random.key(0), model.config.text, 2)
    ids, mask, _ = inputs(0)
    x = jax.random.normal(jax.random.key(1), (*ids.shape, 32))

    def gradient(remat, unroll):
        decoder = Decoder(model.config.text, 1.0, jnp.float32, remat, unroll)

        def loss(lora):
            out, _ = decoder.apply({"params": model.base["decoder"], "lora": lora}, x, positions_of(jnp.asarray(mask)),
                                   causal_mask(jnp.asarray(mask)), method="hidden")
            return jnp.sum(jnp.sin(out))

        return jax.grad(loss)(lora)

    plain = gradient(False, 1)
    for remat, unroll in ((True, 2), ("selective", 1), ("selective", 2)):
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(gradient(remat, unroll)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_logits_are_causal(tiny):
    """The gradient of a position's output with respect to later embeddings is exactly zero."""
    _, model = tiny
    ids, mask, _ = inputs(0)
    decoder = Decoder(model.config.text)
    x = jax.random.normal(jax.random.key(1), (*ids.shape, 32))

    def early(x):
        out, _ = decoder.apply({"params": model.base["decoder"]}, x, positions_of(jnp.asarray(mask)),
                               causal_mask(jnp.asarray(mask)), method="hidden")
        return jnp.sum(out[:, :7] ** 2)

    gradient = jax.grad(early)(x)
    assert np.all(np.asarray(gradient[:, 7:]) == 0) and np.abs(gradient[:, :7]).max() > 0
