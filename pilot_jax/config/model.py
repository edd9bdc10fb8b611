"""The section `model` of a config: the frozen base model, and the LoRA that clients train on it."""

from __future__ import annotations

from typing import Literal, cast

from pydantic import Field, model_validator

from pilot_jax.config.lora import LoraConfig
from pilot_jax.config.sections import Section, made

Remat = bool | Literal["selective"]  # which activations of the decoder layers the backward pass computes again

BOTH_OR_NEITHER = "Give vision and projector both, or neither of them for a language model alone."


class PartsConfig(Section):
    """Vision tower, language model and projector as separate checkpoints, as those that the paper starts from.

    Without tower and projector, the base is a language model alone, which takes no images.
    """

    vision: str | None = Field(None, description="Folder of a CLIP, SigLIP or DINOv2 model in Hugging Face's format. "
                               "null, and `projector` null: a language model alone.")
    language: str = Field(description="Folder of a Llama, Vicuna, Mistral or Qwen2 model in Hugging Face's format, "
                          "with its tokenizer; or a .gguf file of a Llama or Qwen2 model, if gguf is installed.")
    projector: str | None = Field(None, description="File of LLaVA's mm_projector weights: .safetensors, or .bin if "
                                  "torch is installed. null, and `vision` null: a language model alone.")
    feature_layer: int | list[int] = Field(
        -2, description="Layer of the vision tower whose output is H_v, or list of layers whose outputs are "
        "concatenated. Negative numbers count from the last layer, -1. LLaVA uses -2.")
    feature_select: Literal["auto", "default", "full"] = Field(
        "auto", description="Choice of the tokens of H_v. default: all but the first, which is the CLS token of CLIP "
        "and DINOv2. full: all. auto: default for these two, and full for SigLIP, which has no CLS token.")

    @model_validator(mode="after")
    def _tower_with_projector(self) -> PartsConfig:
        if (self.vision is None) != (self.projector is None):
            raise ValueError(f"{'projector' if self.vision is None else 'vision'} is given alone. {BOTH_OR_NEITHER}")
        return self


class ModelConfig(Section):
    """The frozen base model, and the LoRA that clients train on it."""

    path: str = Field("embedded", description="Folder of a Hugging Face LLaVA checkpoint, or a small base that is part "
                      "of the package: `embedded`, which can caption digit scenes, or `instructed`, which also follows "
                      "instructions about them.")
    parts: PartsConfig | None = Field(None, description="Base made of separate checkpoints, instead of `model.path`.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Data type of the frozen weights and of the computation; adapters are always stored in "
        "float32. auto: float32 on CPU, bfloat16 on GPU and TPU.")
    base: Literal["bf16", "int8", "nf4"] | None = Field(
        None, description="Storage of the weights of the language model's linear layers; products with them are "
        "computed in `dtype`. int8: 8 bits and a scale per output. nf4: 4-bit NormalFloat and a scale per 64 inputs, "
        "as in QLoRA. They are quantised tensor by tensor while the checkpoint is loaded, and LoRA beside them stays "
        "in full precision; both need the extra `quant`. bf16: bfloat16. null: `dtype`.")
    operands: Literal["float32", "bfloat16"] = Field(
        "float32", description="Data type to which factors are rounded in products with the language model's weights, "
        "on CPU with dtype float32. bfloat16 is faster on CPUs that multiply it (avx512_bf16), and changes losses in "
        "the third digit: not for results that are compared with others. No effect with `base` int8 and nf4.")
    remat: bool | Literal["selective", "auto"] = Field(
        False, description="Whether the backward pass computes the decoder layers' activations again instead of "
        "storing them, which takes less memory and more time. selective: the outputs of the linear layers are stored "
        "and the rest, which costs little to compute, is computed again. auto: the first of false, selective and true "
        "with which the run fits the device, by `plan`.")
    projector: str | None = Field(None, description="Name of a projector of your own, which `pilot_jax.projector` "
                                  "registers, instead of the checkpoint's. It starts untrained. null: the "
                                  "checkpoint's.")
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if self.parts is not None and self.path != "embedded":
            raise ValueError("give either path or parts, not both")
        return self

    @property
    def recomputes(self) -> Remat:
        """Whether, and which, activations are computed again; no longer "auto"."""
        return cast(Remat, made("model.remat", self.remat))

    @property
    def takes_images(self) -> bool:
        """Whether the base has a vision tower; without one, it is a language model alone."""
        return self.parts is None or self.parts.vision is not None
