"""A checkpoint ready to use: `pilot_jax.load(path)`, with Hugging Face's call semantics."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pilot_jax.config import ModelConfig
from pilot_jax.errors import InputError
from pilot_jax.models.checkpoints.hf_config import read_vlm_config
from pilot_jax.models.checkpoints.parts import load_parts, read_parts_config
from pilot_jax.models.checkpoints.processors import IMAGE_TOKEN, load_tokenizer
from pilot_jax.models.checkpoints.reading import Place, load_base
from pilot_jax.models.generate import Decoding, generate
from pilot_jax.models.spec import VlmSpec
from pilot_jax.models.vlm import Vlm, variables
from pilot_jax.parallel.mesh import mesh_of
from pilot_jax.parallel.processes import from_host

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EMBEDDED = "embedded"
ASSETS = Path(__file__).parent.parent / "embedded" / "assets"


def model_directory(path: str | Path) -> Path:
    """The directory `path` names; "embedded" is the base that ships with the package."""
    return ASSETS / "base" if str(path) == EMBEDDED else Path(path).expanduser()


def shapes_directory(path: str | Path) -> Path:
    """`model_directory`, or, where it is not there, the shapes of a well-known model of that name, without weights."""
    directory = model_directory(path)
    known = ASSETS / "shapes" / Path(str(path)).name
    return known if not directory.exists() and known.is_dir() else directory


def read_shapes(config: ModelConfig) -> tuple[VlmSpec, Path]:
    """The shapes of the configured model and the directory of its tokenizer; no weights are read."""
    if config.parts is None:
        directory = shapes_directory(config.path)
        return read_vlm_config(directory), directory
    parts = config.parts
    vision, language, projector = (Path(p).expanduser() for p in (parts.vision, parts.language, parts.projector))
    token = cast(int, load_tokenizer(language).convert_tokens_to_ids(IMAGE_TOKEN))
    return read_parts_config(vision, language, projector, parts.feature_layer, parts.feature_select, token), language


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
    """A frozen LLaVA base. NumPy or JAX arrays in, JAX arrays out."""

    text_directory: Path  # of the tokenizer
    image_directory: Path  # of the image processor
    config: VlmSpec
    base: dict  # {"vision_tower", "projector", "decoder"}
    module: Vlm

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The checkpoint's tokenizer.

        Raises:
            InputError: there is none, or its `<image>` is not the config's.
        """
        tokenizer = load_tokenizer(self.text_directory)
        found = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if found != self.config.image_token_id:
            raise InputError(f"{self.text_directory}: {IMAGE_TOKEN} is token {found} of the tokenizer, config.json's "
                             f"image_token_index is {self.config.image_token_id}. Mend one of them.")
        return tokenizer

    def features(self, pixel_values: np.ndarray) -> jax.Array:
        """pixel_values [B, 3, H, W] as the image processor gives them → H_v [B, N, D]. On a mesh whose size divides B
        each device takes its share of the images; H_v then lies over the `clients` axis."""
        mesh, out = mesh_of(self.base), None
        if mesh is not None and len(pixel_values) % mesh.size == 0:
            pixel_values = from_host(pixel_values, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
            out = NamedSharding(mesh, PartitionSpec("clients"))
        return _features(self.module, out, self.base["vision_tower"], jnp.asarray(pixel_values))

    def logits(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None,
               pixel_values: np.ndarray | None = None) -> jax.Array:
        """Float32 logits [B, L, V]. `input_ids` [B, L] already hold the N image tokens of each image."""
        ids, mask = self._inputs(input_ids, attention_mask)
        features = None if pixel_values is None else self.features(pixel_values)
        return _logits(self.module, self.base, ids, mask, features)

    def generate(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None,
                 pixel_values: np.ndarray | None = None, *, max_new_tokens: int = 32,
                 eos_id: int | tuple[int, ...] = 2, temperature: float = 0.0, top_p: float = 1.0,
                 seed: int = 0) -> np.ndarray:
        """Continuations [B, max_new_tokens]; any id of `eos_id` ends a row, which is then filled with the first.

        temperature: 0 is greedy; else tokens are drawn, among the fewest that have probability `top_p` together.
        """
        ids, mask = self._inputs(input_ids, attention_mask)
        prompts = {"input_ids": ids[None], "attention_mask": mask[None]}
        if pixel_values is not None:
            prompts["features"] = self.features(pixel_values)[None]
        adapters = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], {"projector": self.base["projector"]})
        stop = (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
        keys = jax.random.split(jax.random.key(seed), (1, len(ids)))
        out = generate(self.module, self.base, adapters, prompts, jnp.zeros(1, jnp.int32), keys, stage="plain",
                       how=Decoding(max_new_tokens, stop, temperature, top_p))
        return np.asarray(out[0])

    @staticmethod
    def _inputs(input_ids: np.ndarray, attention_mask: np.ndarray | None) -> tuple[jax.Array, jax.Array]:
        ids = jnp.asarray(input_ids, jnp.int32)
        mask = jnp.ones_like(ids) if attention_mask is None else jnp.asarray(attention_mask, jnp.int32)
        return ids, mask


@jax.jit(static_argnums=(0, 1))
def _features(module: Vlm, out: NamedSharding | None, tower: dict, pixel_values: jax.Array) -> Any:
    pixels = pixel_values.transpose(0, 2, 3, 1)
    features = module.apply({"params": {"vision_tower": tower}}, pixels, method="features")
    return features if out is None else jax.lax.with_sharding_constraint(features, out)


@jax.jit(static_argnums=0)
def _logits(module: Vlm, base: dict, ids: jax.Array, mask: jax.Array, features: jax.Array | None) -> Any:
    return module.apply(variables(base, {"projector": base["projector"]}), ids, mask, features, method="logits")


def _checked_dtype(dtype: str | None) -> str:
    if dtype is None:
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"model.dtype: {dtype!r} is not known. Use float32 or bfloat16.")
    return dtype


def load(path: str | Path = EMBEDDED, *, dtype: str | None = None, lora_scale: float = 1.0, remat: bool = False,
         unroll: int = 1, place: Place | None = None) -> PretrainedModel:
    """Load a Hugging Face LLaVA directory, or the embedded base.

    Args:
        dtype: of the frozen weights and the computation; default float32 on CPU, bfloat16 on accelerators.
        lora_scale: α/r, applied where text adapters are given.
        place: sharding of each leaf by path and shape, see `federation.sharding`; default: one device.

    Raises:
        InputError: the directory is not a LLaVA checkpoint this package can run.
    """
    dtype, directory = _checked_dtype(dtype), model_directory(path)
    config, base = load_base(directory, dtype, place)
    return PretrainedModel(directory, directory, config, base, Vlm(config, lora_scale, jnp.dtype(dtype), remat, unroll))


def load_from_parts(vision: str | Path, language: str | Path, projector: str | Path, *,
                    feature_layer: int | list[int] = -2, feature_select: str = "auto", dtype: str | None = None,
                    lora_scale: float = 1.0, remat: bool = False, unroll: int = 1,
                    place: Place | None = None) -> PretrainedModel:
    """A VLM from a CLIP or SigLIP directory, a language model's directory and a file of `mm_projector` weights.

    Args:
        feature_layer, feature_select: LLaVA's vision_feature_layer and vision_feature_select_strategy; "auto" drops
            CLIP's CLS and keeps all of SigLIP's tokens. The rest as in `load`.

    Raises:
        InputError: a part is missing, or is not what this package can run.
    """
    dtype = _checked_dtype(dtype)
    vision, language, projector = (Path(p).expanduser() for p in (vision, language, projector))
    token = cast(int, load_tokenizer(language).convert_tokens_to_ids(IMAGE_TOKEN))
    config = read_parts_config(vision, language, projector, feature_layer, feature_select, token)
    base = load_parts(config, vision, language, projector, dtype, place)
    return PretrainedModel(language, vision, config, base, Vlm(config, lora_scale, jnp.dtype(dtype), remat, unroll))
