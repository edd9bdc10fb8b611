"""Turns trees of arrays into JSON and flat arrays, and back: the form in which a snapshot has the server's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pilot_jax.errors import InputError


def packed(tree: Any, arrays: dict[str, list[np.ndarray]]) -> Any:
    """Returns a tree of dicts, tuples, lists, numbers, strings and arrays as a JSON value, the inverse of `unpacked`.

    The entries of each array are appended to `arrays`, by dtype. The JSON value has the array's shape and position."""
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, Mapping):
        return {"dict": [[key, packed(value, arrays)] for key, value in tree.items()]}
    if hasattr(tree, "_fields"):
        return {"named": {field: packed(getattr(tree, field), arrays) for field in tree._fields}}
    if isinstance(tree, tuple | list):
        return {type(tree).__name__: [packed(value, arrays) for value in tree]}
    array = np.asarray(tree)
    before = arrays.setdefault(array.dtype.name, [])
    place = {"array": array.dtype.name, "shape": list(array.shape), "at": sum(a.size for a in before)}
    before.append(array.ravel())
    return place


def unpacked(node: Any, arrays: Mapping[str, np.ndarray], like: Any = None) -> Any:
    """Returns the tree that `packed` was given; `like` is a tree with the same named tuples (optax states) in it."""
    if not isinstance(node, dict):
        return node
    if "dict" in node:
        known = like if isinstance(like, Mapping) else {}
        return {key: unpacked(value, arrays, known.get(key)) for key, value in node["dict"]}
    if "named" in node:
        if tuple(node["named"]) != getattr(like, "_fields", None):
            raise InputError(f"the server's state has {list(node['named'])} where {type(like).__name__} was expected")
        return type(like)(**{f: unpacked(value, arrays, getattr(like, f)) for f, value in node["named"].items()})
    if "array" in node:
        start, shape = node["at"], tuple(node["shape"])
        return arrays[node["array"]][start:start + int(np.prod(shape, dtype=np.int64))].reshape(shape)
    (kind, values), = node.items()
    own = like if isinstance(like, tuple | list) else ()
    return (tuple if kind == "tuple" else list)(
        unpacked(value, arrays, own[i] if i < len(own) else None) for i, value in enumerate(values))
