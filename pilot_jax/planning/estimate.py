"""What a run will need, from shapes alone: memory by kind, FLOPs, bytes. No weights are read, nothing is allocated."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pilot_jax.config import Config
from pilot_jax.data.arrays import num_steps, training_length
from pilot_jax.data.conversations import encode
from pilot_jax.federation.client import Phase, client_loss
from pilot_jax.federation.roles import num_bytes
from pilot_jax.federation.strategies import make_strategy
from pilot_jax.federation.strategies.base import Strategy
from pilot_jax.models.checkpoints.processors import load_tokenizer
from pilot_jax.models.checkpoints.tensor_names import base_shapes
from pilot_jax.models.llama import empty_cache
from pilot_jax.models.pretrained import read_shapes
from pilot_jax.models.spec import VlmSpec
from pilot_jax.models.vlm import Vlm
from pilot_jax.parallel.mesh import base_spec, shard_elements
from pilot_jax.planning.flops import matmul_flops, saved_bytes
from pilot_jax.runs.prepare import load_samples


@dataclasses.dataclass(frozen=True)
class Workload:
    """The sizes that data decide."""

    sizes: tuple[int, ...]  # training samples of each client
    num_tasks: int  # T
    length: int  # L, tokens of the longest training sample, padded
    answers: int  # A, supervised tokens of the longest answer, padded
    assumed: str = ""  # what was not read from data


def read_workload(config: Config, model: VlmSpec, text_directory: Path, *, samples: int = 1000, tasks: int = 3,
                  text_tokens: int = 128) -> Workload:
    """From the config's data where they and the tokenizer are there, else from these assumptions.

    Args:
        samples: per client. text_tokens: of the longest sample, beside its image.
    """
    tokenized = any((text_directory / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    if config.data.path == "digits" or Path(config.data.path).expanduser().exists():
        loaded = [s for s in load_samples(config) if s.split == "train"]
        names = sorted({s.client for s in loaded})
        counts = tuple(sum(s.client == n for s in loaded) for n in names)
        num_tasks = len({s.task for s in loaded})
        if tokenized:
            tokenizer = load_tokenizer(text_directory)
            length, answers = training_length([
                encode(tokenizer, s.turns, config.data.template, model.num_image_tokens, config.data.max_length)
                for s in loaded])
            return Workload(counts, num_tasks, length, answers)
        assumed = f"no tokenizer: {text_tokens} text tokens"
    else:
        counts, num_tasks = (samples,) * (config.federation.clients or 3 * tasks), tasks
        assumed = (f"no data at {config.data.path}: {num_tasks} tasks, {samples} samples per client, "
                   f"{text_tokens} text tokens")
    length = min(model.num_image_tokens + text_tokens, config.data.max_length)
    return Workload(counts, num_tasks, -(-length // 8) * 8, -(-text_tokens // 4) * 4, assumed)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Everything a phase reads, as shapes."""

    module: Vlm
    model: VlmSpec
    base: dict[str, Any]
    adapters: dict[str, Any]  # one client's
    strategy: Strategy
    batch: dict[str, Any]


def phase_shapes(config: Config, model: VlmSpec, work: Workload) -> Shapes:
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    dtype = jnp.dtype(auto if config.model.dtype == "auto" else config.model.dtype)
    lora = config.model.lora
    module = Vlm(model, lora.alpha / lora.rank, dtype, config.model.remat, config.system.unroll)
    base = {name: jax.tree.map(lambda leaf, n=name: jax.ShapeDtypeStruct(
        leaf.shape, jnp.float32 if n == "projector" else dtype), tree) for name, tree in base_shapes(model).items()}
    strategy = make_strategy(config.strategy, config.federation.schedule)
    adapters = jax.eval_shape(
        lambda key, projector: strategy.initial_adapters(key, projector, model, lora.rank, work.num_tasks),
        jax.eval_shape(lambda: jax.random.key(0)), base["projector"])
    return Shapes(module, model, base, adapters, strategy, data_shapes(model, dtype, work, config.train.batch_size))


def data_shapes(model: VlmSpec, dtype: Any, work: Workload, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A client's training arrays, or a batch of them, `rows` long; see `data.batches.ClientData`."""
    shape, length, answers = jax.ShapeDtypeStruct, (rows, work.length), (rows, work.answers)
    return {"input_ids": shape(length, jnp.int32), "attention_mask": shape(length, jnp.int32),
            "target_positions": shape(answers, jnp.int32), "target_ids": shape(answers, jnp.int32),
            "target_weights": shape(answers, jnp.float32), "has_image": shape((rows,), jnp.float32),
            "features": shape((rows, model.num_image_tokens, model.vision.feature_size), dtype)}


def _bytes(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def stage_loss_of(shapes: Shapes, config: Config, stage: str) -> tuple[Any, dict, dict]:
    """(loss of a batch as a function of (trained, frozen, base, batch), trained, frozen)."""
    phase = Phase(shapes.module, shapes.strategy.roles(), stage, config.train)
    trained, frozen = phase.roles.split(shapes.adapters, stage)

    def loss(trained, frozen, base, batch):
        return client_loss(phase, base, trained, frozen, batch, jnp.int32(0))[0]

    return loss, trained, frozen


def _activations(shapes: Shapes, config: Config, stage: str) -> int:
    """What one client's forward pass keeps; with rematerialisation also one layer, recomputed in the backward pass."""
    def kept(module: Vlm) -> int:
        loss, trained, frozen = stage_loss_of(dataclasses.replace(shapes, module=module), config, stage)
        return saved_bytes(loss, trained, frozen, shapes.base, shapes.batch)

    if not config.model.remat:
        return kept(shapes.module)
    plain = kept(shapes.module.clone(remat=False))
    return kept(shapes.module) + plain // shapes.model.text.num_layers


def memory(config: Config, shapes: Shapes, work: Workload) -> dict[str, dict[str, int]]:
    """Bytes per device by kind, for each stage and for generation.

    Activations are not divided among fsdp and tensor devices: an upper bound there.
    """
    mesh, roles = config.system.mesh, shapes.strategy.roles()
    width = min(config.system.client_chunk, -(-len(work.sizes) // mesh.clients))  # clients on one device
    base = sum(shard_elements(leaf.shape, base_spec(tuple(k.key for k in path), leaf.shape, mesh), mesh)
               * leaf.dtype.itemsize
               for path, leaf in jax.tree_util.tree_leaves_with_path(shapes.base))
    received = num_bytes(roles.select(shapes.adapters, "received"))
    own = num_bytes(shapes.adapters) - received
    dtype, at_once = shapes.module.dtype, config.system.steps_at_once
    # A client's samples, or those of the steps that are on the devices at once.
    rows = max(work.sizes) if at_once is None else at_once * config.train.batch_size
    out = {}
    for stage in dict.fromkeys(shapes.strategy.first_stages):
        trained = num_bytes(roles.split(shapes.adapters, stage)[0])
        out[stage] = {
            "base": base, "adapters": width * own + received, "optimizer": 2 * width * trained,
            "gradients": width * trained, "data": width * _bytes(data_shapes(shapes.model, dtype, work, rows)),
            "activations": width * _activations(shapes, config, stage)}
    slots = work.length + config.eval.max_new_tokens
    cache = jax.eval_shape(lambda: empty_cache(shapes.model.text, config.eval.batch_size, slots, dtype))
    out["generation"] = {"base": base, "adapters": width * own + received, "cache": width * _bytes(cache)}
    return {name: kinds | {"total": sum(kinds.values())} for name, kinds in out.items()}


def make_plan(config: Config, **assumptions: int) -> dict[str, Any]:
    """The whole plan as plain numbers; `assumptions` as in `read_workload`.

    Raises:
        InputError: no config.json at model.path, or data that cannot be read.
    """
    model, text_directory = read_shapes(config.model)
    work = read_workload(config, model, text_directory, **assumptions)
    shapes = phase_shapes(config, model, work)
    fl, train, strategy = config.federation, config.train, shapes.strategy
    steps = [num_steps(n, train.batch_size, fl.local_epochs, fl.local_steps) for n in work.sizes]
    cohort = min(fl.clients_per_round or len(steps), len(steps))
    per_round = sum(steps) * cohort / len(steps)
    step_flops = {}
    for stage in dict.fromkeys(strategy.first_stages):
        loss, trained, frozen = stage_loss_of(shapes, config, stage)
        step_flops[stage] = matmul_flops(jax.value_and_grad(loss), trained, frozen, shapes.base, shapes.batch)
    pixels = jax.ShapeDtypeStruct((1, model.vision.image_size, model.vision.image_size, 3), jnp.float32)
    tower = matmul_flops(
        lambda base, x: shapes.module.apply({"params": {"vision_tower": base["vision_tower"]}}, x, method="features"),
        shapes.base, pixels)
    up, down = (sum(b.values()) for b in strategy.sent_bytes(shapes.adapters))
    first, later = strategy.stages(True, 1), strategy.stages(False, 2)
    return {
        "clients": len(steps), "tasks": work.num_tasks, "rounds": fl.rounds, "assumed": work.assumed,
        "image_tokens": model.num_image_tokens, "longest_sequence": work.length,
        "parameters": {"base": sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes.base)),
                       **{n: num_bytes(t) // 4 for n, t in shapes.adapters.items()}},
        "devices": config.system.mesh.devices, "memory_per_device": memory(config, shapes, work),
        "flops_per_client_step": step_flops, "flops_features": tower * sum(work.sizes),
        "client_steps": {"round_1": round(per_round * len(first)), "later_rounds": round(per_round * len(later))},
        "flops": {"round_1": int(per_round * sum(step_flops[s] for s in first)),
                  "later_rounds": int(per_round * sum(step_flops[s] for s in later))},
        "bytes_up": {"round_1": up * cohort * len(first), "later_rounds": up * cohort * len(later)},
        "bytes_down": {"round_1": down * cohort * len(first), "later_rounds": down * cohort * len(later)},
    }
