"""The shapes and other settings of a vision–language model, from which its modules are built."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from pilot_jax.errors import InputError

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")  # the linear layers of a decoder layer, all of which can have LoRA


@dataclasses.dataclass(frozen=True)
class VisionSpec:
    """The shapes of a CLIP, SigLIP or DINOv2 vision tower."""

    family: Literal["clip", "siglip", "dinov2"]
    image_size: int  # side of the square image in pixels
    patch_size: int  # side of a square patch in pixels
    hidden_size: int
    intermediate_size: int
    feature_layers: tuple[int, ...]  # layers whose concatenated outputs are H_v; 0: the embeddings
    num_heads: int
    hidden_act: str  # quick_gelu | gelu | gelu_pytorch_tanh
    layer_norm_eps: float
    trained_side: int | None = None  # patches along a side, for which positions were learnt; None: those of image_size

    @property
    def num_layers(self) -> int:
        """The number of encoder layers that run; layers above the last one in `feature_layers` are never loaded."""
        return max(self.feature_layers)

    @property
    def side(self) -> int:
        """The number of whole patches along a side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """The number of whole patches in an image."""
        return self.side**2

    @property
    def num_positions(self) -> int:
        """The number of learnt positions, that of the CLS token included."""
        return (self.trained_side or self.side) ** 2 + int(self.has_cls)

    @property
    def has_cls(self) -> bool:
        """Whether a CLS token precedes the patches."""
        return self.family in ("clip", "dinov2")

    @property
    def feature_size(self) -> int:
        """D, the width of the features."""
        return self.hidden_size * len(self.feature_layers)


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """The rotary embedding: default, linear (positions divided by `factor`) or llama3 (scaled by wavelength)."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class TextSpec:
    """The shapes of a decoder with Llama's architecture: Llama, Vicuna, Mistral or Qwen2."""

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
    biases: tuple[str, ...] = ()  # names of the linear layers that have a bias
    sliding_window: int | None = None  # width in tokens, the query's own included; None: no layer has a window
    sliding_layers: tuple[bool, ...] = ()  # whether each layer has the window
    lora_targets: tuple[str, ...] = TARGETS  # linear layers that get LoRA

    @property
    def layers_see_alike(self) -> bool:
        """Whether all layers have the sliding window, or none has it, so that one mask serves all layers."""
        return self.sliding_window is None or all(self.sliding_layers)

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """The sizes (d_in, d_out) of each linear layer that can have LoRA: all but `lm_head`."""
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
    """The shapes of a vision–language model: a vision tower, a decoder, and the projector between them.

    A language model alone has the decoder only.
    """

    vision: VisionSpec | None  # None: a language model alone
    text: TextSpec
    image_token_id: int  # -1, which is no token, for a language model alone
    drop_first: bool  # whether H_v lacks the tower's first token (LLaVA's vision_feature_select_strategy: default)
    projector_bias: bool
    projector: Any = None  # an object of `models.projectors.Projector`; None: LLaVA's MLP

    def with_projector(self, projector: Any) -> VlmSpec:
        """Returns the same model with a projector of the user's own."""
        return dataclasses.replace(self, projector=projector)

    def with_lora_on(self, targets: Sequence[str]) -> VlmSpec:
        """Returns the same model with LoRA on the named linear layers of the decoder, in the usual order."""
        named = tuple(name for name in self.text.linear_shapes if name in targets)
        return dataclasses.replace(self, text=dataclasses.replace(self.text, lora_targets=named))

    @property
    def num_image_tokens(self) -> int:
        """N, the number of tokens that an image takes; 0 for a language model alone."""
        return 0 if self.vision is None else (
            self.vision.num_patches + int(self.vision.has_cls) - int(self.drop_first))

    @property
    def feature_size(self) -> int:
        """D, the width of the features; 0 for a language model alone."""
        return 0 if self.vision is None else self.vision.feature_size

    @property
    def tower(self) -> VisionSpec:
        """The shapes of the vision tower.

        Raises:
            InputError: the model is a language model alone.
        """
        if self.vision is None:
            raise InputError("The model is a language model alone, which takes no images. Leave the image out, or give "
                             "model.parts.vision and model.parts.projector.")
        return self.vision
