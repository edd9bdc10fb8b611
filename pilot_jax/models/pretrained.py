"""Pretrained models ready to use, as `pilot_jax.load(path)` returns them; inputs are as in Hugging Face's models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from pilot_jax.config import BOTH_OR_NEITHER, ModelConfig
from pilot_jax.config.model import Remat
from pilot_jax.errors import InputError
from pilot_jax.kernels.backend import default_dtype
from pilot_jax.models.checkpoints.hf_config import read_vlm_config
from pilot_jax.models.checkpoints.parts import load_parts, read_language_config, read_parts_config
from pilot_jax.models.checkpoints.processors import IMAGE_TOKEN, load_tokenizer
from pilot_jax.models.checkpoints.reading import Place, load_base
from pilot_jax.models.checkpoints.tensor_names import Storage
from pilot_jax.models.generate import Decoding, generate
from pilot_jax.models.packaged import EMBEDDED, model_directory, shapes_directory
from pilot_jax.models.spec import VlmSpec
from pilot_jax.models.vlm import Vlm, variables
from pilot_jax.parallel.mesh import mesh_of
from pilot_jax.parallel.processes import from_host
from pilot_jax.programs import KeptJit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

def read_shapes(config: ModelConfig) -> tuple[VlmSpec, Path]:
    """Returns the shapes of the configured model and the directory of its tokenizer; no weights are read."""
    if config.parts is None:
        directory = shapes_directory(config.path)
        return read_vlm_config(directory), directory
    parts = config.parts
    if not config.takes_images:
        directory = shapes_directory(parts.language)
        return read_language_config(directory), directory
    tower, language, projector = _part_paths(parts.vision, parts.language, parts.projector)
    assert tower is not None and projector is not None
    if not (tower.exists() or language.exists() or projector.exists()):  # planned with the shapes of well-known parts
        vision, text = shapes_directory(tower), shapes_directory(language)
        return read_parts_config(vision, text, None, parts.feature_layer, parts.feature_select, -1), text
    paths = tower, language, projector
    return _parts_spec(*paths, parts.feature_layer, parts.feature_select), paths[1]


def _part_paths(vision: str | Path | None, language: str | Path, projector: str | Path | None
                ) -> tuple[Path | None, Path, Path | None]:
    """Returns the paths of a model's parts.

    Raises:
        InputError: there is a vision tower without a projector, or the reverse.
    """
    if (vision is None) != (projector is None):
        given = "projector" if vision is None else "vision"
        raise InputError(f"model.parts: {given} is given alone. {BOTH_OR_NEITHER}")
    tower, between = (None if path is None else Path(path).expanduser() for path in (vision, projector))
    return tower, Path(language).expanduser(), between


def _parts_spec(vision: Path | None, language: Path, projector: Path | None, feature_layer: int | list[int],
                feature_select: str) -> VlmSpec:
    if vision is None or projector is None:
        return read_language_config(language)
    token = cast(int, load_tokenizer(language).convert_tokens_to_ids(IMAGE_TOKEN))
    return read_parts_config(vision, language, projector, feature_layer, feature_select, token)


def plain_connector(base: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Returns the connector of a base model that has no adapters: its projector, or nothing if it has none."""
    return {name: base[name] for name in ("projector",) if name in base}


class GenerateOptions(TypedDict, total=False):
    """Keywords of `PretrainedModel.generate`."""

    max_new_tokens: int
    eos_id: int | tuple[int, ...]
    temperature: float
    top_p: float
    seed: int


def _decoding(max_new_tokens: int = 32, eos_id: int | tuple[int, ...] = 2, temperature: float = 0.0, top_p: float = 1.0,
              seed: int = 0) -> tuple[Decoding, int]:
    """Returns `GenerateOptions`, filled up with their defaults, as a `Decoding` and a seed."""
    stop = (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
    return Decoding(max_new_tokens, stop, temperature, top_p), seed


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
    """A frozen base model and its directories. Its methods take NumPy or JAX arrays."""

    text_directory: Path  # with the tokenizer
    image_directory: Path | None  # with the image processor; None for a language model alone
    config: VlmSpec
    base: dict[str, PyTree]  # {"vision_tower", "projector", "decoder"}; {"decoder"} for a language model alone
    module: Vlm

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Returns the checkpoint's tokenizer.

        Raises:
            InputError: there is none, or its token `<image>` has another id than in the config.
        """
        tokenizer = load_tokenizer(self.text_directory)
        found = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if self.config.vision is not None and found != self.config.image_token_id:
            raise InputError(f"{self.text_directory}: {IMAGE_TOKEN} is token {found} of the tokenizer, but in "
                             f"config.json image_token_index is {self.config.image_token_id}. Correct one of them.")
        return tokenizer

    def features(self, pixel_values: np.ndarray) -> jax.Array:
        """Returns the image features H_v [B, N, D] of the image processor's pixel_values [B, 3, height, width].

        On a mesh whose size divides B, each device computes its share of the images, and H_v is spread over the mesh's
        axis `clients`.

        Raises:
            InputError: the model is a language model alone.
        """
        _ = self.config.tower  # raises without one
        mesh, out = mesh_of(self.base), None
        if mesh is not None and len(pixel_values) % mesh.size == 0:
            pixel_values = from_host(pixel_values, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
            out = NamedSharding(mesh, PartitionSpec("clients"))
        return _features(self.module, out, self.base["vision_tower"], jnp.asarray(pixel_values))

    def logits(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None,
               pixel_values: np.ndarray | None = None) -> jax.Array:
        """Returns float32 logits [B, L, V]. `input_ids` [B, L] contain all N image tokens of each image."""
        ids, mask = self._inputs(input_ids, attention_mask)
        features = None if pixel_values is None else self.features(pixel_values)
        return _logits(self.module, self.base, ids, mask, features)

    def generate(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None,
                 pixel_values: np.ndarray | None = None, **options: Unpack[GenerateOptions]) -> np.ndarray:
        """Returns continuations, int32 [B, max_new_tokens], of right-padded prompts; arguments are as in `logits`.

        Args:
            max_new_tokens: the number of tokens; default 32.
            eos_id: a token id, or several, that ends a row, whose rest is filled with the first of them; default 2.
            temperature: 0, the default, means greedy decoding; otherwise tokens are drawn at random.
            top_p: tokens are drawn from the fewest that together have this probability; default 1.0, from all tokens.
            seed: the seed of the draws; default 0.
        """
        how, seed = _decoding(**options)
        ids, mask = self._inputs(input_ids, attention_mask)
        keys = jax.random.split(jax.random.key(seed), (1, len(ids)))
        prompts = {"input_ids": ids[None], "attention_mask": mask[None], "keys": keys}
        if pixel_values is not None:
            prompts["features"] = self.features(pixel_values)[None]
        adapters = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], plain_connector(self.base))
        out = generate(self.module, self.base, adapters, prompts, jnp.zeros(1, jnp.int32), stage="plain", how=how)
        return np.asarray(out[0])

    @staticmethod
    def _inputs(input_ids: np.ndarray, attention_mask: np.ndarray | None) -> tuple[jax.Array, jax.Array]:
        ids = jnp.asarray(input_ids, jnp.int32)
        mask = jnp.ones_like(ids) if attention_mask is None else jnp.asarray(attention_mask, jnp.int32)
        return ids, mask


@partial(KeptJit, static=("module", "out"))
def _features(module: Vlm, out: NamedSharding | None, tower: PyTree, pixel_values: jax.Array) -> jax.Array:
    pixels = pixel_values.transpose(0, 2, 3, 1)
    features = cast(jax.Array, module.apply({"params": {"vision_tower": tower}}, pixels, method="features"))
    return features if out is None else jax.lax.with_sharding_constraint(features, out)


@jax.jit(static_argnums=0)
def _logits(module: Vlm, base: dict[str, PyTree], ids: jax.Array, mask: jax.Array, features: jax.Array | None
            ) -> jax.Array:
    return cast(jax.Array, module.apply(variables(base, plain_connector(base)), ids, mask, features, method="logits"))


class LoadOptions(TypedDict, total=False):
    """Keywords of `load` and `load_from_parts`."""

    dtype: str | None
    lora_scale: float
    remat: Remat
    unroll: int
    place: Place | None
    base: Storage | None


@dataclasses.dataclass(frozen=True)
class _Settings:
    """`LoadOptions`, filled up with their defaults, and checked before any file is read."""

    dtype: str | None = None
    lora_scale: float = 1.0
    remat: Remat = False
    unroll: int = 1
    place: Place | None = None
    base: Storage | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, "float32", "bfloat16"):
            raise InputError(f"model.dtype: {self.dtype!r} is not known. Use float32 or bfloat16.")
        if self.base not in (None, "bf16", "int8", "nf4"):
            raise InputError(f"model.base: {self.base!r} is not known. Use bf16, int8 or nf4.")

    @property
    def actual_dtype(self) -> str:
        return default_dtype() if self.dtype is None else self.dtype

    def module(self, config: VlmSpec) -> Vlm:
        return Vlm(config, self.lora_scale, jnp.dtype(self.actual_dtype), self.remat, self.unroll)


def load(path: str | Path = EMBEDDED, **options: Unpack[LoadOptions]) -> PretrainedModel:
    """Loads a Hugging Face LLaVA directory, or a base that is part of the package ("embedded", "instructed").

    Args:
        dtype: the data type of the frozen weights and of the computation; default float32 on CPU, bfloat16 on
            accelerators.
        lora_scale: α/r, the factor of LoRA's B·A, where LoRA is given; default 1.0.
        remat: whether the backward pass computes the layers' activations again instead of storing them; default False;
            "selective": all but the outputs of linear layers.
        unroll: the number of layers in one step of the scan over layers; default 1.
        place: a function from a leaf's path and shape to its sharding (`parallel.mesh.base_placement` makes one);
            default: all leaves on one device.
        base: "bf16", "int8" or "nf4", the storage of the weights of the language model's linear layers, as
            `model.base` in a config; default: `dtype`.

    Raises:
        InputError: the directory is not a LLaVA checkpoint that this package can run.
    """
    settings, directory = _Settings(**options), model_directory(path)
    config, base = load_base(directory, settings.actual_dtype, settings.place, settings.base)
    return PretrainedModel(directory, directory, config, base, settings.module(config))


def load_from_parts(vision: str | Path | None, language: str | Path, projector: str | Path | None, *,
                    feature_layer: int | list[int] = -2, feature_select: str = "auto",
                    **options: Unpack[LoadOptions]) -> PretrainedModel:
    """Loads a VLM from a vision tower's directory, a language model's directory and a file of `mm_projector` weights.

    Args:
        vision, projector: None for both loads the language model alone, which takes no images.
        feature_layer: LLaVA's vision_feature_layer.
        feature_select: LLaVA's vision_feature_select_strategy, or "auto", which drops the CLS token of a tower that
            has one and uses all of SigLIP's tokens.
        options: as those of `load`.

    Raises:
        InputError: a part is missing, or is a model that this package cannot run.
    """
    settings = _Settings(**options)
    tower, decoder, between = _part_paths(vision, language, projector)
    config = _parts_spec(tower, decoder, between, feature_layer, feature_select)
    base = load_parts(config, tower, decoder, between, settings.actual_dtype, settings.place, settings.base)
    return PretrainedModel(decoder, tower, config, base, settings.module(config))
