"""The local update: one compiled program per phase for a chunk of clients, all its steps in one loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from pilot_jax.config import TrainConfig
from pilot_jax.federation.objectives import stage_loss
from pilot_jax.federation.roles import Roles
from pilot_jax.models.vlm import Vlm, variables


@dataclasses.dataclass(frozen=True)
class Phase:
    """What is static about a phase: hashable, so that each distinct one compiles once."""

    module: Vlm
    roles: Roles
    stage: str
    train: TrainConfig

    def __hash__(self) -> int:  # Roles and TrainConfig hold mappings; names and numbers identify them
        return hash((self.module, self.stage, self.train.model_dump_json()))


def learning_rate(peak: float, warmup: float, step: jax.Array, total: jax.Array) -> jax.Array:
    """peak · min(1, (i+1)/w) · ½(1+cos(π·i/S_k)), w = max(1, ⌈warmup·S_k⌉); `total` is the client's own S_k."""
    total = jnp.maximum(total, 1).astype(jnp.float32)
    ramp = jnp.maximum(1.0, jnp.ceil(warmup * total))
    step = step.astype(jnp.float32)
    return peak * jnp.minimum(1.0, (step + 1) / ramp) * 0.5 * (1 + jnp.cos(jnp.pi * step / total))


def make_optimizer(train: TrainConfig, stage: str, labels: Mapping[str, Any],
                   total_steps: jax.Array) -> optax.GradientTransformation:
    """One transformation per label. `total_steps` may be traced: each vmapped client has its own schedule."""

    def one(peak: float) -> optax.GradientTransformation:
        schedule = partial(_schedule, peak, train.warmup, total_steps)
        if train.optimizer == "sgd":
            return optax.sgd(schedule)
        return optax.adamw(schedule, eps=train.adam_epsilon, weight_decay=train.weight_decay)

    lora = train.lr_lora_stage2 if stage == "stage2" else train.lr_lora_stage1
    return optax.partition({"lora": one(lora), "connector": one(train.lr_connector)}, labels)


def _schedule(peak: float, warmup: float, total: jax.Array, count: jax.Array) -> jax.Array:
    return learning_rate(peak, warmup, count, total)


def gather_batch(data: Mapping[str, jax.Array], rows: jax.Array, real: jax.Array) -> dict[str, jax.Array]:
    """Rows [B] of one client's arrays; padding rows get weight 0 everywhere."""
    batch = {name: array[rows] for name, array in data.items()}
    batch["target_weights"] = batch["target_weights"] * real[:, None]
    batch["has_image"] = batch["has_image"] * real
    return batch


def client_loss(phase: Phase, base: Mapping, trained: Mapping, frozen: Mapping, batch: Mapping,
                task_index: jax.Array) -> tuple[jax.Array, dict]:
    """Loss and its terms for one client's batch."""
    logits, aux = phase.module.apply(variables(base, {**trained, **frozen}), batch, phase.stage, task_index,
                                     method="target_logits")
    return stage_loss(logits, aux, batch, phase.stage, phase.train)


@partial(jax.jit, static_argnames=("phase", "mesh"))
def local_update(phase: Phase, base: Mapping, adapters: Mapping, received: Mapping, data: Mapping, order: jax.Array,
                 real: jax.Array, steps: jax.Array, task_index: jax.Array,
                 mesh: jax.sharding.Mesh | None = None) -> tuple[dict, dict]:
    """`_local_update`, the chunk's clients dealt to the devices of `mesh` (axis "clients"), if there is one.

    Clients need nothing of each other, so the devices do not communicate.
    """
    update = partial(_local_update, phase)
    if mesh is not None:
        own, all_ = PartitionSpec("clients"), PartitionSpec()
        update = jax.shard_map(update, mesh=mesh, in_specs=(all_, own, all_, own, own, own, own, own),
                               out_specs=own, check_vma=False)
    return update(base, adapters, received, data, order, real, steps, task_index)


def _local_update(phase: Phase, base: Mapping, adapters: Mapping, received: Mapping, data: Mapping, order: jax.Array,
                 real: jax.Array, steps: jax.Array, task_index: jax.Array) -> tuple[dict, dict]:
    """Train a chunk of k clients for one phase.

    Args:
        base: frozen weights, shared by all (an argument: never vmapped, never closed over).
        adapters: leaves [k, …], without the received subtrees. received: leaves without a client axis.
        data: arrays [k, n_max, …], see `data.batches.ClientData`. order, real: [k, S_max, B]. steps: int32 [k], S_k.
        task_index: int32 [k].

    Returns: adapters [k, …], and the terms of the loss averaged over each client's own steps, plus the last step's
        loss (`last_loss`), [k]. A step beyond S_k changes nothing: parameters, moments and schedule count included.
    """
    roles, stage = phase.roles, phase.stage
    trained, frozen = roles.split({**adapters, **received}, stage)
    own_frozen = {n: t for n, t in frozen.items() if n not in received}
    labels = roles.labels(trained)
    init = jax.vmap(lambda tree, total: make_optimizer(phase.train, stage, labels, total).init(tree))
    update = jax.vmap(lambda grads, state, tree, total:
                      make_optimizer(phase.train, stage, labels, total).update(grads, state, tree))

    def total_loss(trained, batch):
        # The gradient of the clients' summed loss is every client's own gradient: they share no trained leaf.
        def one(trained, own_frozen, batch, task):
            return client_loss(phase, base, trained, {**own_frozen, **_frozen_received}, batch, task)

        losses, terms = jax.vmap(one)(trained, own_frozen, batch, task_index)
        return jnp.sum(losses), terms

    _frozen_received = {n: t for n, t in frozen.items() if n in received}
    grad = jax.grad(total_loss, has_aux=True)

    def step(index, carry):
        trained, state, sums = carry
        batch = jax.vmap(gather_batch)(data, order[:, index], real[:, index])
        grads, terms = grad(trained, batch)
        updates, new_state = update(grads, state, trained, steps)
        active = index < steps  # [k]

        def keep(new, old):
            return jnp.where(active.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        new_trained = jax.tree.map(keep, optax.apply_updates(trained, updates), trained)
        new_state = jax.tree.map(keep, new_state, state)
        sums = {n: sums[n] + jnp.where(active, terms[n], 0.0) for n in terms} | {
            "last_loss": keep(terms["loss"], sums["last_loss"])}
        return new_trained, new_state, sums

    shapes = jax.eval_shape(lambda: grad(trained, jax.vmap(gather_batch)(data, order[:, 0], real[:, 0]))[1])
    sums = {name: jnp.zeros(len(steps)) for name in [*shapes, "last_loss"]}
    # As many steps as the chunk's longest client has, not as the arrays have room for.
    trained, _, sums = jax.lax.fori_loop(0, jnp.max(steps), step, (trained, init(trained, steps), sums))
    count = jnp.maximum(steps, 1)
    metrics = {name: value if name == "last_loss" else value / count for name, value in sums.items()}
    return {**adapters, **trained}, metrics
