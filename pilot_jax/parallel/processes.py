"""Several processes that run one program on the devices of all, under `jax.distributed`.

Every process goes the same way with the same host arrays; what the devices compute is divided by the mesh. One process,
the writer, leaves the files.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pilot_jax.errors import InputError

AT_ONCE = 2**28  # bytes of an array that are gathered on a device


def start(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Join the other processes; before JAX is used for anything else.

    Args:
        coordinator: "host:port" of process 0. All None: the cluster's own variables say it (Slurm, TPU pods, MPI).

    Raises:
        InputError: some are given but not all, or the others do not answer.
    """
    given = [x is not None for x in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise InputError("--coordinator, --num-processes and --process-id go together. Give all three, or only "
                         "--distributed where Slurm or a TPU pod says them.")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise InputError(f"--process-id: {process}, expected 0 to {processes - 1}.")
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"--coordinator: cannot join the other processes ({first}). Start all of them, with the same "
                         "address.") from None


def is_writer() -> bool:
    """Whether this process leaves the files and speaks."""
    return jax.process_index() == 0


def to_host(tree: Any) -> Any:
    """Arrays as NumPy arrays, in every process, wherever their parts lie. On their way there from other processes'
    devices they are whole on each device, large ones a row at a time."""
    def one(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        if leaf.nbytes > AT_ONCE and leaf.ndim > 1:
            return np.stack([one(leaf[i]) for i in range(len(leaf))])
        from jax.experimental.multihost_utils import process_allgather

        return np.asarray(process_allgather(leaf, tiled=True))

    return jax.tree.map(one, tree)


def from_host(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """NumPy arrays, which every process has alike, on the devices of all."""
    def one(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.device_put(tree, sharding) if jax.process_count() == 1 else jax.tree.map(one, tree)


def over_clients(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Leaves [k, …] on the devices, the clients over the mesh's `clients` axis if that divides k. Of what lies on other
    processes' devices, nothing is read."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    divided = all(len(leaf) % mesh.shape["clients"] == 0 for leaf in jax.tree.leaves(tree))
    spec = PartitionSpec("clients") if divided else PartitionSpec()
    return from_host(tree, NamedSharding(mesh, spec))


def places(mesh: jax.sharding.Mesh | None) -> list[set[int]]:
    """For each place along the mesh's `clients` axis, the processes that have a device there."""
    if mesh is None:
        return [{jax.process_index()}]
    return [{device.process_index for device in row.ravel()} for row in mesh.devices]


def place_of(client: int, width: int, count: int) -> int:
    """On which of `count` places the client'th of `width` stacked clients lies."""
    return client * count // width


def here(mesh: jax.sharding.Mesh | None, width: int) -> list[bool]:
    """Which of `width` stacked clients lie, in part at least, on this process's devices."""
    processes = places(mesh)
    return [jax.process_index() in processes[place_of(k, width, len(processes))] for k in range(width)]


def own_rows(mesh: jax.sharding.Mesh | None, length: int) -> np.ndarray:
    """Which rows of an array [length, …], spread over all devices, lie on this process's; bool [length]."""
    own = np.ones(length, bool)
    if mesh is not None:
        own[:] = False
        spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        for (rows,) in spread.addressable_devices_indices_map((length,)).values():  # type: ignore[misc]
            own[rows] = True
    return own


def own_parts(array: jax.Array) -> list[tuple[int, np.ndarray]]:
    """(first row, rows) of the distinct parts of an array that this process has."""
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return [(start, np.asarray(parts[start])) for start in sorted(parts)]


def largest(value: int) -> int:
    """The largest of the processes' values, in every process."""
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import process_allgather

    return int(np.max(process_allgather(np.int32(value))))


def wait(what: str) -> None:
    """Until every process is here."""
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(what)
