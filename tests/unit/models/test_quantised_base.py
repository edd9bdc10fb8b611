"""Tests of models whose base is stored in 8 or 4 bits: against transformers, runs, resuming, exporting, planning."""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import IMAGE_TOKEN, ROOT, DiesAt, Killed, same_run, small_config, tree_max_difference, write_llava
from safetensors import safe_open

import pilot_jax
from pilot_jax.errors import InputError
from pilot_jax.federation.client import client_loss
from pilot_jax.models.checkpoints import reading
from pilot_jax.models.checkpoints.tensor_names import pieces
from pilot_jax.models.pretrained import load
from pilot_jax.planning import estimate
from pilot_jax.runs import prepare, simulate
from pilot_jax.runs.export import export_client, merge_client

sys.path.insert(0, str(ROOT / "tests" / "unit" / "kernels"))
from test_quantised import numpy_dequantised

SCHEMES = ("int8", "nf4")


def is_stored(leaf):
    return isinstance(leaf, dict) and "scale" in leaf and bool({"qvalue", "packed"} & set(leaf))


def in_float(base):
    """Returns a base whose quantised weights NumPy has dequantised."""
    def plain(leaf):
        if not is_stored(leaf):
            return leaf
        layers = len(leaf["scale"])
        return jnp.asarray(np.stack([numpy_dequantised({n: a[i] for n, a in leaf.items()}) for i in range(layers)]),
                           jnp.float32)

    return jax.tree.map(plain, base, is_leaf=is_stored)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Returns a tiny checkpoint's folder and its torch model."""
    folder = tmp_path_factory.mktemp("tiny")
    return folder, write_llava(folder)


def prompt():
    rng = np.random.default_rng(3)
    ids = rng.integers(6, 64, (2, 12))
    ids[:, 1:5] = IMAGE_TOKEN
    return ids, np.ones_like(ids), rng.normal(size=(2, 3, 16, 16)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_and_answers_are_those_of_transformers(checkpoint, scheme):
    """transformers' model with the weights that NumPy dequantises gives the same logits and greedy answers."""
    folder, torch_model = checkpoint
    model = load(folder, base=scheme)
    weights, exact = torch_model.state_dict(), in_float(model.base)
    with torch.no_grad():
        for name, piece in pieces(model.config).items():
            leaf = exact
            for key in piece.leaf:
                leaf = leaf[key]
            if is_stored(at(model.base, piece.leaf)):
                target = next(k for k in weights if "vision" not in k and k.endswith(name.split("language_model.")[-1]))
                assert not torch.equal(weights[target], torch.tensor(piece.from_leaf(np.asarray(leaf))))
                weights[target].copy_(torch.tensor(piece.from_leaf(np.asarray(leaf))))
        torch_model.load_state_dict(weights)
        ids, mask, pixels = prompt()
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask),
                  "pixel_values": torch.tensor(pixels)}
        theirs = torch_model(**inputs).logits.numpy()
        answers = torch_model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=1,
                                       pad_token_id=1).numpy()
    np.testing.assert_allclose(model.logits(ids, mask, pixels), theirs, atol=1e-4)
    ours = model.generate(ids, mask, pixels, max_new_tokens=5, eos_id=1)
    for mine, other in zip(ours, answers[:, ids.shape[1]:], strict=True):
        assert mine[:len(other)].tolist() == other.tolist()


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def test_one_tensor_at_a_time_is_in_float(checkpoint, monkeypatch):
    """While a checkpoint is read, the decoder's linear layers exist in 8 bits only, and LoRA has float32 beside it."""
    seen, insert = [], reading._insert_quantised

    def noted(leaf, *rest, **options):
        seen.append({n: a.dtype.name for n, a in leaf.items()})
        return insert(leaf, *rest, **options)

    monkeypatch.setattr(reading, "_insert_quantised", noted)
    base = load(checkpoint[0], base="int8").base["decoder"]["layers"]
    assert len(seen) == 7 * 2 and all(one == {"qvalue": "int8", "scale": "float32"} for one in seen)
    assert {n for n, leaf in base.items() if is_stored(leaf)} == {"q", "k", "v", "o", "gate", "up", "down"}
    with pytest.raises(InputError, match="bf16, int8 or nf4"):
        load(checkpoint[0], base="int4")


@pytest.fixture(scope="module", params=SCHEMES)
def quantised(request):
    return prepare.prepare(small_config(model={"base": request.param}, strategy={"name": "fedavg"}))


@pytest.mark.slow
def test_loss_and_gradients_of_the_embedded_base(quantised):
    """The loss and LoRA's gradients are those of a float base that NumPy has dequantised, and not those of the base."""
    fed = quantised.federation
    adapters = jax.tree.map(lambda a: jnp.asarray(a) + 0.01, prepare.initial_adapters(fed))
    spec, data = fed.phase(fed.strategy.first_stages[0]), fed.clients[0].train
    batch = {name: jnp.asarray(np.asarray(array[np.arange(4)])) for name, array in data.items()}
    trained, frozen = spec.split(adapters)
    loss = jax.jit(jax.value_and_grad(lambda t, base: client_loss(spec, base, t, frozen, batch, 0)[0]))
    ours, exact = loss(trained, fed.model.base), loss(trained, in_float(fed.model.base))
    original = loss(trained, load("embedded").base)
    assert abs(ours[0] - exact[0]) <= 1e-5
    assert tree_max_difference(ours[1], exact[1]) <= 1e-4 * max(float(jnp.abs(g).max()) for g in jax.tree.leaves(exact))
    assert 1e-5 < abs(float(original[0] - exact[0])) < 0.5


@pytest.mark.long
def test_a_killed_run_resumes_and_exports(tmp_path):
    """A run on a base in 4 bits, killed after its first phase, ends as an undisturbed one; its LoRA is exported, and
    merged into the checkpoint's own weights."""
    config = small_config(model={"base": "nf4"}, strategy={"name": "fedavg"}, federation={"rounds": 2},
                          data={"digits": {"train": 4}})
    whole = simulate.simulate(config, out=tmp_path / "whole")
    with pytest.raises(Killed):
        simulate.simulate(config, out=tmp_path / "killed", observers=[DiesAt(1, "phase")])
    simulate.simulate(config, out=tmp_path / "killed", resume=True)
    same_run(tmp_path / "whole", tmp_path / "killed")
    sizes = json.loads((tmp_path / "whole" / "summary.json").read_text())["memory_bytes"]
    planned = estimate.make_plan(config)["memory_per_device"]["generation"]["base"]
    devices = len(jax.tree.leaves(whole.federation.model.base)[0].sharding.device_set)
    assert sizes["base"] == devices * planned < 0.7 * devices * estimate.make_plan(
        small_config())["memory_per_device"]["generation"]["base"]
    client = whole.federation.names[0]
    export_client(whole, client, tmp_path / "adapter")
    merge_client(whole, client, tmp_path / "merged")
    lora = whole.population[0].adapters["text_adapter"]["layers"]["q"]
    with (safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "np") as adapter,
          safe_open(tmp_path / "merged" / "model.safetensors", "np") as merged,
          safe_open(pilot_jax.models.packaged.model_directory("embedded") / "model.safetensors", "np") as original):
        a = next(k for k in adapter.keys() if "layers.0" in k and "q_proj.lora_A" in k)  # noqa: SIM118
        np.testing.assert_array_equal(adapter.get_tensor(a), lora["a"][0])
        name = next(k for k in merged.keys() if "layers.0.self_attn.q_proj" in k and "vision" not in k)  # noqa: SIM118
        before = next(k for k in original.keys() if "layers.0.self_attn.q_proj" in k and "vision" not in k)  # noqa: SIM118
        np.testing.assert_allclose(
            merged.get_tensor(name).astype(np.float64) - original.get_tensor(before).astype(np.float64),
            2 * lora["b"][0].astype(np.float64) @ lora["a"][0], atol=2e-3)
