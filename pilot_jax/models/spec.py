"""Shapes of a vision–language model: what its modules are built from."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class VisionSpec:
    """A CLIP or SigLIP tower. `feature_layers` index hidden states: 0 the embeddings, i the output of layer i."""

    family: Literal["clip", "siglip"]
    image_size: int  # pixels, square
    patch_size: int  # pixels, square
    hidden_size: int
    intermediate_size: int
    feature_layers: tuple[int, ...]  # their outputs, side by side, are H_v
    num_heads: int
    hidden_act: str  # quick_gelu | gelu | gelu_pytorch_tanh
    layer_norm_eps: float

    @property
    def num_layers(self) -> int:
        """Encoder layers that are run: those above the last selected one are never loaded."""
        return max(self.feature_layers)

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def has_cls(self) -> bool:
        return self.family == "clip"

    @property
    def feature_size(self) -> int:
        """D."""
        return self.hidden_size * len(self.feature_layers)


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding: kind default, linear (positions divided by `factor`) or llama3 (by wavelength)."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class TextSpec:
    """A decoder of the Llama kind: Llama, Vicuna, Mistral, Qwen2."""

    family: str  # Hugging Face's model_type
    vocab_size: int  # V
    hidden_size: int  # C
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeSpec
    tie_word_embeddings: bool
    max_positions: int
    biases: tuple[str, ...] = ()  # the linears that have one
    sliding_window: int | None = None  # tokens, the query's own included
    sliding_layers: tuple[bool, ...] = ()  # which layers have the window

    @property
    def layers_see_alike(self) -> bool:
        """Whether all layers have the window, or none has."""
        return self.sliding_window is None or all(self.sliding_layers)

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
class VlmSpec:
    vision: VisionSpec
    text: TextSpec
    image_token_id: int
    drop_first: bool  # vision_feature_select_strategy: default drops the first token (CLIP's CLS), full keeps it
    projector_bias: bool

    @property
    def num_image_tokens(self) -> int:
        """N."""
        return self.vision.num_patches + int(self.vision.has_cls) - int(self.drop_first)
