"""Subtrees of adapters as one buffer, as they travel between a server and its clients' machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pilot_jax.federation.roles import Tree


@dataclasses.dataclass(frozen=True)
class Parcel:
    """The content of a message: subtrees of adapters in one buffer, and plain values about them."""

    about: Mapping[str, Any]
    names: tuple[str, ...] = ()
    data: bytes = b""


def packed(adapters: Mapping[str, Tree], names: Sequence[str], dtype: str, about: Mapping[str, Any]) -> Parcel:
    """Returns the subtrees `names` as numbers of one dtype (float32 or bfloat16), leaf after leaf in jax.tree order."""
    leaves = jax.tree.leaves([adapters[name] for name in names])
    return Parcel(about, tuple(names), b"".join(
        np.ascontiguousarray(leaf, jax.numpy.dtype(dtype)).reshape(-1).view(np.uint8).data for leaf in leaves))


def unpacked(parcel: Parcel, like: Mapping[str, Tree], dtype: str) -> dict[str, Tree]:
    """Returns the subtrees of a parcel with the shapes of `like`, float32; a float32 buffer is used without a copy.

    Raises:
        ValueError: the parcel has other subtrees than `like`, or another size.
    """
    kind = jax.numpy.dtype(dtype)
    if sorted(parcel.names) != sorted(like):
        raise ValueError("has other subtrees than expected")
    leaves, tree = jax.tree.flatten([like[name] for name in parcel.names])
    ends = np.cumsum([0, *(np.size(leaf) for leaf in leaves)]) * kind.itemsize
    if ends[-1] != len(parcel.data):
        raise ValueError(f"has {len(parcel.data)} bytes, expected {ends[-1]}")
    arrays = [np.frombuffer(parcel.data, kind, np.size(leaf), start).astype(np.float32, copy=False).reshape(
        np.shape(leaf)) for leaf, start in zip(leaves, ends, strict=False)]
    return dict(zip(parcel.names, jax.tree.unflatten(tree, arrays), strict=True))
