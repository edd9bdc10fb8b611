"""One program on the devices of several processes, by `jax.distributed`.

Every process takes the same steps with the same host arrays; the mesh divides what the devices compute. One process,
the writer, writes the files and the messages. With one process, every function works as well.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import PyTree

from pilot_jax.errors import InputError

HEARTBEAT = 20  # seconds without a sign of life after which a process counts as dead, and the others end
AT_ONCE = 2**28  # bytes; larger arrays are gathered a row at a time


def connect(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the other processes. It must be called before JAX is used for anything else.

    Args:
        coordinator: "host:port" of process 0.
        processes: number of processes.
        process: number of this process, from 0. If all three are None, JAX reads them from the cluster's environment
            (Slurm, TPU pods, MPI).

    Raises:
        InputError: one or two of the three are None, or the other processes do not answer.
    """
    given = [x is not None for x in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise InputError("--coordinator, --num-processes and --process-id go together. Give all three, or only "
                         "--distributed where Slurm or a TPU pod provides them.")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise InputError(f"--process-id: {process}, expected 0 to {processes - 1}.")
    try:
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"--coordinator: cannot join the other processes ({first}). Start all of them, with the same "
                         "address.") from None


def is_one_of_several() -> bool:
    """Whether this process runs a federation together with others."""
    return jax.process_count() > 1


def is_writer() -> bool:
    """Whether this process writes the files and the messages."""
    return jax.process_index() == 0


def to_host(tree: PyTree) -> PyTree:
    """Returns arrays as NumPy arrays, in every process, wherever their parts lie.

    An array that is partly on other processes' devices is first gathered on every device, a large one row by row.
    """
    def to_numpy(leaf: jax.typing.ArrayLike) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        if leaf.nbytes > AT_ONCE and leaf.ndim > 1:
            return np.stack([to_numpy(leaf[i]) for i in range(len(leaf))])
        from jax.experimental.multihost_utils import process_allgather

        return np.asarray(process_allgather(leaf, tiled=True))

    return jax.tree.map(to_numpy, tree)


def from_host(tree: PyTree, sharding: Sharding) -> PyTree:
    """Returns NumPy arrays, which are the same in every process, as arrays on the devices of all processes."""
    def to_devices(leaf: jax.typing.ArrayLike) -> jax.Array:
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.device_put(tree, sharding) if jax.process_count() == 1 else jax.tree.map(to_devices, tree)


def over_clients(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Returns leaves [k, …] on the devices, with the clients over the mesh's `clients` axis if its size divides k.

    Only the rows that lie on this process's devices are read. Without a mesh: the default device.
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    divided = all(len(leaf) % mesh.shape["clients"] == 0 for leaf in jax.tree.leaves(tree))
    spec = PartitionSpec("clients") if divided else PartitionSpec()
    return from_host(tree, NamedSharding(mesh, spec))


def places(mesh: Mesh | None) -> list[set[int]]:
    """Returns, for each place along the mesh's `clients` axis, the numbers of the processes with a device there."""
    if mesh is None:
        return [{jax.process_index()}]
    return [{device.process_index for device in row.ravel()} for row in mesh.devices]


def place_of(client: int, width: int, count: int) -> int:
    """Returns the place, of `count` along the `clients` axis, of number `client` of `width` stacked clients."""
    return client * count // width


def is_on_this_process(mesh: Mesh | None, width: int) -> list[bool]:
    """Returns, for each of `width` stacked clients, whether any part of it is on this process's devices."""
    processes = places(mesh)
    return [jax.process_index() in processes[place_of(k, width, len(processes))] for k in range(width)]


def own_rows(mesh: Mesh | None, length: int) -> np.ndarray:
    """Returns which rows of an array [length, …] that is spread over all devices this process has; bool [length]."""
    own = np.ones(length, bool)
    if mesh is not None:
        own[:] = False
        spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        for (rows,) in spread.addressable_devices_indices_map((length,)).values():  # type: ignore[misc]
            own[rows] = True
    return own


def own_parts(array: jax.Array) -> list[tuple[int, np.ndarray]]:
    """Returns (number of its first row, rows) for each distinct part of an array that this process has."""
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return [(start, np.asarray(parts[start])) for start in sorted(parts)]


def largest_of_all(value: int) -> int:
    """Returns the largest of the processes' values, in every process."""
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import process_allgather

    return int(np.max(process_allgather(np.int32(value))))


def wait_for_all(what: str) -> None:
    """Waits until every process has called this with the same `what`, which names the point in JAX's errors."""
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(what)
