"""Images to cached tower features: the tower is frozen, so each image passes through it once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from PIL import Image, UnidentifiedImageError

from pilot_jax.data.llava import Sample
from pilot_jax.errors import InputError

if TYPE_CHECKING:
    from pilot_jax.models.pretrained import PretrainedModel


def load_image_processor(directory: Path):
    """The checkpoint's CLIP image processor (Pillow backend)."""
    from transformers import CLIPImageProcessorPil

    for name in ("preprocessor_config.json", "processor_config.json"):
        file = directory / name
        if file.is_file():
            try:
                raw = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{file}: not valid JSON ({error}).") from None
            return CLIPImageProcessorPil.from_dict(raw.get("image_processor", raw))
    raise InputError(f"{directory}: no preprocessor_config.json. Save the checkpoint's processor beside its weights.")


def load_tokenizer(directory: Path):
    """The checkpoint's fast tokenizer."""
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise InputError(f"{directory}: no tokenizer.json. Save the checkpoint's tokenizer beside its weights.")
    tokenizer = AutoTokenizer.from_pretrained(directory, use_fast=True, local_files_only=True)
    if not tokenizer.is_fast:
        raise InputError(f"{directory}: the tokenizer has no fast (tokenizer.json) form; supervision needs offsets.")
    return tokenizer


def read_image(sample: Sample) -> Image.Image:
    if isinstance(sample.image, Image.Image):
        return sample.image
    try:
        with Image.open(sample.image) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"{sample.source}: image: {sample.image} cannot be decoded ({error}). "
                         "Replace the file or drop the entry.") from None


def image_features(model: PretrainedModel, samples: list[Sample], batch: int = 64) -> np.ndarray:
    """H_v of each sample's image, [len(samples), N, D] in the model's dtype; zeros where a sample has none."""
    c = model.config
    out = np.zeros((len(samples), c.num_image_tokens, c.vision.feature_size), jnp.dtype(model.module.dtype))
    shown = [i for i, sample in enumerate(samples) if sample.image is not None]
    processor = load_image_processor(model.directory) if shown else None
    for start in range(0, len(shown), batch):
        rows = shown[start:start + batch]
        pixels = processor(images=[read_image(samples[i]) for i in rows], return_tensors="np")["pixel_values"]
        if pixels.shape[1:] != (3, c.vision.image_size, c.vision.image_size):
            raise InputError(f"{model.directory}: the image processor gives {pixels.shape[1:]}, the tower takes "
                             f"(3, {c.vision.image_size}, {c.vision.image_size}).")
        padded = np.zeros((batch, *pixels.shape[1:]), np.float32)  # one shape: one compilation
        padded[:len(rows)] = pixels
        out[rows] = np.asarray(model.features(padded))[:len(rows)]
    return out
