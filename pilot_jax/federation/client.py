"""The local update: one compiled program per phase for a chunk of clients, all its steps in one loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from pilot_jax.config import TrainConfig
from pilot_jax.federation.losses import stage_loss
from pilot_jax.federation.roles import Roles
from pilot_jax.models.vlm import Vlm, variables


@dataclasses.dataclass(frozen=True)
class LocalRule:
    """What a strategy changes in its clients' steps. Subclasses are frozen dataclasses: their values are compiled in.

    `start` is what the phase began with, `carried` the client's subtrees of mode "carried" (SCAFFOLD's controls).
    """

    averages_gradients: bool = False  # whether `carry` needs the mean gradient

    def gradient(self, gradient: Any, trained: Any, start: Any, carried: Mapping[str, Any]) -> Any:
        """The direction the optimizer gets instead of `gradient`: trees of one client, as `trained`."""
        return gradient

    def carry(self, mean_gradient: Any, carried: Mapping[str, Any]) -> dict[str, Any]:
        """The carried subtrees after the phase. `mean_gradient`: the loss's own, over the client's steps."""
        return dict(carried)


PLAIN_RULE = LocalRule()


@dataclasses.dataclass(frozen=True, eq=False)
class Phase:
    """What is static about a phase. Phases that train alike are equal, so that they share one compiled program:
    learning rates are arguments, and of the roles only who trains counts."""

    module: Vlm
    roles: Roles
    stage: str
    train: TrainConfig
    rule: LocalRule = PLAIN_RULE

    @property
    def _key(self) -> tuple:
        # What is no part of the program at its default: rates, and the keys of other stages' losses.
        foreign = [key for stage, keys in LOSS_KEYS.items() if stage != self.stage for key in keys]
        train = self.train.model_copy(update={n: TrainConfig.model_fields[n].default for n in (*RATES, *foreign)})
        modes = tuple((row.subtree, row.modes.get(self.stage), row.scope == "received")
                      for row in self.roles.adapter_rows)
        return self.module, modes, self.stage, train.model_dump_json(), self.rule

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Phase) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


RATES = ("lr_connector", "lr_lora_stage1", "lr_lora_stage2")
LOSS_KEYS = {"stage1": ("lambda_d", "ld_mode", "ld_center"), "stage2": ("lambda_b", "lambda_z")}


def peak_rates(train: TrainConfig, stage: str) -> dict[str, float]:
    """Peak learning rate of each optimizer label. Plain LLaVA training takes stage 1's."""
    return {"connector": train.lr_connector,
            "lora": train.lr_lora_stage2 if stage == "stage2" else train.lr_lora_stage1}


def learning_rate(peak: float | jax.Array, warmup: float, step: jax.Array, total: jax.Array) -> jax.Array:
    """peak · min(1, (i+1)/w) · ½(1+cos(π·i/S_k)), w = max(1, ⌈warmup·S_k⌉); `total` is the client's own S_k."""
    total = jnp.maximum(total, 1).astype(jnp.float32)
    ramp = jnp.maximum(1.0, jnp.ceil(warmup * total))
    step = step.astype(jnp.float32)
    return peak * jnp.minimum(1.0, (step + 1) / ramp) * 0.5 * (1 + jnp.cos(jnp.pi * step / total))


def make_optimizer(train: TrainConfig, labels: Mapping[str, Any], total_steps: jax.Array,
                   rates: Mapping[str, jax.Array]) -> optax.GradientTransformation:
    """One transformation per label. `total_steps` and the peak rates may be traced: each vmapped client has its own
    schedule."""

    def one(peak: jax.Array) -> optax.GradientTransformation:
        schedule = partial(_schedule, peak, train.warmup, total_steps)
        if train.optimizer == "sgd":
            return optax.sgd(schedule)
        return optax.adamw(schedule, eps=train.adam_epsilon, weight_decay=train.weight_decay)

    return optax.partition({name: one(peak) for name, peak in rates.items()}, labels)


def _schedule(peak: jax.Array, warmup: float, total: jax.Array, count: jax.Array) -> jax.Array:
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
    logits, aux = cast(Any, phase.module).apply(variables(base, {**trained, **frozen}), batch, phase.stage, task_index,
                                     method="target_logits")
    return stage_loss(logits, aux, batch, phase.stage, phase.train)


@partial(jax.jit, static_argnames=("phase", "mesh", "own_received"))
def local_update(phase: Phase, base: Mapping, adapters: Mapping, received: Mapping, data: Mapping, order: jax.Array,
                 real: jax.Array, steps: jax.Array, task_index: jax.Array, rates: Mapping[str, jax.Array],
                 mesh: jax.sharding.Mesh | None = None, own_received: bool = False) -> tuple[dict, dict]:
    """`_local_update`, the chunk's clients dealt to the rows of `mesh` (axis "clients"), if there is one.

    Clients need nothing of each other. Where a row is one device, the devices run on their own, each as long as its own
    longest client; where "fsdp" or "tensor" has several, XLA spreads the work over them as the base's and the batch's
    (over "fsdp") shardings suggest.
    """
    return _dealt(partial(_local_update, phase, own_received), mesh, own_received, base, adapters, received, data,
                  order, real, steps, task_index, rates)


@partial(jax.jit, static_argnames=("phase", "mesh", "own_received"))
def begin_update(phase: Phase, *arrays: Any, mesh: jax.sharding.Mesh | None = None, own_received: bool = False) -> Any:
    """What a local update carries from part to part, at its start. `arrays`: those of `local_update`."""
    def begin(row: jax.sharding.Mesh | None, base: Mapping, adapters: Mapping, received: Mapping, data: Mapping,
              order: jax.Array, real: jax.Array, *rest: Any) -> Any:
        return _chunk(phase, own_received, row, base, adapters, received, *rest).begin(data, order, real)

    return _dealt(begin, mesh, own_received, *arrays)


@partial(jax.jit, static_argnames=("phase", "mesh", "own_received"), donate_argnums=1)
def continue_update(phase: Phase, carry: Any, offset: jax.Array, *arrays: Any, mesh: jax.sharding.Mesh | None = None,
                    own_received: bool = False) -> Any:
    """The carry after some more steps: `data`, `order` and `real` among the arrays are those of steps `offset` and
    on alone, so that no more than these need be on the device."""
    def go_on(row: jax.sharding.Mesh | None, base: Mapping, adapters: Mapping, received: Mapping, data: Mapping,
              order: jax.Array, real: jax.Array, steps: jax.Array, task_index: jax.Array, rates: Mapping, carry: Any,
              offset: jax.Array) -> Any:
        chunk = _chunk(phase, own_received, row, base, adapters, received, steps, task_index, rates)
        return chunk.advance(carry, data, order, real, offset)

    return _dealt(go_on, mesh, own_received, *arrays, carry, offset)


@partial(jax.jit, static_argnames=("phase", "mesh", "own_received"))
def finish_update(phase: Phase, carry: Any, *arrays: Any, mesh: jax.sharding.Mesh | None = None,
                  own_received: bool = False) -> tuple[dict, dict]:
    """What `local_update` returns, when all steps are done."""
    def finish(row: jax.sharding.Mesh | None, base: Mapping, adapters: Mapping, received: Mapping, data: Mapping,
               order: jax.Array, real: jax.Array, steps: jax.Array, task_index: jax.Array, rates: Mapping,
               carry: Any) -> tuple[dict, dict]:
        return _chunk(phase, own_received, row, base, adapters, received, steps, task_index, rates).finish(carry)

    return _dealt(finish, mesh, own_received, *arrays, carry)


def _dealt(function: Callable, mesh: jax.sharding.Mesh | None, own_received: bool, *arrays: Any) -> Any:
    """function(mesh or None, *arrays), the arrays but base, received and offset dealt to the mesh's rows."""
    own, all_ = PartitionSpec("clients"), PartitionSpec()
    specs = (all_, own, own if own_received else all_, own, own, own, own, own, own, own, all_)[:len(arrays)]
    if mesh is None:
        return function(None, *arrays)
    if mesh.size == mesh.shape["clients"]:
        return jax.shard_map(partial(function, None), mesh=mesh, in_specs=specs, out_specs=own,
                             check_vma=False)(*arrays)
    placed = [jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec)) if spec == own else x
              for x, spec in zip(arrays, specs, strict=True)]
    return jax.lax.with_sharding_constraint(function(mesh, *placed), NamedSharding(mesh, own))


def _local_update(phase: Phase, own_received: bool, mesh: jax.sharding.Mesh | None, base: Mapping, adapters: Mapping,
                  received: Mapping, data: Mapping, order: jax.Array, real: jax.Array, steps: jax.Array,
                  task_index: jax.Array, rates: Mapping[str, jax.Array]) -> tuple[dict, dict]:
    """Train a chunk of k clients for one phase.

    Args:
        mesh: over whose axis "fsdp" batches are spread, if given.
        base: frozen weights, shared by all (an argument: never vmapped, never closed over).
        adapters: leaves [k, …], without the received subtrees. received: leaves without a client axis, or, with
            `own_received` (clients of several federations), [k, …].
        data: arrays [k, n_max, …], see `data.batches.ClientData`. order, real: [k, S_max, B]. steps: int32 [k], S_k.
        task_index: int32 [k]. rates: peak learning rate of each optimizer label, [k].

    Returns: adapters [k, …], and the terms of the loss averaged over each client's own steps, plus the last step's
        loss (`last_loss`), [k]. A step beyond S_k changes nothing: parameters, moments and schedule count included.
    """
    chunk = _chunk(phase, own_received, mesh, base, adapters, received, steps, task_index, rates)
    return chunk.finish(chunk.advance(chunk.begin(data, order, real), data, order, real, 0))


class _Chunk(NamedTuple):
    """A chunk's local update in three parts; the carry is (trained, optimizer state, sums of terms, of gradients)."""

    begin: Callable[..., Any]
    advance: Callable[..., Any]
    finish: Callable[..., Any]


def _chunk(phase: Phase, own_received: bool, mesh: jax.sharding.Mesh | None, base: Mapping, adapters: Mapping,
           received: Mapping, steps: jax.Array, task_index: jax.Array, rates: Mapping[str, jax.Array]) -> _Chunk:
    roles, stage, rule = phase.roles, phase.stage, phase.rule
    trained, frozen = roles.split({**adapters, **received}, stage)
    shared = {} if own_received else {n: t for n, t in frozen.items() if n in received}
    own_frozen = {n: t for n, t in frozen.items() if n not in shared}
    labels = roles.labels(trained)
    init = jax.vmap(lambda tree, total, rate: make_optimizer(phase.train, labels, total, rate).init(tree))
    update = jax.vmap(lambda grads, state, tree, total, rate:
                      make_optimizer(phase.train, labels, total, rate).update(grads, state, tree))

    carried = {n: {**adapters, **received}[n] for n in roles.names(stage=stage, mode="carried")}
    batched = {n: 0 if n in adapters or own_received else None for n in carried}
    start = trained

    def total_loss(trained, batch):
        # The gradient of the clients' summed loss is every client's own gradient: they share no trained leaf.
        def one(trained, own_frozen, batch, task):
            return client_loss(phase, base, trained, {**own_frozen, **shared}, batch, task)

        losses, terms = jax.vmap(one, spmd_axis_name=None if mesh is None else "clients")(
            trained, own_frozen, batch, task_index)
        return jnp.sum(losses), terms

    grad = jax.grad(total_loss, has_aux=True)

    def begin(data, order, real):
        shapes = jax.eval_shape(lambda: grad(start, jax.vmap(gather_batch)(data, order[:, 0], real[:, 0]))[1])
        sums = {name: jnp.zeros(len(steps)) for name in [*shapes, "last_loss"]}
        gradient_sum = jax.tree.map(jnp.zeros_like, start) if rule.averages_gradients else {}
        return start, init(start, steps, rates), sums, gradient_sum

    def advance(carry, data, order, real, offset):
        def step(index, carry):
            trained, state, sums, gradient_sum = carry
            batch = jax.vmap(gather_batch)(data, order[:, index], real[:, index])
            if mesh is not None:
                batch = jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, PartitionSpec("clients", "fsdp")))
            grads, terms = grad(trained, batch)
            active = index + offset < steps  # [k]

            def keep(new, old):
                return jnp.where(active.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

            if rule.averages_gradients:
                gradient_sum = jax.tree.map(lambda total, g: keep(total + g, total), gradient_sum, grads)
            if type(rule) is not LocalRule:
                grads = jax.vmap(rule.gradient, in_axes=(0, 0, 0, batched))(grads, trained, start, carried)
            updates, new_state = update(grads, state, trained, steps, rates)
            new_trained = jax.tree.map(keep, optax.apply_updates(trained, updates), trained)
            new_state = jax.tree.map(keep, new_state, state)
            sums = {n: sums[n] + jnp.where(active, terms[n], 0.0) for n in terms} | {
                "last_loss": keep(terms["loss"], sums["last_loss"])}
            return new_trained, new_state, sums, gradient_sum

        # As many steps as the chunk's longest client has, not as the arrays have room for.
        return jax.lax.fori_loop(0, jnp.clip(jnp.max(steps) - offset, 0, order.shape[1]), step, carry)

    def finish(carry):
        trained, _, sums, gradient_sum = carry
        count = jnp.maximum(steps, 1)
        metrics = {name: value if name == "last_loss" else value / count for name, value in sums.items()}
        kept = {}
        if rule.averages_gradients:
            means = jax.tree.map(lambda total: total / count.reshape(-1, *(1,) * (total.ndim - 1)), gradient_sum)
            after = jax.vmap(rule.carry, in_axes=(0, batched))(means, carried)
            kept = {n: tree for n, tree in after.items() if n in adapters}
        return {**adapters, **kept, **trained}, metrics

    return _Chunk(begin, advance, finish)
