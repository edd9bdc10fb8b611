"""Loads the frozen base model of a run onto the devices that train."""

from __future__ import annotations

import dataclasses
from typing import Any

from pilot_jax.config import ModelConfig, SystemConfig
from pilot_jax.kernels.attention import check_cudnn
from pilot_jax.models.pretrained import PretrainedModel, load, load_from_parts, read_shapes
from pilot_jax.models.projectors import with_initial_projector, with_projector
from pilot_jax.parallel.mesh import base_placement, make_mesh, on_training_devices


def base_model(model: ModelConfig, system: SystemConfig) -> PretrainedModel:
    """Returns the base model, on the devices that train.

    Raises:
        InputError: the checkpoint is wrong, or this machine cannot train it as configured.
    """
    if system.attention == "cudnn":  # checked before gigabytes of weights are loaded
        text = read_shapes(model)[0].text
        check_cudnn(text.head_dim, text.layers_see_alike, model.dtype)
    options: dict[str, Any] = {
        "dtype": None if model.dtype == "auto" else model.dtype, "lora_scale": model.lora.alpha / model.lora.largest,
        "remat": model.recomputes, "unroll": system.unroll, "place": base_placement(system.mesh), "base": model.base}
    parts = model.parts
    loaded = load(model.path, **options) if parts is None else load_from_parts(**parts.model_dump(), **options)
    spec = with_projector(loaded.config.with_lora_on(model.lora.targets), model.projector)
    base = with_initial_projector(loaded.base, spec, system.seed)
    module = loaded.module.clone(config=spec, kernel=system.kernel, operands=model.operands,
                                 mesh=make_mesh(system.mesh) if system.mesh.fsdp > 1 else None)
    return dataclasses.replace(loaded, config=spec, module=module, base=on_training_devices(base, system))
