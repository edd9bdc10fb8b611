"""The device mesh, and how arrays are sharded over it: one table of rules for the frozen base.

Mesh axes: `clients` (stacked adapters, their optimizer state and data), `fsdp` and `tensor` (the frozen base).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import PyTree

from pilot_jax.config import MeshConfig, SystemConfig
from pilot_jax.errors import InputError
from pilot_jax.parallel.devices import client_devices
from pilot_jax.parallel.processes import from_host

AXES = ("clients", "fsdp", "tensor")
# (path of a base leaf, the mesh axis of each of its axes). The first match counts; a leaf without one is replicated.
BASE_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"decoder/embedding", ("tensor", "fsdp")),
    (r"decoder/head", ("fsdp", "tensor")),
    # Over heads, over inner width; a weight, or the two arrays of a quantised one.
    (r"decoder/layers/(q|k|v|gate|up)(/qvalue|/packed|/scale)?", (None, "fsdp", "tensor")),
    (r"decoder/layers/(o|down)(/qvalue|/packed|/scale)?", (None, "tensor", "fsdp")),
    (r"vision_tower/layers/(qkv|fc1)/kernel", (None, "fsdp", "tensor")),
    (r"vision_tower/layers/(out|fc2)/kernel", (None, "tensor", "fsdp")),
)


def base_spec(path: tuple[str, ...], shape: tuple[int, ...], mesh: MeshConfig) -> PartitionSpec:
    """Returns the spec of a base leaf. An axis whose length the mesh axis does not divide stays whole."""
    sizes = mesh.model_dump()
    for pattern, axes in BASE_RULES:
        if re.fullmatch(pattern, "/".join(path)):
            return PartitionSpec(*(axis if axis and length % sizes[axis] == 0 else None
                                   for axis, length in zip(axes, shape, strict=True)))
    return PartitionSpec()


def gathered(linear: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Returns the sharding in which a product needs an array of one decoder layer's `linear`: whole over `fsdp`."""
    spec = base_spec(("decoder", "layers", linear), (1, *shape), MeshConfig(**dict(mesh.shape)))
    return NamedSharding(mesh, PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec[1:])))


def shard_elements(shape: tuple[int, ...], spec: PartitionSpec, mesh: MeshConfig) -> int:
    """Returns how many elements of an array one device holds; of unequal parts, the largest."""
    sizes, total = mesh.model_dump(), 1
    for i, length in enumerate(shape):
        axis = spec[i] if i < len(spec) else None
        total *= -(-length // sizes[axis]) if axis else length
    return total


def make_mesh(mesh: MeshConfig) -> Mesh:
    """Returns the device mesh, made of the first devices that JAX has.

    Its axes are of JAX's type Auto: XLA propagates shardings from the arguments.

    Raises:
        InputError: the mesh needs more devices than exist, or a run on several processes would leave some unused.
    """
    if mesh.devices > jax.device_count():
        raise InputError(f"system.mesh: {mesh.devices} devices requested, {jax.device_count()} available. On CPU, "
                         f"set XLA_FLAGS=--xla_force_host_platform_device_count={mesh.devices}.")
    if jax.process_count() > 1 and mesh.devices != jax.device_count():
        raise InputError(f"system.mesh: {mesh.devices} devices requested, but the {jax.process_count()} processes "
                         f"have {jax.device_count()} together. A run on several processes must use all of them.")
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(mesh.model_dump()[a] for a in AXES), AXES, axis_types=types,
                         devices=jax.devices()[:mesh.devices])


def base_placement(mesh: MeshConfig) -> Callable[[tuple[str, ...], tuple[int, ...]], Sharding] | None:
    """Returns the sharding of each leaf of the base as a function of its path and shape; None for one device."""
    if mesh.devices == 1:
        return None
    devices = make_mesh(mesh)
    return lambda path, shape: NamedSharding(devices, base_spec(path, shape, mesh))


def on_training_devices(base: dict[str, PyTree], system: SystemConfig) -> dict[str, PyTree]:
    """Returns the base on the devices that train: on the mesh it was loaded onto, or copied to all `client_devices`."""
    if system.mesh.devices > 1:
        return base
    count = client_devices(system.client_devices, base)
    if count == 1:
        return base
    return jax.device_put(base, NamedSharding(make_mesh(MeshConfig(clients=count)), PartitionSpec()))


def mesh_of(tree: PyTree) -> Mesh | None:
    """Returns the mesh over which the first sharded array of a tree is spread; None if there is no such array."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
            return cast(Mesh, leaf.sharding.mesh)
    return None


def sharded_shapes(tree: Mapping[str, PyTree], mesh: Mesh, config: MeshConfig) -> PyTree:
    """Returns the base's shapes with their shardings, for lowering without weights."""
    def with_sharding(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = base_spec(tuple(key.key for key in path), leaf.shape, config)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(with_sharding, tree)


def on_clients(tree: PyTree, mesh: Mesh) -> PyTree:
    """Returns the shapes [k, …] of k stacked clients, which lie over the mesh's `clients` axis."""
    sharding = NamedSharding(mesh, PartitionSpec("clients"))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def replicated(tree: PyTree, mesh: Mesh) -> PyTree:
    """Returns the shapes of arrays that every device has as a whole."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def spread(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Returns leaves [S, …] on the devices, each device with all clients and a part of the parameters.

    The server computes sums over clients, entry by entry, and sums over entries, so that only [S, S] matrices go from
    device to device. `columns` chooses the mesh axes of a leaf. Without a mesh: the default device.
    """
    if mesh is None:
        return jax.device_put(tree)  # a CPU device does not copy aligned arrays (`host_memory.empty`)
    return jax.tree.map(lambda leaf: from_host(leaf, NamedSharding(mesh, columns(np.shape(leaf), mesh))), tree)


def columns(shape: tuple[int, ...], mesh: Mesh, axis: int | None = None) -> PartitionSpec:
    """Returns the spec of an array [S, …] of which each device has all clients and a part of one axis of parameters.

    That axis is `axis`, or by default the one that can be divided among the most devices; of several, the longest.
    """
    def dividing(length: int) -> tuple[str, ...]:
        taken, size = tuple[str, ...](), 1
        for name in mesh.axis_names:
            if length % (size * mesh.shape[name]) == 0:
                taken, size = (*taken, name), size * mesh.shape[name]
        return taken

    def devices(i: int) -> int:
        return math.prod(mesh.shape[name] for name in dividing(shape[i]))

    inner = range(1, len(shape))
    best = axis if axis is not None else max(inner, key=lambda i: (devices(i), shape[i]), default=0)
    names = dividing(shape[best]) if best else ()
    return PartitionSpec(*(None,) * best, names) if names else PartitionSpec()


def on_parts(function: Callable[..., jax.Array], parts: Sequence[PyTree], others: int = 0
             ) -> Callable[..., jax.Array]:
    """Returns `function`, a sum over parameters, so that each device sums its own part and the sums are then added.

    Args:
        function: takes arrays like `parts`, then `others` more, of which each device has all.
        parts: arrays, or their shapes; where they are not sharded, `function` itself is returned.
    """
    sharding = getattr(parts[0], "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated:
        return function
    return _on_parts(function, sharding.mesh, tuple(part.sharding.spec for part in parts),  # type: ignore[attr-defined]
                     others)


@functools.lru_cache(maxsize=256)
def _on_parts(function: Callable[..., jax.Array], mesh: Mesh, specs: tuple[PartitionSpec, ...],
              others: int) -> Callable[..., jax.Array]:
    over = tuple(name for axis in specs[0] if axis for name in axis)

    def summed(*arguments: jax.Array) -> jax.Array:
        return jax.lax.psum(function(*arguments), over)

    return jax.jit(jax.shard_map(summed, mesh=mesh, in_specs=(*specs, *(PartitionSpec(),) * others),
                                 out_specs=PartitionSpec(), check_vma=False))
