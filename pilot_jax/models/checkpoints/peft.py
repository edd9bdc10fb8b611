"""One client's adapters as files that other tools load: LoRA for PEFT, the connector as safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pilot_jax.models.lora import TARGETS, assembled

# Where the decoder's layers are in transformers' LlavaForConditionalGeneration, and in a language model of its own.
LAYERS = {"llava": "model.language_model.layers", "language_model": "model.layers"}
_MODULES = {name: ("self_attn" if name in "qkvo" else "mlp") + f".{name}_proj" for name in TARGETS}


def peft_tensors(lora: Mapping[str, Any], kind: str) -> dict[str, np.ndarray]:
    """LoRA under the names that PEFT saves; `kind` is a key of LAYERS."""
    tensors = {}
    for target, pair in lora["layers"].items():
        for i in range(len(pair["a"])):
            name = f"base_model.model.{LAYERS[kind]}.{i}.{_MODULES[target]}"
            tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(pair["a"][i], np.float32)
            tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(pair["b"][i], np.float32)
    return tensors


def peft_config(rank: int, alpha: float, kind: str, base: str) -> dict[str, Any]:
    """`adapter_config.json`. In a LLaVA model the pattern keeps the vision tower's own q_proj … out."""
    names = [f"{name}_proj" for name in TARGETS]
    inside = rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(names)})"
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
            "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
            "inference_mode": True, "target_modules": inside if kind == "llava" else names}


def _torch_mlp(prefix: str, adapter: Mapping[str, Any], slot: int | None = None) -> dict[str, np.ndarray]:
    out = {}
    for layer, leaves in adapter.items():
        for name, leaf in leaves.items():
            value = np.asarray(leaf if slot is None else leaf[slot], np.float32)
            value = value.T if name == "kernel" else value  # torch keeps [out, in]
            out[f"{prefix}.{layer}.{'weight' if name == 'kernel' else 'bias'}"] = np.ascontiguousarray(value)
    return out


def connector_tensors(adapters: Mapping[str, Any], stage: str, task_index: int) -> dict[str, np.ndarray]:
    """The connector of `stage` in torch's orientation: what its forward pass reads, and nothing else.

    plain: projector. stage1: task, client. stage2: task, client, router.weight [T, D], and for each other task i
    task_bank.i and cross_task.i; the own slot is `task`. client is absent in ablations without it.
    """
    names = [name for name in ("projector", "task", "client") if name in adapters]
    tensors = {k: v for name in names for k, v in _torch_mlp(name, adapters[name]).items()}
    if stage == "stage2":
        router = np.asarray(adapters["router"]["kernel"], np.float32)
        tensors["router.weight"] = np.ascontiguousarray(router.T)
        for i in range(router.shape[1]):
            if i != task_index:
                tensors |= _torch_mlp(f"task_bank.{i}", adapters["task_bank"], i)
                tensors |= _torch_mlp(f"cross_task.{i}", adapters["cross_task"], i)
    return tensors


def save_adapters(out: Path, adapters: Mapping[str, Any], *, stage: str, tasks: tuple[str, ...], task_index: int,
                  rank: int, alpha: float, kind: str, base: str, card: str) -> None:
    """Write `adapter_model.safetensors`, `adapter_config.json`, `connector.safetensors` and `README.md` into `out`.

    `adapters` are those that `stage` uses; `rank` and `alpha` the config's: two LoRAs side by side are saved as one of
    twice the rank with the same alpha / rank. The folder appears when it is complete, never before.
    """
    from safetensors.numpy import save_file

    lora = assembled(adapters)
    assert lora is not None  # every strategy trains one
    ranks = next(iter(lora["layers"].values()))["a"].shape[-2]
    rank, alpha = ranks, alpha * ranks / rank

    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    save_file(peft_tensors(lora, kind), partial / "adapter_model.safetensors",
              metadata={"format": "pt"})
    (partial / "adapter_config.json").write_text(json.dumps(peft_config(rank, alpha, kind, base), indent=2) + "\n",
                                                 encoding="utf-8")
    save_file(connector_tensors(adapters, stage, task_index), partial / "connector.safetensors",
              metadata={"stage": stage, "tasks": json.dumps(tasks), "task_index": str(task_index)})
    (partial / "README.md").write_text(card, encoding="utf-8")
    partial.rename(out)
