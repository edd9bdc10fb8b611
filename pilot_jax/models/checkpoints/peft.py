"""Writes one client's adapters for other tools: LoRA in PEFT's format, the connector as safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
from jaxtyping import PyTree

from pilot_jax.errors import InputError
from pilot_jax.files import new_folder, write_safetensors
from pilot_jax.models.experts import is_mixture
from pilot_jax.models.lora import LORA_SUBTREES, RESIDUAL, SCALE, assembled, joined, on_factors
from pilot_jax.models.spec import TARGETS

# Path of the decoder's layers in transformers' LlavaForConditionalGeneration, and in a language model by itself.
LAYERS = {"llava": "model.language_model.layers", "language_model": "model.layers"}
ABOUT = "pilot_jax.json"  # the file that says how an exported client is asked
MODULES = {name: ("self_attn" if name in "qkvo" else "mlp") + f".{name}_proj" for name in TARGETS}


def peft_tensors(lora: Mapping[str, PyTree], kind: str) -> dict[str, np.ndarray]:
    """Returns a LoRA's tensors, float32, under the names that PEFT gives them; `kind` is a key of LAYERS."""
    tensors = {}
    for target, pair in lora["layers"].items():
        for i in range(len(pair["a"])):
            name = f"base_model.model.{LAYERS[kind]}.{i}.{MODULES[target]}"
            tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(pair["a"][i], np.float32)
            tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(pair["b"][i], np.float32)
    return tensors


def peft_config(rank: int, alpha: float, base: str, exclude: str | None = None,
                targets: Sequence[str] = TARGETS) -> dict[str, Any]:
    """Returns the content of `adapter_config.json`, with the fields that PEFT and vLLM read.

    Args:
        targets: the linear layers that have LoRA.
        base: the name or path of the base model.
        exclude: a pattern of modules that have no LoRA although their names are among the targets, such as q_proj of a
            vision tower.
    """
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
            "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha, "lora_dropout": 0.0, "bias": "none",
            "target_modules": [f"{name}_proj" for name in targets], "modules_to_save": None, "use_rslora": False,
            "fan_in_fan_out": False, "inference_mode": True} | ({} if exclude is None else {"exclude_modules": exclude})


def _torch_mlp(prefix: str, adapter: Mapping[str, PyTree], slot: int | None = None) -> dict[str, np.ndarray]:
    """Returns the tensors of an MLP, or of number `slot` in a stack of MLPs, in torch's orientation [out, in]."""
    out = {}
    for layer, leaves in adapter.items():
        for name, leaf in leaves.items():
            value = np.asarray(leaf if slot is None else leaf[slot], np.float32)
            value = value.T if name == "kernel" else value
            out[f"{prefix}.{layer}.{'weight' if name == 'kernel' else 'bias'}"] = np.ascontiguousarray(value)
    return out


def connector_tensors(adapters: Mapping[str, PyTree], stage: str, task_index: int) -> dict[str, np.ndarray]:
    """Returns the tensors that the forward pass of the connector's `stage` reads, float32 in torch's orientation.

    plain: projector. stage1: task, client. stage2: task, client, router.weight [T, D], and task_bank.i and cross_task.i
    for each task i but the client's own, whose adapter is `task`. In ablations without ψ_s, `client` is absent.
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


def check_is_one_lora(lora: Mapping[str, PyTree], method: str) -> None:
    """Checks that an assembled LoRA is one LoRA, and not several that a router mixes.

    Raises:
        InputError: it is a mixture; the message has the `method` that trained it.
    """
    if is_mixture(lora["layers"]):
        raise InputError(f"--client: {method} mixes several LoRA for every token, which PEFT's format, one LoRA, "
                         "cannot express; the client's own LoRA alone would be another model. Use this one from the "
                         "run's folder (pilot-jax generate RUN --client K; in Python: pilot_jax.restore) or train with "
                         "a strategy that ends with one LoRA, such as pilot or fedavg. Nothing was written.")


def smallest(lora: Mapping[str, PyTree], most: int | None = None) -> tuple[PyTree, float]:
    """Returns (the LoRA of the smallest rank with the same products B·A, in NumPy; what is lost).

    Every target and layer gets the same rank: the largest that one of them has, up to rounding, or at most `most`.
    What is lost is ‖ΔW − B·A‖_F / ‖ΔW‖_F over all targets and layers, of the products before (ΔW) and after.
    """
    parts, largest = {}, 1
    for name, pair in lora["layers"].items():
        a, b = np.asarray(pair["a"], np.float64), np.asarray(pair["b"], np.float64)
        (q_b, r_b), (q_a, r_a) = np.linalg.qr(b), np.linalg.qr(a.swapaxes(-1, -2))
        u, values, vt = np.linalg.svd(r_b @ r_a.swapaxes(-1, -2), full_matrices=False)
        parts[name] = vt @ q_a.swapaxes(-1, -2), (q_b @ u) * values[:, None], values
        largest = max(largest, int(np.max(np.sum(values > 1e-6 * values[:, :1], axis=-1))))
    rank = min(largest, most or largest)
    pairs = {name: {"a": _wide(a[:, :rank], rank, 1), "b": _wide(b[..., :rank], rank, 2)}
             for name, (a, b, _) in parts.items()}
    whole = sum(float(np.sum(values**2)) for *_, values in parts.values())
    lost = sum(float(np.sum(values[:, rank:]**2)) for *_, values in parts.values())
    return {"layers": pairs}, (lost / whole) ** 0.5 if whole else 0.0


def _wide(factor: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """Returns a factor with zeros up to `rank` along `axis`, float32."""
    spare = [(0, rank - factor.shape[i] if i == axis else 0) for i in range(factor.ndim)]
    return np.pad(factor, spare).astype(np.float32)


def peft_lora(adapters: Mapping[str, PyTree], rank: int, most: int | None = None) -> tuple[PyTree, float]:
    """Returns (the LoRA that a client's subtrees in LORA_SUBTREES add up to; what is lost, see `smallest`).

    A change of the frozen weights is added to LoRA. The result then has the smallest rank that holds both.

    Args:
        rank: R, that of the arrays. A client with a rank r of its own gets B and A of rank r, whose factor is α/r,
            unless a change of the weights, whose factor is α/R, is added.
        most: the largest rank of the result.
    """
    if SCALE in adapters and RESIDUAL not in adapters:
        own = round(rank / float(adapters[SCALE]["factor"]))
        adapters = {n: on_factors(n, t, lambda a: a[..., :own, :], lambda b: b[..., :own])
                    for n, t in adapters.items() if n in LORA_SUBTREES and n != SCALE}
    lora = assembled(adapters)
    assert lora is not None  # every strategy trains one
    if RESIDUAL in adapters:
        lora = joined(lora, adapters[RESIDUAL])
    elif most is None or lora_rank(lora) <= most:
        return lora, 0.0
    return smallest(lora, most)


def lora_rank(lora: Mapping[str, PyTree]) -> int:
    """Returns the rank of a LoRA's arrays."""
    return next(iter(lora["layers"].values()))["a"].shape[-2]


class ExportDetails(TypedDict):
    """Keywords of `save_adapters`."""

    stage: str
    tasks: tuple[str, ...]
    task_index: int
    alpha_over_rank: float
    kind: str
    base: str
    exclude: str | None
    about: Mapping[str, Any]
    card: str


def save_adapters(out: Path, adapters: Mapping[str, PyTree], lora: Mapping[str, PyTree],
                  **details: Unpack[ExportDetails]) -> None:
    """Writes one client's adapters, and what is needed to use them, into the new folder `out`.

    They are `adapter_model.safetensors`, `adapter_config.json`, `connector.safetensors`, `pilot_jax.json`, `README.md`.

    The folder appears under its name only when it is complete. Adapters that are LoRA alone have no connector's file.

    Args:
        adapters: the client's adapters that `stage` uses.
        stage: the connector's stage: "plain", "stage1" or "stage2".
        tasks: the names of all tasks; `task_index` is the number of the client's own.
        lora: their LoRA, from `peft_lora`.
        alpha_over_rank: the factor by which LoRA's B·A is multiplied.
        kind: a key of LAYERS.
        base: the name or path of the base model.
        exclude: see `peft_config`.
        about: the content of `pilot_jax.json`.
        card: the text of `README.md`.

    Raises:
        InputError: the adapters are several LoRA that a router mixes (`check_is_one_lora`).
    """
    check_is_one_lora(lora, "this model")
    rank = lora_rank(lora)
    config = peft_config(rank, details["alpha_over_rank"] * rank, details["base"], details["exclude"],
                         [name for name in TARGETS if name in lora["layers"]])
    with new_folder(out) as folder:
        write_safetensors(folder / "adapter_model.safetensors", peft_tensors(lora, details["kind"]), {"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / ABOUT).write_text(json.dumps(details["about"], indent=2) + "\n", encoding="utf-8")
        if set(adapters) - set(LORA_SUBTREES):
            write_safetensors(folder / "connector.safetensors",
                              connector_tensors(adapters, details["stage"], details["task_index"]),
                              {"stage": details["stage"], "tasks": json.dumps(details["tasks"]),
                               "task_index": str(details["task_index"])})
        (folder / "README.md").write_text(details["card"], encoding="utf-8")
