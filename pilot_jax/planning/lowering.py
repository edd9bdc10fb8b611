"""Every program of a run, lowered from shapes for a mesh and a platform that need not be there: TPU from a laptop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from pilot_jax.config import Config
from pilot_jax.data.arrays import num_steps
from pilot_jax.federation import mixing
from pilot_jax.federation.client import Phase, local_update, peak_rates
from pilot_jax.kernels import pairwise
from pilot_jax.kernels.attention import check_cudnn
from pilot_jax.models.generate import Decoding, generate
from pilot_jax.models.pretrained import read_shapes
from pilot_jax.parallel.mesh import columns, make_mesh, on_clients, on_parts, replicated, sharded_shapes
from pilot_jax.planning.estimate import Shapes, Workload, data_shapes, phase_shapes, read_workload

CUDNN_CALLS = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and the shapes it is called with."""

    function: Any  # jitted
    arguments: tuple
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def lower(self) -> jax.stages.Lowered:
        return self.function.lower(*self.arguments, **self.options)

    def export(self, platform: str) -> jax.export.Exported:
        """The portable program (StableHLO) for "tpu", "cuda" or "cpu"; portable but for cuDNN's attention."""
        allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in CUDNN_CALLS]
        return jax.export.export(self.function, platforms=(platform,), disabled_checks=allowed)(
            *self.arguments, **self.options)


def _struct(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _stacked(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda leaf: _struct((count, *leaf.shape), leaf.dtype), tree)


def _local(config: Config, shapes: Shapes, work: Workload, mesh: jax.sharding.Mesh, width: int, stage: str) -> Program:
    roles, train, fl = shapes.strategy.roles(), config.train, config.federation
    received = roles.names(scope="received")
    steps = max(num_steps(n, train.batch_size, fl.local_epochs, fl.local_steps) for n in work.sizes)
    order, count = (steps, train.batch_size), _struct((), jnp.int32)

    def chunk(tree: Any) -> Any:
        return on_clients(_stacked(tree, width), mesh)

    arguments = (
        Phase(shapes.module, roles, stage, train, shapes.strategy.local_rule()),
        sharded_shapes(shapes.base, mesh, config.system.mesh),
        chunk({n: t for n, t in shapes.adapters.items() if n not in received}),
        replicated({n: shapes.adapters[n] for n in received}, mesh),
        chunk(data_shapes(shapes.model, shapes.module.dtype, work, max(work.sizes))),
        chunk(_struct(order, jnp.int32)), chunk(_struct(order)), chunk(count), chunk(count),
        chunk(jax.tree.map(lambda _: _struct(()), peak_rates(train, stage))))
    return Program(local_update, arguments, {"mesh": mesh if mesh.size > 1 else None})


def _generation(config: Config, shapes: Shapes, work: Workload, mesh: jax.sharding.Mesh, width: int) -> Program:
    roles, stage, rows = shapes.strategy.roles(), shapes.strategy.first_stages[-1], config.eval.batch_size
    used = roles.names(stage=stage, mode="trained") + roles.names(stage=stage, mode="frozen")
    batch = data_shapes(shapes.model, shapes.module.dtype, work, rows)
    prompts = {n: batch[n] for n in ("input_ids", "attention_mask", "features")}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (width, rows)))
    arguments = (
        shapes.module, sharded_shapes(shapes.base, mesh, config.system.mesh),
        on_clients(_stacked({n: shapes.adapters[n] for n in used}, width), mesh),
        on_clients(_stacked(prompts, width), mesh), on_clients(_struct((width,), jnp.int32), mesh),
        on_clients(keys, mesh))
    how = Decoding(config.eval.max_new_tokens, (2,), config.eval.temperature, config.eval.top_p)
    return Program(generate, arguments, {"stage": stage, "how": how})


def _server(config: Config, shapes: Shapes, mesh: jax.sharding.Mesh, cohort: int) -> dict[str, Program]:
    """Distances, weights and mixed adapters of a cohort, its uploads spread over the mesh."""
    uploads = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(
            mesh, columns(leaf.shape, mesh))),
        _stacked(shapes.strategy.roles().select(shapes.adapters, "shared"), cohort))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def whole(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    matrix = whole((cohort, cohort))
    out = {"mixing": Program(jax.jit(mixing.apply), (matrix, uploads))}
    if "layers" in uploads.get("text_adapter", {}):
        ata, largest = config.strategy.ata, max(jax.tree.leaves(uploads["text_adapter"]), key=lambda x: x.size)
        pairs = whole((max(cohort * (cohort - 1) // 2, 1),), jnp.int32)
        weights = partial(mixing.ata_weights, neighbors=ata.neighbors, weighting=ata.weighting,
                          temperature=ata.temperature, auto_factor=ata.auto_factor)
        out |= {
            "gram": Program(on_parts(pairwise._factor_gram, (largest,)), (largest,)),
            "distances": Program(on_parts(pairwise._factor_pairs, (largest,), 3),
                                 (largest, pairs, pairs, whole((), jnp.int32))),
            "weights": Program(jax.jit(weights), (matrix, whole((cohort,)), whole((cohort,), jnp.int32)))}
    return out


def programs(config: Config, **assumptions: int) -> dict[str, Program]:
    """What a run of `config` compiles, by name: each stage's local update, the server's programs, generation.

    Args:
        assumptions: as in `plan.read_workload`.

    Raises:
        InputError: the mesh needs more devices than there are, or the config asks for cuDNN where it is not.
    """
    model, text_directory = read_shapes(config.model)
    work = read_workload(config, model, text_directory, **assumptions)
    shapes, mesh = phase_shapes(config, model, work), make_mesh(config.system.mesh)
    if config.system.attention == "cudnn":
        check_cudnn(model.text, config.model.dtype)
    shapes = dataclasses.replace(shapes, module=shapes.module.clone(kernel=config.system.attention))
    rows = mesh.shape["clients"]
    width = rows * min(config.system.client_chunk, -(-len(work.sizes) // rows))
    cohort = min(config.federation.clients_per_round or len(work.sizes), len(work.sizes))
    out = {stage: _local(config, shapes, work, mesh, width, stage)
           for stage in dict.fromkeys(shapes.strategy.first_stages)}
    return out | _server(config, shapes, mesh, cohort) | {
        "generation": _generation(config, shapes, work, mesh, width)}
