"""Projectors of a user's own, which take the place of LLaVA's two-layer MLP."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key, PyTree

from pilot_jax.errors import InputError
from pilot_jax.models.spec import VlmSpec
from pilot_jax.parallel.mesh import mesh_of


class Projector(Protocol):
    """The interface of a projector: a class without arguments, whose object computes."""

    def init(self, key: Key[Array, ""], d: int, c: int) -> PyTree:
        """Returns the initial parameters, a tree of dicts, for image features of width d and a decoder of width c."""

    def __call__(self, parameters: PyTree, features: Float[Array, "B N d"]) -> Float[Array, "B N c"]:
        """Returns the embeddings that take the places of the N image tokens."""


Kind = TypeVar("Kind", bound=type[Projector])
PROJECTORS: dict[str, Projector] = {}


def projector(name: str) -> Callable[[Kind], Kind]:
    """Returns a decorator that registers a class as a projector, under a name that `model.projector` can then have."""
    def register(kind: Kind) -> Kind:
        PROJECTORS[name] = kind()
        return kind

    return register


def with_projector(spec: VlmSpec, name: str | None) -> VlmSpec:
    """Returns the same model with the projector of a name; None: its checkpoint's.

    Raises:
        InputError: the name is not known in this process, or the model takes no images.
    """
    if name is None:
        return spec
    if spec.vision is None:
        raise InputError("model.projector: a language model alone has no projector. Remove the key.")
    if name not in PROJECTORS:
        near = difflib.get_close_matches(name, PROJECTORS, 1, 0.6)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise InputError(f"model.projector: {name!r} is not known. {hint}Name the module that registers it: --use "
                         "MODULE (in Python: import it).")
    return spec.with_projector(PROJECTORS[name])


def check_projector(name: str | None, strategy: str, visual_adapters: Sequence[str]) -> None:
    """Refuses a projector of one's own under a strategy with visual adapters that are LLaVA's MLPs.

    Raises:
        InputError: it is one.
    """
    if name is not None and set(visual_adapters) - {"projector"}:
        raise InputError(f"model.projector: {strategy} trains adapters of its own, which are LLaVA's MLPs. Remove the "
                         "key, or use a strategy that trains the projector, such as fedavg.")


def initial_projector(spec: VlmSpec, key: Key[Array, ""]) -> PyTree:
    """Returns the first parameters of the model's own projector, float32.

    Raises:
        InputError: its output has another shape than [B, N, C].
    """
    size, tokens, width = spec.feature_size, spec.num_image_tokens, spec.text.hidden_size
    parameters = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), spec.projector.init(key, size, width))
    out = jax.eval_shape(spec.projector, parameters, jax.ShapeDtypeStruct((2, tokens, size), jnp.float32))
    if getattr(out, "shape", None) != (2, tokens, width):
        raise InputError(f"model.projector: features [2, {tokens}, {size}] give {getattr(out, 'shape', type(out))}, "
                         f"expected [2, {tokens}, {width}].")
    return parameters


def with_initial_projector(base: dict[str, PyTree], spec: VlmSpec, seed: int) -> dict[str, PyTree]:
    """Returns the frozen weights with the first parameters of the model's own projector, if it has one."""
    if spec.projector is None:
        return base
    own, mesh = initial_projector(spec, jax.random.fold_in(jax.random.key(seed), 0x70726F6A)), mesh_of(base)  # "proj"
    return {**base, "projector": own if mesh is None else jax.device_put(own, NamedSharding(mesh, PartitionSpec()))}
