"""The trained part of a real base, which is shipped with the package: a projector, and a LoRA to merge.

It is a folder with `projector.safetensors`, LLaVA's mm_projector, and a PEFT adapter of the language model, both in
float16, and a card.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from pilot_jax.files import read_json, write_safetensors
from pilot_jax.models.checkpoints.peft import peft_config, peft_tensors

ASSETS = Path(__file__).parent / "assets"
_PEFT = "base_model.model.model."


def trained_folder(name: str) -> Path | None:
    """Returns the folder of a base's trained part; None: the package has none."""
    return ASSETS / name if (ASSETS / name).is_dir() else None


def write_trained(folder: Path, params: dict[str, Any], rank: int, alpha: float, base: str) -> None:
    """Writes the trained parameters ("projector", "text_adapter") into an existing folder."""
    projector = {f"mm_projector.{2 * i}.{ours[0]}": np.asarray(params["projector"][f"linear_{i + 1}"][ours[1]]).T
                 for i in range(2) for ours in (("weight", "kernel"), ("bias", "bias"))}
    for file, tensors in (("projector.safetensors", projector),
                          ("adapter_model.safetensors", peft_tensors(params["text_adapter"], "language_model"))):
        write_safetensors(folder / file, {name: np.ascontiguousarray(value, np.float16)
                                          for name, value in tensors.items()}, {"format": "pt"})
    config = peft_config(rank, alpha, base)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def with_projector(tensors: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """Returns a LLaVA model's tensors with the projector of a folder."""
    out = dict(tensors)
    for name, value in load_file(folder / "projector.safetensors").items():
        _, layer, leaf = name.split(".")
        out[f"multi_modal_projector.linear_{1 + int(layer) // 2}.{leaf}"] = value
    return out


def with_lora(tensors: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """Returns a LLaVA model's tensors with the LoRA of a folder added to the language model's: W + (α/r)·B·A."""
    config = read_json(folder / "adapter_config.json", "Install the package again.")
    adapter, scale = load_file(folder / "adapter_model.safetensors"), config["lora_alpha"] / config["r"]
    out = dict(tensors)
    for name, a in adapter.items():
        if name.endswith(".lora_A.weight"):
            b = adapter[name.replace(".lora_A.", ".lora_B.")].astype(np.float32)
            weight = "language_model.model." + name.removeprefix(_PEFT).replace(".lora_A.weight", ".weight")
            out[weight] = out[weight].astype(np.float32) + scale * (b @ a.astype(np.float32))
    return out
