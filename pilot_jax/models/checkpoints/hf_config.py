"""The shapes of a model, read from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pilot_jax.cache import as_json, digest_of_files, remembered
from pilot_jax.errors import InputError
from pilot_jax.files import read_json
from pilot_jax.models.checkpoints.library import transformers
from pilot_jax.models.checkpoints.processors import image_side, processor_files
from pilot_jax.models.spec import RopeSpec, TextSpec, VisionSpec, VlmSpec

Shapes = TypeVar("Shapes", TextSpec, VisionSpec, VlmSpec)
MAX_SIZE, MAX_LAYERS = 10_000_000, 1_000  # largest width or count that is accepted, and largest number of layers


def _require(value: bool, file: Path, key: str, problem: str, remedy: str) -> None:
    """Raises an InputError that names file, key, problem and remedy, unless `value` is true."""
    if not value:
        raise InputError(f"{file}: {key}: {problem}. {remedy}")


def read_vlm_config(directory: str | Path) -> VlmSpec:
    """Returns the shapes of the LLaVA checkpoint in `directory`.

    Raises:
        InputError: `config.json` cannot be read, is not a LLaVA model's, or asks for something that this package does
            not implement.
    """
    return remembered_shapes(Path(directory), "llava", VlmSpec, lambda: _read_vlm_config(Path(directory)))


def remembered_shapes(directory: Path, what: str, kind: type[Shapes], read: Callable[[], Shapes]) -> Shapes:
    """Returns what `read` returns, or has returned for files of the same content; transformers takes long to import.

    Args:
        directory: that of the files which `read` reads: the config and the image processor's settings.
        what: tells apart what is read.
        kind: the type of what is read.
    """
    config = directory / "config.json"
    content = digest_of_files([config, *processor_files(directory)]) if config.is_file() else None  # None: a GGUF file
    return remembered(content and f"shapes {what} {content}", as_json(kind), read)


def _read_vlm_config(directory: Path) -> VlmSpec:
    file = directory / "config.json"
    raw = read_json(file, "model.path must be a Hugging Face LLaVA directory (or 'embedded').")
    if raw.get("model_type") != "llava":
        raise InputError(f"{file}: model_type is {raw.get('model_type')!r}, expected 'llava'. "
                         "model.path must be a LlavaForConditionalGeneration checkpoint.")
    # transformers leaves out values that equal its defaults, so its config class fills them in.
    config = _hf_config(transformers().LlavaConfig, raw, file)
    _require(config.projector_hidden_act == "gelu", file, "projector_hidden_act",
             f"{config.projector_hidden_act!r} is not supported", "Supported: gelu.")
    image_token = getattr(config, "image_token_id", None)
    image_token = image_token if image_token is not None else config.image_token_index
    _require(isinstance(image_token, int) and image_token >= 0, file, "image_token_index",
             f"{image_token!r} is not a token id", "Correct the config.")
    text = text_config(config.text_config, file, "text_config.")
    if raw.get("tie_word_embeddings"):
        text = dataclasses.replace(text, tie_word_embeddings=True)
    return join(vision_config(config.vision_config, config.vision_feature_layer, file, "vision_config."), text,
                image_token, config.vision_feature_select_strategy, bool(config.multimodal_projector_bias), file)


def join(vision: VisionSpec, text: TextSpec, image_token_id: int, select: str, projector_bias: bool,
         file: Path) -> VlmSpec:
    """Returns the shapes of a VLM made of a tower and a language model.

    Args:
        select: LLaVA's vision_feature_select_strategy.
    """
    _require(select in ("default", "full"), file, "vision_feature_select_strategy",
             f"{select!r} is not supported", "Supported: default, full.")
    return VlmSpec(vision, text, image_token_id, select == "default", projector_bias)


def _hf_config(cls: type, raw: dict[str, Any], file: Path) -> Any:
    """Returns an object of transformers' config class `cls` with the content `raw` of a file."""
    try:
        return cls(**{k: v for k, v in raw.items() if k != "model_type"})
    except Exception as error:  # its validators raise many kinds
        why = " ".join(str(error).split())
        raise InputError(f"{file}: not a valid {cls.__name__} ({why}). Fetch the checkpoint again.") from None


def _sizes(hf: Any, file: Path, at: str, *names: str) -> None:
    """Checks that the named values are whole numbers from 1 to the largest accepted value."""
    for name in names:
        value, most = getattr(hf, name, None), MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
        _require(isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most, file, f"{at}{name}",
                 f"{reprlib.repr(value)}, expected a whole number from 1 to {most}", "Correct the config.")


def _epsilon(value: Any, file: Path, key: str) -> None:
    _require(isinstance(value, int | float) and 0 <= value < 1, file, key, f"{reprlib.repr(value)}, expected 0 to 1",
             "Correct the config.")


def vision_config(hf: Any, feature_layer: int | list[int], file: Path, at: str = "") -> VisionSpec:
    """Returns the shapes of a vision tower from transformers' config of it.

    Args:
        feature_layer: LLaVA's vision_feature_layer.
        at: the path of the config inside `file`, for messages.
    """
    families: dict[str, Any] = {"clip_vision_model": "clip", "siglip_vision_model": "siglip", "dinov2": "dinov2"}
    _require(hf.model_type in families, file, f"{at}model_type", f"{hf.model_type!r} is not supported",
             "Use a CLIP, SigLIP or DINOv2 vision tower.")
    _require(hf.hidden_act in ("quick_gelu", "gelu", "gelu_pytorch_tanh"), file, f"{at}hidden_act",
             f"{hf.hidden_act!r} is not supported", "Supported: quick_gelu, gelu, gelu_pytorch_tanh.")
    _sizes(hf, file, at, "num_hidden_layers", "hidden_size", "image_size", "patch_size", "num_attention_heads")
    width = _intermediate_size(hf, file, at)
    _epsilon(hf.layer_norm_eps, file, f"{at}layer_norm_eps")
    _require(hf.patch_size <= hf.image_size and hf.hidden_size % hf.num_attention_heads == 0, file,
             f"{at}patch_size, num_attention_heads", "the patch is larger than the image, or the heads do not divide "
             "the width", "Correct the config.")
    requested = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    _require(isinstance(requested, list | tuple) and all(isinstance(x, int) for x in requested)
             and len(requested) <= MAX_LAYERS,
             file, "vision_feature_layer", f"{reprlib.repr(feature_layer)} is neither a layer nor a list of layers",
             "Correct the config.")
    layers, total = [], hf.num_hidden_layers
    for layer in requested:
        absolute = layer if layer >= 0 else total + 1 + layer
        _require(0 <= absolute <= total, file, "vision_feature_layer",
                 f"{layer} is outside the tower's {total} layers", "Correct the config.")
        layers.append(absolute)
    _require(bool(layers), file, "vision_feature_layer", "the list is empty", "Name at least one layer.")
    family, side = families[hf.model_type], hf.image_size
    if family == "dinov2":  # its positions are resized to whatever size of image its processor gives
        side = image_side(file.parent, family) or side
        _require(hf.patch_size <= side, file, f"{at}patch_size", f"{hf.patch_size} pixels, larger than the {side} "
                 "pixels of an image in preprocessor_config.json", "Correct one of them.")
    return VisionSpec(
        family=family, image_size=side, patch_size=hf.patch_size, hidden_size=hf.hidden_size, intermediate_size=width,
        feature_layers=tuple(layers), num_heads=hf.num_attention_heads, hidden_act=hf.hidden_act,
        layer_norm_eps=hf.layer_norm_eps, trained_side=hf.image_size // hf.patch_size)


def _intermediate_size(hf: Any, file: Path, at: str) -> int:
    """Returns the width of the tower's MLP, which DINOv2's config gives as a multiple of `hidden_size`."""
    if hf.model_type != "dinov2":
        _sizes(hf, file, at, "intermediate_size")
        return int(hf.intermediate_size)
    _require(not hf.use_swiglu_ffn, file, f"{at}use_swiglu_ffn", "true is not supported",
             "Use DINOv2 small, base or large.")
    _require(bool(hf.qkv_bias), file, f"{at}qkv_bias", "false is not supported", "Use DINOv2 small, base or large.")
    _require(isinstance(hf.mlp_ratio, int | float) and 0 < hf.mlp_ratio <= 64, file, f"{at}mlp_ratio",
             f"{reprlib.repr(hf.mlp_ratio)}, expected a number from 0 to 64", "Correct the config.")
    return int(hf.hidden_size * hf.mlp_ratio)


def _rope(hf: Any, file: Path, at: str) -> RopeSpec:
    rope = dict(getattr(hf, "rope_parameters", None) or {})
    kind = rope.get("rope_type", "default")
    key = f"{at}rope_parameters"
    _require(kind in ("default", "linear", "llama3"), file, f"{key}.rope_type", f"{kind!r} is not supported",
             "Supported: default, linear, llama3.")
    _require(rope.get("partial_rotary_factor", 1.0) == 1.0, file, f"{key}.partial_rotary_factor",
             "partial rotation is not supported", "Use a checkpoint that rotates whole heads.")
    try:
        out = RopeSpec(float(rope.get("rope_theta", 10000.0)), kind)
        if kind != "default":
            out = dataclasses.replace(out, factor=float(rope["factor"]))
        if kind == "llama3":
            out = dataclasses.replace(
                out, low_freq_factor=float(rope["low_freq_factor"]), high_freq_factor=float(rope["high_freq_factor"]),
                original_max_positions=int(rope["original_max_position_embeddings"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{file}: {key}: {type(error).__name__} {error}. Correct the config.") from None
    _require(all(0 < x < float("inf") for x in (out.theta, out.factor, out.low_freq_factor, out.high_freq_factor)),
             file, key, "a value is not positive and finite", "Correct the config.")
    return out


def text_config(hf: Any, file: Path, at: str = "") -> TextSpec:
    """Returns the shapes of a Llama, Mistral or Qwen2 language model from transformers' config; see `vision_config`."""
    family = hf.model_type
    _require(family in ("llama", "mistral", "qwen2"), file, f"{at}model_type", f"{family!r} is not supported",
             "Use a Llama, Vicuna, Mistral or Qwen2 language model.")
    _require(hf.hidden_act == "silu", file, f"{at}hidden_act", f"{hf.hidden_act!r} is not supported", "Use silu.")
    _sizes(hf, file, at, "num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
           "max_position_embeddings")
    heads, groups = hf.num_attention_heads, hf.num_key_value_heads or hf.num_attention_heads
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // heads
    _require(isinstance(groups, int) and groups > 0 and heads % groups == 0, file, f"{at}num_key_value_heads",
             f"{reprlib.repr(groups)} does not divide {heads} heads", "Correct the config.")
    _require(isinstance(head_dim, int) and 0 < head_dim <= MAX_SIZE and head_dim % 2 == 0, file, f"{at}head_dim",
             f"{reprlib.repr(head_dim)}, expected an even number", "Correct the config.")
    _epsilon(hf.rms_norm_eps, file, f"{at}rms_norm_eps")
    biases: tuple[str, ...] = ("q", "k", "v") if family == "qwen2" else ()
    if family == "llama":
        biases = (("q", "k", "v", "o") if hf.attention_bias else ()) + (
            ("gate", "up", "down") if hf.mlp_bias else ())
    window = None if family == "llama" else hf.sliding_window
    _require(window is None or (isinstance(window, int) and window > 0), file, f"{at}sliding_window",
             f"{reprlib.repr(window)} is not a number of tokens", "Correct the config.")
    if window is None:
        sliding = (False,) * hf.num_hidden_layers
    elif family == "mistral":
        sliding = (True,) * hf.num_hidden_layers
    else:
        sliding = tuple(kind == "sliding_attention" for kind in hf.layer_types)
    if window is not None and window >= hf.max_position_embeddings:
        window, sliding = None, (False,) * hf.num_hidden_layers  # a window as wide as the longest text hides nothing
    return TextSpec(
        family=family, vocab_size=hf.vocab_size, hidden_size=hf.hidden_size, intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers, num_heads=heads, num_kv_heads=groups, head_dim=head_dim,
        rms_norm_eps=hf.rms_norm_eps, rope=_rope(hf, file, at), tie_word_embeddings=bool(hf.tie_word_embeddings),
        max_positions=hf.max_position_embeddings, biases=biases,
        sliding_window=window if any(sliding) else None, sliding_layers=sliding)
