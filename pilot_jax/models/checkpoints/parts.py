"""Reads a VLM from separate parts: a vision tower, a language model, and LLaVA's `mm_projector` between them.

Without tower and projector, the model is the language model alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from pilot_jax.errors import InputError
from pilot_jax.files import read_json
from pilot_jax.models.checkpoints.gguf import is_gguf, open_gguf
from pilot_jax.models.checkpoints.hf_config import join, remembered_shapes, text_config, vision_config
from pilot_jax.models.checkpoints.library import transformers
from pilot_jax.models.checkpoints.reading import Place, Source, load_tensors, open_tensors, safetensors_files
from pilot_jax.models.checkpoints.tensor_names import Storage
from pilot_jax.models.spec import TextSpec, VisionSpec, VlmSpec

# Tensors of a contrastive model that a VLM does not use.
_UNUSED = ("text_model.", "visual_projection.", "text_projection.", "logit_scale", "logit_bias")
_PROJECTOR = {"0": "linear_1", "2": "linear_2", "linear_1": "linear_1", "linear_2": "linear_2"}


def _tower_name(key: str) -> str | None:
    if key.startswith(_UNUSED):
        return None
    return "vision_tower." + key.removeprefix("vision_model.")


def _language_name(key: str) -> str | None:
    return key if key.startswith("lm_head.") else "language_model." + key.removeprefix("model.")


def _projector_name(key: str) -> str | None:
    """Returns the canonical name of a projector's tensor, such as `model.mm_projector.0.weight`; None for others."""
    match = re.fullmatch(r"(?:.*\.)?(?:mm_projector|multi_modal_projector)\.(\w+)\.(weight|bias)", key)
    match = match or re.fullmatch(r"(\w+)\.(weight|bias)", key)
    if match is None:
        return None
    return f"multi_modal_projector.{_PROJECTOR.get(match[1], match[1])}.{match[2]}"


def config_of(directory: Path, key: str) -> tuple[dict[str, Any], Path]:
    """Returns the content of a part's `config.json`, and the file.

    Args:
        key: "vision" or "language". Of a contrastive model, the content is that of its vision tower.

    Raises:
        InputError: the file does not exist, or is not a JSON object.
    """
    if key == "language" and is_gguf(directory):
        return open_gguf(directory).config, directory
    file = directory / "config.json"
    raw = read_json(file, f"model.parts.{key} must be a Hugging Face model directory.")
    if key == "vision" and raw.get("model_type") in ("clip", "siglip"):  # the whole model, with a tower of texts
        raw = {"model_type": raw["model_type"] + "_vision_model"} | raw.get("vision_config", {})
    return raw, file


def read_language_config(language: Path) -> VlmSpec:
    """Returns the shapes of a language model alone.

    Raises:
        InputError: the directory has no config.json, or its model is one that this package does not implement.
    """
    raw, file = config_of(language, "language")
    if raw.get("model_type") not in ("llama", "mistral", "qwen2"):
        raise InputError(f"{file}: model_type is {raw.get('model_type')!r}, expected llama, mistral or qwen2. "
                         "Correct model.parts.language.")
    text = remembered_shapes(language, "text", TextSpec,
                             lambda: text_config(transformers().AutoConfig.for_model(**raw), file))
    return VlmSpec(None, text, image_token_id=-1, drop_first=False, projector_bias=False)


def read_parts_config(vision: Path, language: Path, projector: Path | None, feature_layer: int | list[int],
                      feature_select: str, image_token_id: int) -> VlmSpec:
    """Returns the shapes of the VLM that these parts make; without a projector, as if it had LLaVA's two layers.

    Raises:
        InputError: a directory has no config.json, or its model is one that this package does not implement.
    """
    raw, file = config_of(vision, "vision")
    if raw.get("model_type") not in ("clip_vision_model", "siglip_vision_model", "dinov2"):
        raise InputError(f"{file}: model_type is {raw.get('model_type')!r}, expected a CLIP, SigLIP or DINOv2 model. "
                         "Correct model.parts.vision.")
    tower = remembered_shapes(vision, f"vision {feature_layer}", VisionSpec, lambda: vision_config(
        transformers().AutoConfig.for_model(**raw), feature_layer, file))
    text = read_language_config(language).text
    has_bias = projector is None or _has_bias(projector)
    if feature_select == "auto":
        feature_select = "default" if tower.has_cls else "full"
    return join(tower, text, image_token_id, feature_select, has_bias, file)


def _has_bias(projector: Path) -> bool:
    """Returns whether a projector has biases.

    Raises:
        InputError: there is no such file, or it holds no projector of two layers.
    """
    if not projector.is_file():
        raise InputError(f"model.parts.projector: {projector} does not exist. Give mm_projector.safetensors or .bin.")
    names = {_projector_name(key) for key in open_tensors(projector).shapes()}
    if "multi_modal_projector.linear_2.weight" not in names:
        raise InputError(f"{projector}: holds no two-layer mm_projector (…mm_projector.0.weight, …2.weight). Correct "
                         "model.parts.projector.")
    return "multi_modal_projector.linear_1.bias" in names


def part_sources(vision: Path | None, language: Path, projector: Path | None) -> list[Source]:
    """Returns the files of these parts, the language model's first."""
    sources = [Source(f, _language_name) for f in ([language] if is_gguf(language) else safetensors_files(language))]
    sources += [] if vision is None else [Source(f, _tower_name) for f in safetensors_files(vision)]
    return sources + ([] if projector is None else [Source(projector, _projector_name)])


def load_parts(config: VlmSpec, vision: Path | None, language: Path, projector: Path | None, dtype: str,
               place: Place | None = None, storage: Storage | None = None) -> dict[str, PyTree]:
    """Returns the frozen base that these parts make; see `reading.load_tensors`."""
    return load_tensors(part_sources(vision, language, projector), config, dtype, place, storage)
