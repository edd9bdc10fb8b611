"""Which axis of which array lies on which axis of the device mesh: one table.

Mesh axes: `clients` (stacked adapters, their optimizer state and data), `fsdp` and `tensor` (the frozen base).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pilot_jax.config import MeshConfig, SystemConfig
from pilot_jax.errors import InputError
from pilot_jax.parallel.devices import client_devices
from pilot_jax.parallel.processes import from_host

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


def make_mesh(mesh: MeshConfig) -> jax.sharding.Mesh:
    """The device mesh, of the first devices there are; Auto axes: XLA propagates shardings from the arguments.

    Raises:
        InputError: it needs more devices than there are.
    """
    if mesh.devices > jax.device_count():
        raise InputError(f"system.mesh: {mesh.devices} devices asked for, {jax.device_count()} there. On CPU, "
                         f"set XLA_FLAGS=--xla_force_host_platform_device_count={mesh.devices}.")
    if jax.process_count() > 1 and mesh.devices != jax.device_count():
        raise InputError(f"system.mesh: {mesh.devices} devices, the {jax.process_count()} processes have "
                         f"{jax.device_count()} together. A run on several processes uses all.")
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(mesh.model_dump()[a] for a in AXES), AXES, axis_types=types,
                         devices=jax.devices()[:mesh.devices])


def base_placement(mesh: MeshConfig) -> Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding] | None:
    """Where `models.loading` puts each leaf of the base; None for one device."""
    if mesh.devices == 1:
        return None
    devices = make_mesh(mesh)
    return lambda path, shape: NamedSharding(devices, base_spec(path, shape, mesh))


def on_training_devices(base: dict[str, Any], system: SystemConfig) -> dict[str, Any]:
    """The base where clients are trained: on the mesh it was loaded onto, or a copy on each of `client_devices`."""
    if system.mesh.devices > 1:
        return base
    count = client_devices(system.client_devices, base)
    if count == 1:
        return base
    return jax.device_put(base, NamedSharding(make_mesh(MeshConfig(clients=count)), PartitionSpec()))


def mesh_of(tree: Any) -> jax.sharding.Mesh | None:
    """The mesh on which arrays lie; None if there is none."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, jax.sharding.NamedSharding):
            return leaf.sharding.mesh  # type: ignore[return-value]
    return None


def sharded_shapes(tree: Mapping[str, Any], mesh: jax.sharding.Mesh, config: MeshConfig) -> Any:
    """The base's shapes with their shardings, for lowering without weights."""
    def one(path, leaf):
        spec = base_spec(tuple(key.key for key in path), leaf.shape, config)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(one, tree)


def on_clients(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes [k, …] with the clients over the mesh's `clients` axis."""
    sharding = NamedSharding(mesh, PartitionSpec("clients"))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def replicated(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def spread(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Leaves [S, …] on the devices, each device with all clients and a part of the parameters.

    What the server computes is a sum over clients, entry by entry, or over entries, so that nothing but [S, S] matrices
    goes from device to device. A leaf lies over as many mesh axes as divide its longest axis.
    """
    if mesh is None:
        return jax.device_put(tree)  # a CPU takes aligned arrays as they are
    return jax.tree.map(lambda leaf: from_host(leaf, NamedSharding(mesh, columns(np.shape(leaf), mesh))), tree)


def columns(shape: tuple[int, ...], mesh: jax.sharding.Mesh, axis: int | None = None) -> PartitionSpec:
    """Spec of an array [S, …] whose parameters lie over the mesh, along `axis` (default: the one that most devices
    divide, of these the longest)."""
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


def on_parts(function: Callable[..., Any], parts: Sequence[Any], others: int = 0) -> Callable[..., Any]:
    """`function(*parts, *others)`, a sum over parameters: of each device's part of `parts`, then over the devices."""
    sharding = getattr(parts[0], "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated:
        return function
    return _on_parts(function, sharding.mesh, tuple(part.sharding.spec for part in parts),  # type: ignore[attr-defined]
                     others)


@functools.lru_cache(maxsize=256)
def _on_parts(function: Callable[..., Any], mesh: jax.sharding.Mesh, specs: tuple[PartitionSpec, ...],
              others: int) -> Callable[..., Any]:
    over = tuple(name for axis in specs[0] if axis for name in axis)

    def summed(*arguments: jax.Array) -> jax.Array:
        return jax.lax.psum(function(*arguments), over)

    return jax.jit(jax.shard_map(summed, mesh=mesh, in_specs=(*specs, *(PartitionSpec(),) * others),
                                 out_specs=PartitionSpec(), check_vma=False))
