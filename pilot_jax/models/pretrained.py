"""A checkpoint ready to use: `pilot_jax.load(path)`, with Hugging Face's call semantics."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pilot_jax.errors import InputError
from pilot_jax.models.config import VlmConfig
from pilot_jax.models.generate import greedy
from pilot_jax.models.loading import load_base
from pilot_jax.models.vlm import Vlm, variables

EMBEDDED = "embedded"


def model_directory(path: str | Path) -> Path:
    """The directory `path` names; "embedded" is the base that ships with the package."""
    return Path(__file__).parent.parent / "assets" / "base" if str(path) == EMBEDDED else Path(path).expanduser()


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
    """A frozen LLaVA base. NumPy or JAX arrays in, JAX arrays out."""

    directory: Path
    config: VlmConfig
    base: dict  # {"vision_tower", "projector", "decoder"}
    module: Vlm

    def features(self, pixel_values: np.ndarray) -> jax.Array:
        """pixel_values [B, 3, H, W] as the image processor gives them → H_v [B, N, D]."""
        return _features(self.module, self.base["vision_tower"], jnp.asarray(pixel_values))

    def logits(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None,
               pixel_values: np.ndarray | None = None) -> jax.Array:
        """Float32 logits [B, L, V]. `input_ids` [B, L] already hold the N image tokens of each image."""
        ids, mask = self._inputs(input_ids, attention_mask)
        features = None if pixel_values is None else self.features(pixel_values)
        return _logits(self.module, self.base, ids, mask, features)

    def generate(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None,
                 pixel_values: np.ndarray | None = None, *, max_new_tokens: int = 32, eos_id: int = 2) -> np.ndarray:
        """Greedy continuations [B, max_new_tokens]; after `eos_id` a row is filled with it."""
        ids, mask = self._inputs(input_ids, attention_mask)
        prompts = {"input_ids": ids[None], "attention_mask": mask[None]}
        if pixel_values is not None:
            prompts["features"] = self.features(pixel_values)[None]
        adapters = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], {"projector": self.base["projector"]})
        out = greedy(self.module, self.base, adapters, prompts, jnp.zeros(1, jnp.int32), stage="plain",
                     max_new_tokens=max_new_tokens, eos_id=eos_id)
        return np.asarray(out[0])

    @staticmethod
    def _inputs(input_ids: np.ndarray, attention_mask: np.ndarray | None) -> tuple[jax.Array, jax.Array]:
        ids = jnp.asarray(input_ids, jnp.int32)
        mask = jnp.ones_like(ids) if attention_mask is None else jnp.asarray(attention_mask, jnp.int32)
        return ids, mask


@jax.jit(static_argnums=0)
def _features(module: Vlm, tower: dict, pixel_values: jax.Array) -> jax.Array:
    return module.apply({"params": {"vision_tower": tower}}, pixel_values.transpose(0, 2, 3, 1), method="features")


@jax.jit(static_argnums=0)
def _logits(module: Vlm, base: dict, ids: jax.Array, mask: jax.Array, features: jax.Array | None) -> jax.Array:
    return module.apply(variables(base, {"projector": base["projector"]}), ids, mask, features, method="logits")


def load(path: str | Path = EMBEDDED, *, dtype: str | None = None, lora_scale: float = 1.0, remat: bool = False,
         unroll: int = 1) -> PretrainedModel:
    """Load a Hugging Face LLaVA directory, or the embedded base.

    Args:
        dtype: of the frozen weights and the computation; default float32 on CPU, bfloat16 on accelerators.
        lora_scale: α/r, applied where text adapters are given.

    Raises:
        InputError: the directory is not a LLaVA checkpoint this package can run.
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"model.dtype: {dtype!r} is not known. Use float32 or bfloat16.")
    directory = model_directory(path)
    config, base = load_base(directory, dtype)
    module = Vlm(config, lora_scale, jnp.dtype(dtype), remat, unroll)
    return PretrainedModel(directory, config, base, module)
