"""Shapes of a LLaVA model, read from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from pilot_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    image_size: int  # pixels, square
    patch_size: int  # pixels, square
    hidden_size: int  # D
    intermediate_size: int
    num_layers: int  # encoder layers that are run: those above the selected feature layer are never loaded
    num_heads: int
    hidden_act: str  # quick_gelu | gelu
    layer_norm_eps: float

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    vocab_size: int  # V
    hidden_size: int  # C
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_positions: int

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of each linear that carries LoRA: every one but `lm_head`."""
        c, f, hd = self.hidden_size, self.intermediate_size, self.head_dim
        return {
            "q": (c, self.num_heads * hd),
            "k": (c, self.num_kv_heads * hd),
            "v": (c, self.num_kv_heads * hd),
            "o": (self.num_heads * hd, c),
            "gate": (c, f),
            "up": (c, f),
            "down": (f, c),
        }


@dataclasses.dataclass(frozen=True)
class VlmConfig:
    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    drop_cls: bool  # vision_feature_select_strategy: default drops CLS, full keeps it
    projector_bias: bool

    @property
    def num_image_tokens(self) -> int:
        """N."""
        return self.vision.num_patches + (0 if self.drop_cls else 1)


def _require(value: bool, file: Path, key: str, problem: str, remedy: str) -> None:
    if not value:
        raise InputError(f"{file}: {key}: {problem}. {remedy}")


def read_vlm_config(directory: str | Path) -> VlmConfig:
    """The shapes of the LLaVA checkpoint in `directory`.

    Raises:
        InputError: no readable `config.json`, not a LLaVA model, or a feature this package does not implement.
    """
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise InputError(f"model.path: {file} does not exist. Give a Hugging Face LLaVA directory (or 'embedded').")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON ({error}). Fetch the checkpoint again.") from None
    if not isinstance(raw, dict) or raw.get("model_type") != "llava":
        found = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
        raise InputError(
            f"{file}: model_type is {found!r}, expected 'llava'. "
            "model.path must be a LlavaForConditionalGeneration checkpoint."
        )
    return _vlm_config(raw, file)


def _vlm_config(raw: dict, file: Path) -> VlmConfig:
    # transformers omits whatever equals its own default, so its config class fills the gaps.
    from transformers import LlavaConfig

    config = LlavaConfig(**{k: v for k, v in raw.items() if k != "model_type"})
    vision, text = config.vision_config, config.text_config
    _require(vision.model_type == "clip_vision_model", file, "vision_config.model_type",
             f"{vision.model_type!r} is not supported", "Use a CLIP vision tower.")
    _require(text.model_type == "llama", file, "text_config.model_type",
             f"{text.model_type!r} is not supported", "Use a Llama or Vicuna language model.")
    _require(vision.hidden_act in ("quick_gelu", "gelu"), file, "vision_config.hidden_act",
             f"{vision.hidden_act!r} is not supported", "quick_gelu and gelu are.")
    _require(text.hidden_act == "silu", file, "text_config.hidden_act", f"{text.hidden_act!r} is not supported",
             "silu is.")
    _require(not text.attention_bias and not text.mlp_bias, file, "text_config.attention_bias / mlp_bias",
             "biases in the language model are not supported", "Use a Llama without biases.")
    _require(config.projector_hidden_act == "gelu", file, "projector_hidden_act",
             f"{config.projector_hidden_act!r} is not supported", "gelu is.")
    rope = getattr(text, "rope_parameters", None) or {}
    _require(rope.get("rope_type", "default") == "default", file, "text_config.rope_parameters.rope_type",
             f"{rope.get('rope_type')!r} is not supported", "Use a checkpoint with default RoPE.")
    layer = config.vision_feature_layer
    _require(isinstance(layer, int), file, "vision_feature_layer", "a list of layers is not supported", "Give one.")
    run_layers = layer if layer >= 0 else vision.num_hidden_layers + 1 + layer
    _require(0 < run_layers <= vision.num_hidden_layers, file, "vision_feature_layer",
             f"{layer} is outside the tower's {vision.num_hidden_layers} layers", "Mend the config.")
    strategy = config.vision_feature_select_strategy
    _require(strategy in ("default", "full"), file, "vision_feature_select_strategy", f"{strategy!r} is unknown",
             "default and full are known.")
    image_token = getattr(config, "image_token_id", None)
    return VlmConfig(
        vision=VisionConfig(
            image_size=vision.image_size, patch_size=vision.patch_size, hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size, num_layers=run_layers, num_heads=vision.num_attention_heads,
            hidden_act=vision.hidden_act, layer_norm_eps=vision.layer_norm_eps),
        text=TextConfig(
            vocab_size=text.vocab_size, hidden_size=text.hidden_size, intermediate_size=text.intermediate_size,
            num_layers=text.num_hidden_layers, num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads or text.num_attention_heads,
            head_dim=text.head_dim or text.hidden_size // text.num_attention_heads, rms_norm_eps=text.rms_norm_eps,
            rope_theta=float(rope.get("rope_theta", 10000.0)),
            tie_word_embeddings=bool(text.tie_word_embeddings or raw.get("tie_word_embeddings", False)),
            max_positions=text.max_position_embeddings),
        image_token_id=image_token if image_token is not None else config.image_token_index,
        drop_cls=strategy == "default",
        projector_bias=bool(config.multimodal_projector_bias),
    )
