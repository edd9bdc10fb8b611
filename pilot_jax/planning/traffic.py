"""Estimates the bytes that devices of a mesh send each other in a step, from shapes."""

from __future__ import annotations

import jax

from pilot_jax.config import MeshConfig
from pilot_jax.federation.roles import Tree
from pilot_jax.parallel.mesh import base_spec, shard_elements


def step_traffic(base: dict[str, Tree], trained: int, clients: int, mesh: MeshConfig) -> dict[str, int]:
    """Returns the bytes that each device receives in one step of `clients` clients, because of the axis `fsdp`.

    "weights": the decoder's layers are gathered in the forward pass and in the backward pass, an output head once.
    "gradients": those of the adapters, of which each device has its samples' part, are summed in a ring, so that each
    byte counts twice. What the axis `tensor` and the embeddings of tokens add is left out.

    Args:
        base: shapes of the frozen base.
        trained: bytes of one client's trained adapters.
        clients: clients that train side by side on a row of the mesh.
    """
    if mesh.fsdp == 1:
        return {"weights": 0, "gradients": 0}
    others, sizes = (mesh.fsdp - 1) / mesh.fsdp, {"layers": 0, "head": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(base["decoder"]):
        names = tuple(key.key for key in path)
        spec = base_spec(("decoder", *names), leaf.shape, mesh)
        if "fsdp" in spec and names[0] in sizes:
            sizes[names[0]] += mesh.fsdp * shard_elements(leaf.shape, spec, mesh) * leaf.dtype.itemsize
    return {"weights": int((2 * sizes["layers"] + sizes["head"]) * others),
            "gradients": int(2 * clients * trained * others)}
