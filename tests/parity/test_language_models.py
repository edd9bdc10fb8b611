"""Tests of a language model alone against transformers and peft in float32."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import slow_except, tree_max_difference, write_language_model

import pilot_jax
from pilot_jax.errors import InputError
from pilot_jax.federation.client import client_loss, optimizer_labels
from pilot_jax.federation.losses import LossWeights
from pilot_jax.federation.phases import OptimizerSpec, PhaseSpec, make_optimizer
from pilot_jax.models.lora import init_lora
from pilot_jax.models.spec import TARGETS

TOLERANCE = 1e-4
RANK, ALPHA, RATE = 4, 12, 0.05
FAMILIES = {"llama": {}, "tied": {"tie_word_embeddings": True}, "mistral": {"model_type": "mistral"},
            "qwen2": {"model_type": "qwen2"}}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Returns (torch model, pilot_jax model) of one language model."""
    folder = tmp_path_factory.mktemp("llm")
    return write_language_model(folder), pilot_jax.load_from_parts(None, folder, None, lora_scale=ALPHA / RANK)


def tokens():
    ids = np.random.default_rng(0).integers(7, 400, (3, 18))
    mask = np.ones_like(ids)
    mask[1, 11:] = 0
    return ids, mask


@pytest.mark.parametrize("family", slow_except({"llama"}, FAMILIES))
def test_logits_and_greedy_tokens(tmp_path, family):
    reference = write_language_model(tmp_path, **FAMILIES[family])
    model = pilot_jax.load_from_parts(None, tmp_path, None)
    assert set(model.base) == {"decoder"} and model.config.num_image_tokens == 0
    ids, mask = tokens()
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
        greedy = reference.generate(input_ids=torch.tensor(ids[:1]), max_new_tokens=12, do_sample=False,
                                    eos_token_id=399, pad_token_id=399)[:, ids.shape[1]:].numpy()
    seen = mask.astype(bool)
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(np.asarray(model.logits(ids, mask))[seen], expected[seen], atol=TOLERANCE)
    ours = model.generate(ids[:1], max_new_tokens=12, eos_id=399)
    np.testing.assert_array_equal(ours[:, :greedy.shape[1]], greedy)


def test_it_takes_no_images(both):
    _, model = both
    pixels = np.zeros((3, 3, 16, 16), np.float32)
    for call in (lambda: model.features(pixels), lambda: model.logits(*tokens(), pixels),
                 lambda: model.generate(*tokens(), pixels)):
        with pytest.raises(InputError, match=r"a language model alone, which takes no images.*model\.parts\.vision"):
            call()


def peft_linears(peft, targets):
    """Returns the modules that have LoRA, by target and layer."""
    layers = peft.base_model.model.model.layers
    return {name: [getattr(layer.self_attn if name in "qkvo" else layer.mlp, f"{name}_proj") for layer in layers]
            for name in targets}


@pytest.mark.parametrize("targets", [TARGETS, ("q", "v", "up", "down")], ids="-".join)
def test_a_gradient_step_of_lora_against_peft(both, targets):
    """Loss, gradients and the weights after a step of SGD are those of peft, at answers in the middle of a text."""
    from peft import LoraConfig, get_peft_model

    reference, model = both
    lora = jax.tree.map(lambda a: np.random.default_rng(1).normal(size=a.shape).astype(np.float32) * 0.2,
                        init_lora(jax.random.key(0), model.config.with_lora_on(targets).text, RANK))
    assert set(lora["layers"]) == set(targets)
    peft = get_peft_model(copy.deepcopy(reference), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[
        f"{name}_proj" for name in lora["layers"]])).train()
    linears = peft_linears(peft, targets)
    pairs = [(pair[x][i], getattr(module, f"lora_{x.upper()}")["default"].weight)
             for name, pair in lora["layers"].items() for i, module in enumerate(linears[name]) for x in ("a", "b")]
    with torch.no_grad():
        for ours, theirs in pairs:
            theirs.copy_(torch.tensor(ours))
    ids, mask = tokens()
    positions = np.tile([4, 5, 9, 0], (3, 1))
    weights = np.tile(np.float32([1, 1, 1, 0]), (3, 1))
    labels = np.full_like(ids, -100)
    for column in (5, 6, 10):
        labels[:, column] = ids[:, column]
    loss = peft(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), labels=torch.tensor(labels)).loss
    loss.backward()
    torch.optim.SGD([theirs for _, theirs in pairs], lr=RATE).step()

    optimizer = OptimizerSpec("sgd", 0.0, 1e-8, 0.0, "constant")
    spec = PhaseSpec(model.module, "plain", ("text_adapter",), (), (), (), LossWeights(), optimizer)
    batch = {"input_ids": ids, "attention_mask": mask, "target_positions": positions,
             "target_ids": np.take_along_axis(ids, positions + 1, axis=1), "target_weights": weights,
             "has_image": np.zeros(3, np.float32), "features": np.zeros((3, 0, 0), np.float32)}
    trained = {"text_adapter": jax.tree.map(jnp.asarray, lora)}
    batch = jax.tree.map(jnp.asarray, batch)
    value, gradient = jax.jit(jax.value_and_grad(
        lambda own: client_loss(spec, model.base, own, {}, batch, 0)[0]))(trained)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    step = make_optimizer(optimizer, optimizer_labels(trained), jnp.int32(10), {"lora": jnp.float32(RATE)})
    updates, _ = jax.jit(lambda gradient, own: step.update(gradient, step.init(own), own))(gradient, trained)
    after = jax.tree.map(np.add, trained, updates)["text_adapter"]
    expected = {"layers": {name: {x: np.stack([getattr(m, f"lora_{x.upper()}")["default"].weight.detach().numpy()
                                               for m in modules]) for x in ("a", "b")}
                           for name, modules in linears.items()}}
    assert tree_max_difference(lora, expected) > 1e-3  # the step moved the weights by far more than the tolerance
    assert tree_max_difference(after, expected) < 1e-6
