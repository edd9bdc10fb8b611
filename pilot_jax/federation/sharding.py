"""Which axis of which array lies on which axis of the device mesh: one table.

Mesh axes: `clients` (stacked adapters, their optimizer state and data), `fsdp` and `tensor` (the frozen base).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from pilot_jax.config import MeshConfig

AXES = ("clients", "fsdp", "tensor")

# (path of a base leaf, its axes). The first match counts; what matches nothing is replicated.
BASE_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"decoder/embedding", ("tensor", "fsdp")),
    (r"decoder/head", ("fsdp", "tensor")),
    (r"decoder/layers/(q|k|v|gate|up)", (None, "fsdp", "tensor")),  # over heads, over inner width
    (r"decoder/layers/(o|down)", (None, "tensor", "fsdp")),
    (r"vision_tower/layers/(qkv|fc1)/kernel", (None, "fsdp", "tensor")),
    (r"vision_tower/layers/(out|fc2)/kernel", (None, "tensor", "fsdp")),
)


def base_spec(path: tuple[str, ...], shape: tuple[int, ...], mesh: MeshConfig) -> PartitionSpec:
    """Spec of a base leaf. An axis whose length the mesh axis does not divide stays whole."""
    sizes = mesh.model_dump()
    for pattern, axes in BASE_RULES:
        if re.fullmatch(pattern, "/".join(path)):
            return PartitionSpec(*(axis if axis and length % sizes[axis] == 0 else None
                                   for axis, length in zip(axes, shape, strict=True)))
    return PartitionSpec()


def shard_elements(shape: tuple[int, ...], spec: PartitionSpec, mesh: MeshConfig) -> int:
    """Elements of the part of an array that one device holds."""
    sizes, total = mesh.model_dump(), 1
    for i, length in enumerate(shape):
        axis = spec[i] if i < len(spec) else None
        total *= -(-length // sizes[axis]) if axis else length
    return total


def split_cpu(count: int | None) -> None:
    """Have JAX see the CPU as `count` devices (default: one per core). Too late once JAX has started; then nothing.

    On two cores, two devices with a client each train about a third more than one device with both: what XLA does not
    spread over threads runs side by side all the same.
    """
    # Whatever the reason: JAX has started, or XLA_FLAGS settle it already.
    with contextlib.suppress(RuntimeError, ValueError):
        if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            # macOS and Windows have no affinity; there every core counts.
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            jax.config.update("jax_num_cpu_devices", count or cores)


def make_mesh(mesh: MeshConfig) -> jax.sharding.Mesh:
    """The device mesh, Auto axes: XLA propagates shardings from the arguments."""
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(mesh.model_dump()[a] for a in AXES), AXES, axis_types=types)


def sharded_shapes(tree: Mapping[str, Any], mesh: jax.sharding.Mesh, config: MeshConfig) -> Any:
    """The base's shapes with their shardings, for lowering without weights."""
    def one(path, leaf):
        spec = base_spec(tuple(key.key for key in path), leaf.shape, config)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(one, tree)


def on_clients(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes [k, …] with the clients over the mesh's `clients` axis."""
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec("clients"))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def replicated(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
