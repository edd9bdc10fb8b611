"""Writes a base model as a Hugging Face LLaVA directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from pilot_jax.files import write_safetensors
from pilot_jax.models.checkpoints.tensor_names import leaf_at, pieces, stock_name
from pilot_jax.models.spec import VlmSpec


def save_base(directory: str | Path, config: VlmSpec, base: dict[str, PyTree], hf_config: dict[str, Any],
              dtype: str = "float16") -> None:
    """Writes `base` as a LLaVA directory that transformers can load, with all weights in one file.

    `hf_config` is the content of `config.json`; its vision tower must have exactly the layers that run.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    host = jax.tree.map(np.asarray, base)
    for name, piece in pieces(config).items():
        tensor = piece.from_leaf(leaf_at(host, piece.leaf)).astype(np.float32).astype(dtype)
        tensors[stock_name(name, config.tower.family)] = np.ascontiguousarray(tensor)
    # transformers requires the tower's final norm, although LLaVA takes its features before it.
    width, prefix = config.tower.hidden_size, "vision_tower.vision_model.post_layernorm"
    tensors[f"{prefix}.weight"], tensors[f"{prefix}.bias"] = np.ones(width, dtype), np.zeros(width, dtype)
    write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
    text = json.dumps(hf_config | {"dtype": dtype}, indent=2, sort_keys=True)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")
