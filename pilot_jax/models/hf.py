"""Hugging Face LLaVA safetensors ↔ the pytrees of this package.

Both key layouts in the wild are read. Every tensor is accounted for: a missing one is an error, and so is one that
nothing here reads, except the vision layers above the selected one and CLIP's post-norm, which LLaVA never runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pilot_jax.errors import InputError
from pilot_jax.models.config import VlmConfig, read_vlm_config

Get = Callable[[str], np.ndarray]


def canonical_name(name: str) -> str:
    """One name for a tensor whichever release of transformers wrote it."""
    name = re.sub(r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)", "", name)
    name = re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    return re.sub(r"^language_model\.model\.", "language_model.", name)


class _Shards:
    """Tensors of one directory by canonical name, opened lazily; counts what was read."""

    def __init__(self, directory: Path) -> None:
        from safetensors import SafetensorError, safe_open

        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise InputError(f"{directory}: no *.safetensors file. Pickled weights are not read: convert them with "
                             "transformers' save_pretrained(..., safe_serialization=True).")
        self._where: dict[str, tuple] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="flax")
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file}: not a readable safetensors file ({error}). Fetch it again.") from None
            for key in handle.keys():  # noqa: SIM118 - a safetensors handle is not a dict
                self._where[canonical_name(key)] = (handle, key)
        self._directory, self._read = directory, set()

    def __call__(self, name: str) -> np.ndarray:
        if name not in self._where:
            raise InputError(f"{self._directory}: tensor {name!r} is missing. The checkpoint is incomplete.")
        handle, key = self._where[name]
        self._read.add(name)
        return np.asarray(handle.get_tensor(key))

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def refuse_unread(self, skip: Callable[[str], bool]) -> None:
        unread = sorted(n for n in self._where if n not in self._read and not skip(n))
        if unread:
            shown = ", ".join(unread[:5]) + (" …" if len(unread) > 5 else "")
            raise InputError(f"{self._directory}: {len(unread)} tensors belong to nothing this model has: {shown}. "
                             "The config and the weights do not fit together.")


def _linear(get: Get, name: str, bias: bool = True) -> dict:
    layer = {"kernel": get(f"{name}.weight").T}
    return layer | {"bias": get(f"{name}.bias")} if bias else layer


def _norm(get: Get, name: str) -> dict:
    return {"scale": get(f"{name}.weight"), "bias": get(f"{name}.bias")}


def _stack(trees: list[dict]) -> dict:
    import jax

    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _vision_layer(get: Get, prefix: str) -> dict:
    q, k, v = (_linear(get, f"{prefix}.self_attn.{n}_proj") for n in "qkv")
    return {
        "norm1": _norm(get, f"{prefix}.layer_norm1"), "norm2": _norm(get, f"{prefix}.layer_norm2"),
        "qkv": {key: np.concatenate([q[key], k[key], v[key]], axis=-1) for key in ("kernel", "bias")},
        "out": _linear(get, f"{prefix}.self_attn.out_proj"),
        "fc1": _linear(get, f"{prefix}.mlp.fc1"), "fc2": _linear(get, f"{prefix}.mlp.fc2"),
    }


def _vision_tower(get: Get, config: VlmConfig) -> dict:
    v, prefix = config.vision, "vision_tower"
    patch = get(f"{prefix}.embeddings.patch_embedding.weight")  # [D, 3, p, p] → rows in (p, p, 3) order
    return {
        "patch_embed": {"kernel": patch.transpose(2, 3, 1, 0).reshape(-1, v.hidden_size)},
        "class_embed": get(f"{prefix}.embeddings.class_embedding"),
        "position_embed": get(f"{prefix}.embeddings.position_embedding.weight"),
        "pre_norm": _norm(get, f"{prefix}.pre_layrnorm"),
        "layers": _stack([_vision_layer(get, f"{prefix}.encoder.layers.{i}") for i in range(v.num_layers)]),
    }


def _decoder_layer(get: Get, prefix: str, config: VlmConfig) -> dict:
    t = config.text
    kv, groups = t.num_kv_heads, t.num_heads // t.num_kv_heads
    q = get(f"{prefix}.self_attn.q_proj.weight").T.reshape(-1, kv, groups, t.head_dim)
    k, v = (get(f"{prefix}.self_attn.{n}_proj.weight").T.reshape(-1, kv, 1, t.head_dim) for n in "kv")
    gate, up = (get(f"{prefix}.mlp.{n}_proj.weight").T for n in ("gate", "up"))
    return {
        "norm1": get(f"{prefix}.input_layernorm.weight"), "norm2": get(f"{prefix}.post_attention_layernorm.weight"),
        "qkv": np.concatenate([q, k, v], axis=2), "o": get(f"{prefix}.self_attn.o_proj.weight").T,
        "gate_up": np.stack([gate, up], axis=1), "down": get(f"{prefix}.mlp.down_proj.weight").T,
    }


def load_base(directory: str | Path, dtype: str = "float32") -> tuple[VlmConfig, dict]:
    """Shapes and frozen weights of a Hugging Face LLaVA directory.

    Returns the config and {"vision_tower", "projector", "decoder"} with NumPy leaves in `dtype` (the projector,
    from which everything trained starts, always float32).

    Raises:
        InputError: not a LLaVA checkpoint, unsupported features, missing, unread or misshapen tensors.
    """
    directory = Path(directory)
    config = read_vlm_config(directory)
    shards = _Shards(directory)
    t = config.text
    try:
        decoder = {
            "embedding": shards("language_model.embed_tokens.weight"),
            "layers": _stack([_decoder_layer(shards, f"language_model.layers.{i}", config)
                              for i in range(t.num_layers)]),
            "norm": shards("language_model.norm.weight"),
        }
        if not t.tie_word_embeddings:
            decoder["head"] = shards("lm_head.weight").T
        base = {
            "vision_tower": _vision_tower(shards, config),
            "projector": {n: _linear(shards, f"multi_modal_projector.{n}", config.projector_bias)
                          for n in ("linear_1", "linear_2")},
            "decoder": decoder,
        }
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{directory}: tensor shapes do not fit config.json ({error}).") from None
    shards.refuse_unread(lambda name: _never_run(name, config))
    _check_finite(base, directory)
    return config, {name: _cast(tree, "float32" if name == "projector" else dtype) for name, tree in base.items()}


def _never_run(name: str, config: VlmConfig) -> bool:
    layer = re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", name)
    return ((layer is not None and int(layer[1]) >= config.vision.num_layers)
            or name.startswith("vision_tower.post_layernorm.")
            or name == "vision_tower.embeddings.position_ids"
            or name.endswith("rotary_emb.inv_freq")
            or (name == "lm_head.weight" and config.text.tie_word_embeddings))


def _check_finite(tree: dict, directory: Path) -> None:
    import jax

    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not np.all(np.isfinite(leaf.astype(np.float32))):
            raise InputError(f"{directory}: {jax.tree_util.keystr(path)} holds NaN or Inf. The checkpoint is broken.")


def _cast(tree: dict, dtype: str) -> dict:
    import jax
    import jax.numpy as jnp

    return jax.tree.map(lambda leaf: np.ascontiguousarray(leaf.astype(jnp.dtype(dtype))), tree)


def save_base(directory: str | Path, config: VlmConfig, base: dict, hf_config: dict, dtype: str = "float16") -> None:
    """Write `base` as a LLaVA directory that `transformers` loads: the inverse of `load_base`, one shard.

    `hf_config` is the content of `config.json`; its tower must have exactly the layers that are run.
    """
    from safetensors.numpy import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}

    def put(name: str, value: np.ndarray) -> None:
        tensors[name] = np.ascontiguousarray(np.asarray(value, np.float32).astype(dtype))

    def put_linear(name: str, layer: dict) -> None:
        put(f"{name}.weight", np.asarray(layer["kernel"]).T)
        if "bias" in layer:
            put(f"{name}.bias", layer["bias"])

    def put_norm(name: str, norm: dict) -> None:
        put(f"{name}.weight", norm["scale"])
        put(f"{name}.bias", norm["bias"])

    v, t, vision = config.vision, config.text, base["vision_tower"]
    prefix = "vision_tower.vision_model"
    patch = np.asarray(vision["patch_embed"]["kernel"]).reshape(v.patch_size, v.patch_size, 3, v.hidden_size)
    put(f"{prefix}.embeddings.patch_embedding.weight", patch.transpose(3, 2, 0, 1))
    put(f"{prefix}.embeddings.class_embedding", vision["class_embed"])
    put(f"{prefix}.embeddings.position_embedding.weight", vision["position_embed"])
    put_norm(f"{prefix}.pre_layrnorm", vision["pre_norm"])
    # transformers insists on a post-norm; the selected features are taken before it.
    put_norm(f"{prefix}.post_layernorm", {"scale": np.ones(v.hidden_size), "bias": np.zeros(v.hidden_size)})
    for i in range(v.num_layers):
        layer = _take(vision["layers"], i)
        name = f"{prefix}.encoder.layers.{i}"
        put_norm(f"{name}.layer_norm1", layer["norm1"])
        put_norm(f"{name}.layer_norm2", layer["norm2"])
        for j, projection in enumerate("qkv"):
            part = {k: np.split(np.asarray(a), 3, axis=-1)[j] for k, a in layer["qkv"].items()}
            put_linear(f"{name}.self_attn.{projection}_proj", part)
        put_linear(f"{name}.self_attn.out_proj", layer["out"])
        put_linear(f"{name}.mlp.fc1", layer["fc1"])
        put_linear(f"{name}.mlp.fc2", layer["fc2"])
    for name, layer in base["projector"].items():
        put_linear(f"multi_modal_projector.{name}", layer)
    decoder, prefix = base["decoder"], "language_model.model"
    put(f"{prefix}.embed_tokens.weight", decoder["embedding"])
    put(f"{prefix}.norm.weight", decoder["norm"])
    if not t.tie_word_embeddings:
        put("language_model.lm_head.weight", np.asarray(decoder["head"]).T)
    groups, width = t.num_heads // t.num_kv_heads, t.hidden_size
    for i in range(t.num_layers):
        layer = _take(decoder["layers"], i)
        name = f"{prefix}.layers.{i}"
        put(f"{name}.input_layernorm.weight", layer["norm1"])
        put(f"{name}.post_attention_layernorm.weight", layer["norm2"])
        qkv = np.asarray(layer["qkv"])
        for projection, part in (("q", qkv[:, :, :groups]), ("k", qkv[:, :, groups]), ("v", qkv[:, :, groups + 1])):
            put(f"{name}.self_attn.{projection}_proj.weight", part.reshape(width, -1).T)
        put(f"{name}.self_attn.o_proj.weight", np.asarray(layer["o"]).T)
        put(f"{name}.mlp.gate_proj.weight", np.asarray(layer["gate_up"])[:, 0].T)
        put(f"{name}.mlp.up_proj.weight", np.asarray(layer["gate_up"])[:, 1].T)
        put(f"{name}.mlp.down_proj.weight", np.asarray(layer["down"]).T)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(hf_config | {"dtype": dtype}, indent=2, sort_keys=True)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")


def _take(tree: dict, index: int) -> dict:
    import jax

    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], tree)
