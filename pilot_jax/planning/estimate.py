"""Estimates a run's memory, FLOPs and bytes from shapes. No weights are read and no arrays are allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pilot_jax.config import Config, client_ranks
from pilot_jax.data.arrays import num_steps, round_up, training_length
from pilot_jax.data.conversations import encode
from pilot_jax.federation.chunks import chunk_width
from pilot_jax.federation.client import client_loss
from pilot_jax.federation.phases import phase_spec
from pilot_jax.federation.roles import Tree, num_bytes
from pilot_jax.kernels.backend import default_dtype
from pilot_jax.models.checkpoints.processors import has_tokenizer, load_tokenizer
from pilot_jax.models.checkpoints.tensor_names import base_shapes, stored_shapes
from pilot_jax.models.llama import empty_cache
from pilot_jax.models.pretrained import plain_connector
from pilot_jax.models.projectors import initial_projector
from pilot_jax.models.spec import VlmSpec
from pilot_jax.models.vlm import Vlm
from pilot_jax.parallel.mesh import AXES, base_spec, shard_elements
from pilot_jax.planning.flops import matmul_flops, saved_bytes
from pilot_jax.planning.server import server_costs
from pilot_jax.planning.traffic import step_traffic
from pilot_jax.runs.generated import GENERATED
from pilot_jax.runs.outline import Outline
from pilot_jax.runs.prepare import load_samples, outline
from pilot_jax.words import counted


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sizes that depend on the data."""

    sizes: tuple[int, ...]  # training samples of each client
    num_tasks: int  # T
    length: int  # L, tokens of the longest training sample, padded
    answers: int  # A, supervised tokens of the longest answer, padded
    ranks: tuple[int, ...] | None = None  # LoRA rank of each client, if they differ
    names: tuple[str, ...] = ()  # of the clients; empty if there are no data
    assumed: str = ""  # says which sizes are assumptions, because data or tokenizer are missing; "" if none


def read_workload(config: Config, run: Outline, *, samples: int = 1000, tasks: int = 3,
                  text_tokens: int = 128) -> Workload:
    """Returns the workload of the config's data. Where data or tokenizer are missing, the arguments are assumed.

    Args:
        run: the outline of the same config.
        samples: training samples per client.
        tasks: number of tasks, with three clients each unless `federation.clients` is set.
        text_tokens: text tokens of the longest sample, without its image tokens.
    """
    data, image_tokens = run.data, run.spec.num_image_tokens
    tokenized = has_tokenizer(run.text_directory)
    if data.path in GENERATED or Path(data.path).expanduser().exists():
        loaded = [s for s in load_samples(config) if s.split == "train"]
        names = sorted({s.client for s in loaded})
        counts = tuple(sum(s.client == name for s in loaded) for name in names)
        ranks = client_ranks(run.model.lora.rank, names)
        num_tasks = len({s.task for s in loaded})
        if tokenized:
            tokenizer = load_tokenizer(run.text_directory)
            length, answers = training_length([
                encode(tokenizer, s.turns, data.template, image_tokens, data.max_length) for s in loaded])
            return Workload(counts, num_tasks, length, answers, ranks, tuple(names))
        assumed = f"no tokenizer: {text_tokens} text tokens"
    else:
        counts, num_tasks, ranks, names = (samples,) * (run.settings.clients or 3 * tasks), tasks, None, []
        assumed = (f"no data at {data.path}: {counted(num_tasks, 'task')}, {counted(samples, 'sample')} per client, "
                   f"{text_tokens} text tokens")
    length = min(image_tokens + text_tokens, data.max_length)
    return Workload(counts, num_tasks, round_up(length, 8), round_up(text_tokens, 4), ranks, tuple(names), assumed)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes of all that a phase reads: base model, adapters and batch."""

    run: Outline
    work: Workload
    module: Vlm
    base: dict[str, Tree]
    adapters: dict[str, Tree]  # one client's
    batch: dict[str, jax.ShapeDtypeStruct]


def phase_shapes(run: Outline, work: Workload) -> Shapes:
    """Returns the shapes of a phase of a run whose data have the sizes `work`."""
    dtype = jnp.dtype(default_dtype() if run.model.dtype == "auto" else run.model.dtype)
    lora = run.model.lora
    module = Vlm(run.spec, lora.alpha / lora.largest, dtype, run.model.recomputes, run.system.unroll)
    base = stored_shapes(run.spec, dtype, run.model.base)
    if run.spec.projector is not None:
        base["projector"] = jax.eval_shape(lambda key: initial_projector(run.spec, key), jax.random.key(0))
    adapters = adapter_shapes(run, plain_connector(base), work.num_tasks)
    return Shapes(run, work, module, base, adapters, data_shapes(run.spec, dtype, work, run.train.batch_size))


def adapter_shapes(run: Outline, connector: Tree, num_tasks: int) -> dict[str, Tree]:
    """Returns the shapes of one client's adapters; `connector` has those of the base model's `plain_connector`."""
    rank = run.model.lora.largest

    def start(key: jax.Array, projector: Tree) -> dict[str, Tree]:
        return run.strategy.with_options(
            run.strategy.initial_adapters(key, projector, run.spec, rank, num_tasks), rank)

    return jax.eval_shape(start, jax.eval_shape(lambda: jax.random.key(0)), connector.get("projector", {}))


def data_shapes(spec: VlmSpec, dtype: DTypeLike, work: Workload, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of `rows` of a client's samples: all of its training arrays, or a batch of them.

    `data.arrays.ClientData` says what the arrays are."""
    shape, length, answers = jax.ShapeDtypeStruct, (rows, work.length), (rows, work.answers)
    return {"input_ids": shape(length, jnp.int32), "attention_mask": shape(length, jnp.int32),
            "target_positions": shape(answers, jnp.int32), "target_ids": shape(answers, jnp.int32),
            "target_weights": shape(answers, jnp.float32), "has_image": shape((rows,), jnp.float32),
            "features": shape((rows, spec.num_image_tokens, spec.feature_size), dtype)}


def _bytes(tree: Tree) -> int:
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def stage_loss_of(shapes: Shapes, stage: str) -> tuple[Callable[..., Any], dict[str, Tree], dict[str, Tree]]:
    """Returns (loss, trained, frozen): the loss as a function of (trained, frozen, base, batch), and both as shapes."""
    spec = phase_spec(shapes.module, shapes.run.strategy.ownership(), stage, shapes.run.train)
    trained, frozen = spec.split(shapes.adapters)

    def loss(trained: Tree, frozen: Tree, base: Tree, batch: Tree) -> jax.Array:
        return client_loss(spec, base, trained, frozen, batch, jnp.int32(0))[0]

    return loss, trained, frozen


def step_flops(shapes: Shapes, stage: str) -> int:
    """Returns the FLOPs of the matrix products of one client's step."""
    loss, trained, frozen = stage_loss_of(shapes, stage)
    return matmul_flops(jax.value_and_grad(loss), trained, frozen, shapes.base, shapes.batch)


def _activations(shapes: Shapes, stage: str) -> int:
    """Returns the bytes that one client's forward pass, of a microbatch if there is one, stores for the backward pass.

    Half a layer's activations are added for the gradients with respect to them, which the backward pass holds beside
    them (as XLA allocates on CPU); with rematerialisation, another layer's, which the backward pass recomputes."""
    train = shapes.run.train
    batch = data_shapes(shapes.run.spec, shapes.module.dtype, shapes.work, train.microbatch or train.batch_size)

    def stored(module: Vlm) -> int:
        loss, trained, frozen = stage_loss_of(dataclasses.replace(shapes, module=module), stage)
        return saved_bytes(loss, trained, frozen, shapes.base, batch)

    text, remat = shapes.run.spec.text, shapes.run.model.recomputes
    layer = stored(shapes.module.clone(remat=False)) // text.num_layers
    if shapes.run.system.attention == "cudnn":
        # What is traced is the package's own attention, which stores its weights, and its output in float32.
        rows, length = batch["input_ids"].shape
        size = shapes.module.dtype.itemsize
        layer -= rows * length * text.num_heads * (length * size + text.head_dim * (4 - size))
    return stored(shapes.module) + 3 * layer // 2 if remat else layer * text.num_layers + layer // 2


def _width(shapes: Shapes) -> int:
    """Returns how many clients train at the same time on one device."""
    mesh = shapes.run.system.mesh
    sizes = mesh.model_dump()
    abstract = jax.sharding.AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
    return chunk_width(shapes.run.system.chunk, len(shapes.work.sizes), abstract) // mesh.clients


def activations(shapes: Shapes) -> dict[str, int]:
    """Returns `_activations` of each stage."""
    return {stage: _activations(shapes, stage) for stage in dict.fromkeys(shapes.run.strategy.first_stages)}


def memory(shapes: Shapes, stored: dict[str, int] | None = None) -> dict[str, dict[str, int]]:
    """Returns the bytes per device by kind of array, for each stage and for generation.

    stored: the `activations`, if they are known; they take longest to count.

    Activations are not divided among fsdp and tensor devices, so that they are an upper bound on such a mesh.
    """
    run, work, width, dtype = shapes.run, shapes.work, _width(shapes), shapes.module.dtype
    mesh, roles, at_once = run.system.mesh, run.strategy.ownership(), run.system.steps_at_once
    base = sum(shard_elements(leaf.shape, base_spec(tuple(k.key for k in path), leaf.shape, mesh), mesh)
               * leaf.dtype.itemsize
               for path, leaf in jax.tree_util.tree_leaves_with_path(shapes.base))
    received = num_bytes(roles.select(shapes.adapters, "received"))
    adapters = width * (num_bytes(shapes.adapters) - received) + received
    # All of a client's samples, or those of `system.steps_at_once` steps.
    rows = max(work.sizes) if at_once is None else at_once * run.train.batch_size
    out, stored = {}, activations(shapes) if stored is None else stored
    for stage in dict.fromkeys(run.strategy.first_stages):
        trained = num_bytes([shapes.adapters[n] for n in roles.names(stage=stage, mode="trained")])
        out[stage] = {
            "base": base, "adapters": adapters, "optimizer": 2 * width * trained, "gradients": width * trained,
            "data": width * _bytes(data_shapes(run.spec, dtype, work, rows)),
            "activations": width * stored[stage]}
    slots = work.length + run.eval.max_new_tokens
    cache = jax.eval_shape(lambda: empty_cache(run.spec.text, run.eval.batch_size, slots, dtype))
    out["generation"] = {"base": base, "adapters": adapters, "cache": width * _bytes(cache)}
    return {name: kinds | {"total": sum(kinds.values())} for name, kinds in out.items()}


def _feature_flops(shapes: Shapes) -> int:
    """Returns the FLOPs of the vision tower for one image; 0 if there is none."""
    if shapes.run.spec.vision is None:
        return 0
    side = shapes.run.spec.vision.image_size
    return matmul_flops(
        lambda base, x: shapes.module.apply({"params": {"vision_tower": base["vision_tower"]}}, x, method="features"),
        shapes.base, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))


def phase_steps(run: Outline, work: Workload, local_steps: int | None) -> list[int]:
    """Returns the steps of each client's phase: `local_steps` if given, else those of the config's epochs."""
    names = work.names or ("",) * len(work.sizes)
    return [num_steps(size, run.train.of_client(name).batch_size, run.settings.local_epochs, local_steps)
            for name, size in zip(names, work.sizes, strict=True)]


def finetuning_steps(run: Outline, work: Workload) -> list[int]:
    """Returns the steps of each client's fine-tuning after the last round; no number if there is none."""
    settings = run.settings
    if settings.finetune_steps is None and not run.strategy.finetunes:
        return []
    return phase_steps(run, work, settings.finetune_steps or settings.local_steps)


def _bytes_a_phase(run: Outline, work: Workload, shapes: Shapes, stage: str, direction: int) -> float:
    """Returns the mean bytes that a client uploads (direction 0) or downloads (1) in a phase."""
    largest = run.model.lora.largest
    return float(np.mean([sum(run.strategy.traffic(shapes.adapters, stage, rank, largest)[direction].values())
                          for rank in work.ranks or (largest,)]))


def _traffic(shapes: Shapes, stage: str) -> dict[str, int]:
    """Returns `step_traffic` of a stage."""
    trained = shapes.run.strategy.ownership().names(stage=stage, mode="trained")
    return step_traffic(shapes.base, num_bytes([shapes.adapters[n] for n in trained]), _width(shapes),
                        shapes.run.system.mesh)


def _base_parameters(shapes: Shapes) -> int:
    """Returns the number of the base's parameters, however they are stored."""
    counted = base_shapes(shapes.run.spec) | {n: t for n, t in shapes.base.items() if n == "projector"}
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(counted))


def make_plan(config: Config, **assumptions: int) -> dict[str, Any]:
    """Returns the plan that `pilot-jax plan --json` prints; `assumptions` are arguments of `read_workload`.

    Raises:
        InputError: there is no config.json at model.path, or the data cannot be read.
    """
    run = outline(config)
    work = read_workload(config, run, **assumptions)
    shapes, settings, strategy = phase_shapes(run, work), run.settings, run.strategy
    steps = phase_steps(run, work, settings.local_steps)
    cohort = min(settings.clients_per_round or len(steps), len(steps))
    per_round = sum(steps) * cohort / len(steps)
    flops = {stage: step_flops(shapes, stage) for stage in dict.fromkeys(strategy.first_stages)}
    up, down = ({stage: _bytes_a_phase(run, work, shapes, stage, way) for stage in flops} for way in (0, 1))
    rounds = {"round_1": strategy.stages(True, 1), "later_rounds": strategy.stages(False, 2)}
    tuning = sum(finetuning_steps(run, work))

    def by_round(of: Callable[[tuple[str, ...]], int], finetuning: int) -> dict[str, int]:
        """Returns an amount, which depends on the stages of a round, for each kind of round and for fine-tuning."""
        return {name: of(stages) for name, stages in rounds.items()} | ({"finetuning": finetuning} if tuning else {})

    return {
        "clients": len(steps), "tasks": work.num_tasks, "rounds": settings.rounds, "assumed": work.assumed,
        "image_tokens": run.spec.num_image_tokens, "longest_sequence": work.length,
        "parameters": {"base": _base_parameters(shapes),
                       **{n: num_bytes(t) // 4 for n, t in shapes.adapters.items()}},
        "devices": run.system.mesh.devices, "memory_per_device": memory(shapes),
        "bytes_between_devices_per_step": {stage: _traffic(shapes, stage) for stage in flops},
        "flops_per_client_step": flops, "flops_features": _feature_flops(shapes) * sum(work.sizes),
        "client_steps": by_round(lambda stages: round(per_round * len(stages)), tuning),
        "flops": by_round(lambda stages: int(per_round * sum(flops[s] for s in stages)),
                          tuning * flops[rounds["later_rounds"][-1]]),
        "bytes_up": by_round(lambda stages: round(cohort * sum(up[s] for s in stages)), 0),
        "bytes_down": by_round(lambda stages: round(cohort * sum(down[s] for s in stages)), 0),
        "server": server_costs(strategy, shapes.adapters, cohort),
    }
