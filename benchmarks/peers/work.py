"""Makes the work that `run.py` gives to every system: base model, samples, batches and first LoRA.

    python benchmarks/peers/work.py FOLDER [--clients 9]

FOLDER/base is a LLaVA checkpoint in Hugging Face's format with random weights. FOLDER/work.npz has

- `pixels` float32 [K, n, 3, 48, 48] and `input_ids` int64 [K, n, 64], each client's samples: 36 image tokens, then 28
  tokens of text, of which the last 8 are learnt;
- `orders` int32 [rounds, K, steps, B], the samples of each step. They are those that pilot_jax draws by itself;
- `{target}_a` float32 [layers, R, d_in], LoRA's first A. Its B is 0.

FOLDER/work.json has the numbers that all systems need, such as the learning rate.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

SETTINGS = {"rounds": 3, "samples": 32, "batch": 4, "rate": 1e-3, "weight_decay": 0.0, "rank": 8, "alpha": 16.0,
            "image_tokens": 36, "text_tokens": 28, "learnt": 8, "seed": 0}
VISION = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3,
          "num_attention_heads": 4, "image_size": 48, "patch_size": 8, "num_channels": 3, "hidden_act": "quick_gelu",
          "layer_norm_eps": 1e-5, "projection_dim": 64}
TEXT = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 512, "hidden_act": "silu",
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "tie_word_embeddings": False}
IMAGE_TOKEN = TEXT["vocab_size"] - 1
TARGETS = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn", "gate": "mlp", "up": "mlp",
           "down": "mlp"}
PARAMETERS = 94_208  # of LoRA: rank 8 on these seven targets in four layers


def shape(target: str) -> tuple[int, int]:
    """Returns (d_out, d_in) of a linear layer of the language model."""
    width, inner = TEXT["hidden_size"], TEXT["intermediate_size"]
    return {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}.get(target, (width, width))


def client_names(clients: int) -> list[str]:
    """Returns the clients' names, which are in alphabetical order; pilot_jax's batches depend on them."""
    return [f"client_{k:03d}" for k in range(clients)]


def base_tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns random weights under the names of Hugging Face's LLaVA: matrices keep the scale of their inputs."""
    out: dict[str, np.ndarray] = {}

    def matrix(name: str, d_out: int, *d_in: int, bias: bool = False) -> None:
        out[f"{name}.weight"] = rng.normal(0, np.prod(d_in) ** -0.5, (d_out, *d_in))
        if bias:
            out[f"{name}.bias"] = rng.normal(0, 0.1, d_out)

    def norm(name: str, size: int, bias: bool = False) -> None:
        out[f"{name}.weight"] = rng.normal(1, 0.1, size)
        if bias:
            out[f"{name}.bias"] = rng.normal(0, 0.1, size)

    width, inner, patch = VISION["hidden_size"], VISION["intermediate_size"], VISION["patch_size"]
    tower = "vision_tower"
    out[f"{tower}.embeddings.class_embedding"] = rng.normal(0, 1, width)
    matrix(f"{tower}.embeddings.patch_embedding", width, 3, patch, patch)
    out[f"{tower}.embeddings.position_embedding.weight"] = rng.normal(0, 1, (SETTINGS["image_tokens"] + 1, width))
    for name in ("pre_layrnorm", "post_layernorm"):
        norm(f"{tower}.{name}", width, bias=True)
    for i in range(VISION["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            matrix(f"{layer}.self_attn.{name}", width, width, bias=True)
        matrix(f"{layer}.mlp.fc1", inner, width, bias=True)
        matrix(f"{layer}.mlp.fc2", width, inner, bias=True)
        norm(f"{layer}.layer_norm1", width, bias=True)
        norm(f"{layer}.layer_norm2", width, bias=True)
    model, text = "language_model.model", TEXT["hidden_size"]
    matrix("multi_modal_projector.linear_1", text, width, bias=True)
    matrix("multi_modal_projector.linear_2", text, text, bias=True)
    out[f"{model}.embed_tokens.weight"] = rng.normal(0, 1, (TEXT["vocab_size"], text))
    for i in range(TEXT["num_hidden_layers"]):
        for target, block in TARGETS.items():
            matrix(f"{model}.layers.{i}.{block}.{target}_proj", *shape(target))
        norm(f"{model}.layers.{i}.input_layernorm", text)
        norm(f"{model}.layers.{i}.post_attention_layernorm", text)
    norm(f"{model}.norm", text)
    matrix("language_model.lm_head", TEXT["vocab_size"], text)
    return {name: value.astype(np.float32) for name, value in out.items()}


def write_base(folder: Path, rng: np.random.Generator) -> None:
    """Writes the base model as Hugging Face's `save_pretrained` would."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "dtype": "float32",
              "image_token_index": IMAGE_TOKEN, "image_seq_length": SETTINGS["image_tokens"],
              "projector_hidden_act": "gelu", "multimodal_projector_bias": True, "vision_feature_layer": -2,
              "vision_feature_select_strategy": "default", "tie_word_embeddings": False, "vision_config": VISION,
              "text_config": TEXT}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file(base_tensors(rng), folder / "model.safetensors", {"format": "pt"})


def first_lora(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns A of every target, uniform in ±1/√d_in."""
    layers, out = TEXT["num_hidden_layers"], {}
    for target in TARGETS:
        d_in = shape(target)[1]
        out[f"{target}_a"] = rng.uniform(-d_in**-0.5, d_in**-0.5, (layers, SETTINGS["rank"], d_in)).astype(np.float32)
    assert sum(SETTINGS["rank"] * sum(shape(target)) for target in TARGETS) * layers == PARAMETERS
    return out


def batches(clients: int) -> np.ndarray:
    """Returns the samples of each step, as pilot_jax's clients visit them when nobody tells them: one epoch a round."""
    from pilot_jax.data.arrays import visiting_order
    from pilot_jax.federation.randomness import client_generator

    samples, batch, rounds = SETTINGS["samples"], SETTINGS["batch"], SETTINGS["rounds"]
    return np.stack([np.stack([
        visiting_order(client_generator(SETTINGS["seed"], name, round_, "plain"), samples, batch, samples // batch)[0]
        for name in client_names(clients)]) for round_ in range(1, rounds + 1)])


def write_work(folder: Path, clients: int) -> None:
    """Writes all that this file's docstring lists."""
    rng = np.random.default_rng(SETTINGS["seed"])
    write_base(folder / "base", rng)
    side, n, tokens = VISION["image_size"], SETTINGS["samples"], SETTINGS["text_tokens"]
    lora = first_lora(rng)
    pixels = rng.normal(size=(clients, n, 3, side, side)).astype(np.float32)
    text = rng.integers(3, IMAGE_TOKEN, (clients, n, tokens))
    image = np.full((clients, n, SETTINGS["image_tokens"]), IMAGE_TOKEN)
    np.savez(folder / "work.npz", pixels=pixels, input_ids=np.concatenate([image, text], axis=-1).astype(np.int64),
             orders=batches(clients).astype(np.int32), **lora)
    settings = SETTINGS | {"clients": clients, "d_out": {target: shape(target)[0] for target in TARGETS}}
    (folder / "work.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, default=9)
    args = parser.parse_args()
    write_work(args.folder, args.clients)
