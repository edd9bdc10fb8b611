"""Loads a checkpoint's tokenizer and image processor, which are objects of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pilot_jax.errors import InputError
from pilot_jax.files import read_json
from pilot_jax.models.checkpoints.gguf import is_gguf, open_gguf
from pilot_jax.models.checkpoints.library import transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # files of an image processor's settings
MAX_PIXELS = 8192  # largest side of an image for the vision tower


def has_tokenizer(directory: Path) -> bool:
    """Returns whether a tokenizer's files are in the directory, or whether it is a GGUF file, which holds one."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    return (is_gguf(directory) and directory.is_file()) or any((directory / name).is_file() for name in names)


def _from_directory(directory: Path) -> Any:
    if not has_tokenizer(directory):
        raise InputError(f"{directory}: no tokenizer.json. Save the checkpoint's tokenizer beside its weights.")
    try:
        return transformers().AutoTokenizer.from_pretrained(directory, use_fast=True, local_files_only=True,
                                                            trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise InputError(f"{directory}: the tokenizer cannot be loaded ({error}). Fetch it again.") from None


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Returns the fast tokenizer of a directory or a GGUF file. A missing token `<image>` is added as the last one.

    Raises:
        InputError: there is no tokenizer, or it gives no character offsets, or it has no end-of-sequence token.
    """
    tokenizer = open_gguf(directory).tokenizer() if is_gguf(directory) else _from_directory(directory)
    if not tokenizer.is_fast:
        raise InputError(f"{directory}: the tokenizer has no fast (tokenizer.json) form, whose character offsets are "
                         "needed to find the answers. Convert it with transformers.")
    if tokenizer.eos_token is None:
        raise InputError(f"{directory}: the tokenizer has no end-of-sequence token. Set its eos_token.")
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return cast("PreTrainedTokenizerFast", tokenizer)


def _check_sizes(raw: dict[str, Any], file: Path) -> None:
    """Raises an InputError for sizes so large that resizing an image to them would fill the memory."""
    for key in ("size", "crop_size"):
        sizes = raw.get(key, {})
        for value in sizes.values() if isinstance(sizes, dict) else [sizes]:
            if not isinstance(value, int) or not 0 < value <= MAX_PIXELS:
                raise InputError(f"{file}: {key}: {value!r}, expected pixels, at most {MAX_PIXELS}. Correct it.")


def processor_files(directory: Path) -> list[Path]:
    """Returns the files of a directory that hold an image processor's settings."""
    return [directory / name for name in PROCESSORS if (directory / name).is_file()]


def load_image_processor(directory: Path, family: str) -> Any:
    """Returns the image processor, which resizes with Pillow.

    Args:
        family: the tower's family, which determines the processor's class if its file names none.

    Raises:
        InputError: there is no image processor, or one of an unsupported class.
    """
    kinds = {name: getattr(transformers(), f"{name}ImageProcessorPil") for name in ("CLIP", "Siglip", "Llava", "Bit")}
    for name in PROCESSORS:
        file = directory / name
        if not file.is_file():
            continue
        raw = read_json(file, "")
        raw = raw.get("image_processor", raw)
        if not isinstance(raw, dict):
            raise InputError(f"{file}: image_processor: expected an object. Fetch the checkpoint again.")
        kind = raw.get("image_processor_type") or raw.get("feature_extractor_type")
        kind = str(kind or {"clip": "CLIP", "siglip": "Siglip", "dinov2": "Bit"}[family])
        _check_sizes(raw, file)
        for prefix, cls in kinds.items():
            if kind.startswith((f"{prefix}ImageProcessor", f"{prefix}FeatureExtractor")) or kind == prefix:
                try:
                    return cls.from_dict(raw)
                except Exception as error:  # its validators raise many kinds
                    raise InputError(f"{file}: not an image processor's settings ({error}). Fetch the checkpoint "
                                     "again.") from None
        raise InputError(f"{file}: image_processor_type: {kind!r} is not supported. Supported: the image processors of "
                         "CLIP, SigLIP, DINOv2 and LLaVA.")
    raise InputError(f"{directory}: no {PROCESSORS[0]}. Save the checkpoint's processor beside its weights.")


def image_side(directory: Path, family: str) -> int | None:
    """Returns the side in pixels of the square images that the directory's image processor makes; None without one.

    Raises:
        InputError: the processor makes images of another shape, or cannot be read; see `load_image_processor`.
    """
    if not any((directory / name).is_file() for name in PROCESSORS):
        return None
    processor = load_image_processor(directory, family)
    cropped = getattr(processor, "do_center_crop", False)
    size = processor.crop_size if cropped else processor.size
    height, width = (getattr(size, key, None) for key in ("height", "width"))
    if not height or height != width:
        raise InputError(f"{directory}: the image processor makes no square images ("
                         f"{'crop_size' if cropped else 'size'}: {size}). Give height and width alike.")
    return int(height)
