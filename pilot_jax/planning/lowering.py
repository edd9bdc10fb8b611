"""Lowers every program of a run from shapes, for a mesh and a platform (such as TPU) that this machine may lack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from pilot_jax.config import Config
from pilot_jax.federation import combining, mixing
from pilot_jax.federation.chunks import chunk_width
from pilot_jax.federation.client import Adapters, ClientBatch, local_update
from pilot_jax.federation.distances import BY_GRAM
from pilot_jax.federation.halves import SKETCH_SIZE, measure
from pilot_jax.federation.phases import PLAIN_RULE, peak_rates, phase_spec
from pilot_jax.federation.roles import Tree
from pilot_jax.federation.shortlist import Nearest, most_pairs
from pilot_jax.federation.sparse import SparseRows
from pilot_jax.federation.strategies import Strategy
from pilot_jax.kernels import pairwise
from pilot_jax.kernels.attention import check_cudnn
from pilot_jax.models.connector import connector_stage
from pilot_jax.models.generate import Decoding, generate
from pilot_jax.models.lora import RESIDUAL
from pilot_jax.parallel.mesh import columns, make_mesh, on_clients, on_parts, replicated, sharded_shapes
from pilot_jax.planning.estimate import Shapes, data_shapes, finetuning_steps, phase_shapes, phase_steps, read_workload
from pilot_jax.runs.prepare import outline

CUDNN_CALLS = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and the shapes of the arguments that a run calls it with."""

    function: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def lower(self) -> jax.stages.Lowered:
        return self.function.lower(*self.arguments, **self.options)

    def export(self, platform: str) -> jax.export.Exported:
        """Returns the program as StableHLO for "tpu", "cuda" or "cpu"; portable unless it uses cuDNN attention."""
        allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in CUDNN_CALLS]
        return jax.export.export(self.function, platforms=(platform,), disabled_checks=allowed)(
            *self.arguments, **self.options)


def _struct(shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _stacked(tree: Tree, count: int) -> Tree:
    return jax.tree.map(lambda leaf: _struct((count, *leaf.shape), leaf.dtype), tree)


def _local(shapes: Shapes, mesh: Mesh, width: int, stage: str, tunes: bool = False) -> Program:
    """Returns the program that trains `width` clients for one phase, or `tunes` them after the last round."""
    run, work, roles = shapes.run, shapes.work, shapes.run.strategy.ownership()
    received, train = roles.names(scope="received"), run.train
    steps = max(finetuning_steps(run, work) if tunes else phase_steps(run, work, run.settings.local_steps))
    order, scalar = (steps, train.batch_size), _struct((), jnp.int32)

    def of_clients(tree: Tree) -> Tree:
        return on_clients(_stacked(tree, width), mesh)

    adapters = Adapters(of_clients({n: t for n, t in shapes.adapters.items() if n not in received}),
                        replicated({n: shapes.adapters[n] for n in received}, mesh))
    batch = ClientBatch(of_clients(data_shapes(run.spec, shapes.module.dtype, work, max(work.sizes))),
                        of_clients(_struct(order, jnp.int32)), of_clients(_struct(order)), of_clients(scalar),
                        of_clients(scalar), of_clients(jax.tree.map(lambda _: _struct(()), peak_rates(train, stage))))
    rule = PLAIN_RULE if tunes else run.strategy.local_rule()
    spec = phase_spec(shapes.module, roles, stage, train, rule)
    base = sharded_shapes(shapes.base, mesh, run.system.mesh)
    return Program(local_update, (spec, base, *adapters.divided(spec.received), batch),
                   {"mesh": mesh if mesh.size > 1 else None})


def _generation(shapes: Shapes, mesh: Mesh, width: int) -> Program:
    """Returns the program with which the models of `width` clients answer a batch of prompts each."""
    run, strategy = shapes.run, shapes.run.strategy
    stage, rows, settings = strategy.answering_stage or strategy.first_stages[-1], run.eval.batch_size, run.eval
    used = strategy.ownership().read_by_model(shapes.adapters, stage)
    batch = data_shapes(run.spec, shapes.module.dtype, shapes.work, rows)
    prompts = _stacked({n: batch[n] for n in ("input_ids", "attention_mask", "features")}, width)
    prompts["keys"] = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (width, rows)))
    arguments = (
        shapes.module, sharded_shapes(shapes.base, mesh, run.system.mesh),
        on_clients(_stacked(used, width), mesh),
        on_clients(prompts, mesh), on_clients(_struct((width,), jnp.int32), mesh))
    how = Decoding(settings.max_new_tokens, (2,), settings.temperature, settings.top_p)
    return Program(generate, arguments, {"stage": connector_stage(stage), "how": how})


def _server(shapes: Shapes, mesh: Mesh, cohort: int) -> dict[str, Program]:
    """Returns the server's programs for a cohort whose uploads are spread over the mesh.

    They are the mixing, for ATA the distances and the weights, and for split-half weights their measure."""
    strategy = shapes.run.strategy
    uploads = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(
            mesh, columns(leaf.shape, mesh))),
        _stacked(strategy.ownership().select(shapes.adapters, "shared"), cohort))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def whole(shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    ata, out = getattr(strategy.params, "ata", None), dict[str, Program]()
    matrix: Any = whole((cohort, cohort))
    if ata is not None:
        largest = max(jax.tree.leaves(uploads["text_adapter"]), key=lambda x: x.size)
        sketched = cohort > BY_GRAM and mesh.size == 1 and ata.space == "factors"
        options = {"neighbors": ata.neighbors, "weighting": ata.weighting, "temperature": ata.temperature,
                   "auto_factor": ata.auto_factor}
        number, sizes, room = whole((), jnp.int32), whole((cohort,)), max(cohort * (cohort - 1) // 2, 1)
        weights = Program(mixing.ata_weights, (matrix, sizes, whole((cohort,), jnp.int32)), options)
        if sketched and cohort > mixing.DENSE and not strategy.splits_halves:
            near, terms = (cohort, ata.neighbors), (cohort, ata.neighbors + 1)
            matrix, room = SparseRows(whole(terms), whole(terms, jnp.int32)), most_pairs(cohort, ata.neighbors)
            weights = Program(mixing.ata_weights_of_nearest, (Nearest(whole(near, jnp.int32), whole(near)), sizes),
                              options)
        pairs = whole((room,), jnp.int32)
        out = {"distances": Program(on_parts(pairwise.factor_pairs, (largest,), 3), (largest, pairs, pairs, number))}
        if not strategy.splits_halves:
            out["weights"] = weights
        if not sketched:
            out["gram"] = Program(on_parts(pairwise.factor_gram, (largest,)), (largest,))
    if strategy.splits_halves:
        out["measure"] = Program(measure, (whole((cohort, 2, SKETCH_SIZE)),))
    if strategy.params.combine != "factors":
        out["combine"] = _combine(strategy, shapes, uploads, whole)
    return out | {"mixing": Program(jax.jit(mixing.apply), (matrix, uploads))}


def _combine(strategy: Strategy, shapes: Shapes, uploads: Tree, whole: Callable[..., jax.ShapeDtypeStruct]) -> Program:
    """Returns the program of the strategy's way to make one LoRA of several. `whole`: shape → replicated array."""
    loras = uploads["text_adapter"]
    cohort = jax.tree.leaves(loras)[0].shape[0]
    rows = 1 if strategy.one_model else cohort

    def replicas(tree: Tree, *axis: int) -> Tree:
        return jax.tree.map(lambda leaf: whole((*axis, *leaf.shape)), tree)

    if strategy.params.combine == "product":
        return Program(combining.product, (whole((rows, cohort)), loras), {"terms": strategy.most_weights(cohort)})
    one = shapes.adapters["text_adapter"]
    if strategy.params.combine == "aligned":
        return Program(combining.aligned, (whole((rows, cohort)), loras, replicas(one, rows)))
    return Program(combining.residual, (whole((cohort,)), loras, replicas(shapes.adapters[RESIDUAL]), replicas(one)))


def programs(config: Config, **assumptions: int) -> dict[str, Program]:
    """Returns the programs that a run of `config` compiles, by name: local updates by stage, the server's, generation.

    Args:
        assumptions: arguments of `estimate.read_workload`.

    Raises:
        InputError: the mesh needs more devices than there are, or the config chooses cuDNN where it cannot run.
    """
    run = outline(config)
    work = read_workload(config, run, **assumptions)
    system, text, mesh = run.system, run.spec.text, make_mesh(run.system.mesh)
    if system.attention == "cudnn":
        check_cudnn(text.head_dim, text.layers_see_alike, run.model.dtype)
    shapes = phase_shapes(run, work)
    shapes = dataclasses.replace(shapes, module=shapes.module.clone(
        kernel=system.kernel, operands=run.model.operands, mesh=mesh if system.mesh.fsdp > 1 else None))
    width = chunk_width(system.chunk, len(work.sizes), mesh)
    cohort = min(run.settings.clients_per_round or len(work.sizes), len(work.sizes))
    out = {stage: _local(shapes, mesh, width, stage) for stage in dict.fromkeys(run.strategy.first_stages)}
    if finetuning_steps(run, work):
        out["finetuning"] = _local(shapes, mesh, width, run.strategy.first_stages[-1], tunes=True)
    return out | _server(shapes, mesh, cohort) | {"generation": _generation(shapes, mesh, width)}
