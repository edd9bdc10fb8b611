"""Local training of a chunk of clients: one compiled program for all steps of a phase, in one loop.

`local_update` is this program. `start`, `advance` and `finish` are its three parts as programs of their own, for data
that go to the device a few steps at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from pilot_jax.federation.losses import batch_counts, stage_loss
from pilot_jax.federation.phases import LocalRule, PhaseSpec, make_optimizer
from pilot_jax.federation.roles import Tree, optimizer_labels
from pilot_jax.models.connector import connector_stage
from pilot_jax.models.lora import DROPOUT, folded, with_dropout
from pilot_jax.models.vlm import variables
from pilot_jax.programs import KeptJit

AnyArray = Array | np.ndarray
SMALL = 2**22  # trained numbers of a client that the optimizer treats as one vector


@partial(jax.tree_util.register_dataclass, data_fields=["own", "common"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters of k clients: leaves of `own` are [k, …]; those of `common`, equal for all, have no client axis."""

    own: Any  # subtrees by name; or, as in any pytree, one value for all of them, such as a sharding
    common: Any

    def divided(self, received: Collection[str]) -> tuple[dict[str, Any], Adapters]:
        """Returns (those that a local update gives back, the received ones, which it only reads)."""
        return ({n: t for n, t in self.own.items() if n not in received},
                Adapters({n: t for n, t in self.own.items() if n in received}, self.common))


@partial(jax.tree_util.register_dataclass,
         data_fields=["data", "order", "real", "steps", "task_index", "rates"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class ClientBatch:
    """The training data of k clients for a phase or some of its steps; every leaf is [k, …]."""

    data: dict[str, Any]  # arrays [k, n_max, …], see `data.arrays.ClientData`
    order: Any  # int32 [k, S_max, B]: rows of `data` at each step
    real: Any  # float32 [k, S_max, B]: 1 for a sample, 0 for padding
    steps: Any  # int32 [k], S_k: the client's number of steps in the whole phase
    task_index: Any  # int32 [k]
    rates: dict[str, Any]  # peak learning rate of each optimizer label, float32 [k]


@partial(jax.tree_util.register_dataclass,
         data_fields=["adapters", "trained", "optimizer", "sums", "gradients", "steps"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Carry:
    """The state of a local update between its parts."""

    adapters: Any  # `Adapters` at the start of the phase
    trained: Any  # current subtrees [k, …]
    optimizer: Any
    sums: Any  # each loss term, summed over the steps so far, [k]
    gradients: Any  # summed over the steps so far, if the rule averages them
    steps: Any  # int32 [k], S_k


def gather_batch(data: Mapping[str, Shaped[AnyArray, "n ..."]], rows: Int[AnyArray, " B"],
                 real: Float[AnyArray, " B"]) -> dict[str, Shaped[Array, "B ..."]]:
    """Returns the given rows of one client's arrays as a batch; padding rows get weight 0 everywhere."""
    batch: dict[str, Any] = {name: array[rows] for name, array in data.items()}
    batch["target_weights"] = batch["target_weights"] * real[:, None]
    batch["has_image"] = batch["has_image"] * real
    return batch


def client_loss(spec: PhaseSpec, base: Mapping[str, Tree], trained: Mapping[str, Tree], frozen: Mapping[str, Tree],
                batch: Mapping[str, Shaped[AnyArray, "B ..."]], task_index: int | Int[AnyArray, ""],
                counts: tuple[Float[Array, ""], Float[Array, ""]] | None = None,
                ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the loss of one client's batch, and its terms. `counts`: see `losses.stage_loss`."""
    weights = variables(base, {**trained, **frozen})
    if DROPOUT in batch:
        weights["lora"] = {"decoder": with_dropout(weights["lora"]["decoder"], jnp.asarray(batch[DROPOUT]),
                                                        spec.lora_dropout)}
    logits, aux = spec.module.apply(weights, batch, connector_stage(spec.stage), task_index, method="target_logits")
    return stage_loss(logits, aux, batch, spec.weights, counts)


def _accumulated(size: int | None, batch: Tree, of_part: Callable[[Tree, Tree], Tree]) -> Tree:
    """Returns the sum of of_part(part, counts) over the parts of a batch, leaves [k, B, …], of `size` samples each.

    `counts` are the whole batch's, see `losses.batch_counts`. With `size` None or B, the batch is the only part, and
    they are None.
    """
    samples = batch["has_image"].shape[1]
    if size is None or size == samples:
        return of_part(batch, None)
    # The first of n parts has the rows 0, n, 2n, …, so that a mesh divides the rows of every part among its devices.
    parts = jax.tree.map(lambda leaf: jnp.moveaxis(
        leaf.reshape(len(leaf), size, samples // size, *leaf.shape[2:]), 2, 0), batch)
    counts = batch_counts(batch)

    def add(total: Tree, part: Tree) -> tuple[Tree, None]:
        return jax.tree.map(jnp.add, total, of_part(part, counts)), None

    first, rest = (jax.tree.map(lambda leaf, rows=rows: leaf[rows], parts) for rows in (0, slice(1, None)))
    return jax.lax.scan(add, of_part(first, counts), rest)[0]


def _gradients(spec: PhaseSpec, mesh: jax.sharding.Mesh | None, base: Mapping[str, Tree], adapters: tuple[Tree, ...],
               rows: Tree, about: tuple[jax.Array, jax.Array]) -> tuple[Tree, dict[str, jax.Array], Tree]:
    """Returns the gradient of each client's loss [k, …], the terms of the loss [k], and what the rule sums over steps.

    That is the rule's `summand` of the gradient or, if it has `halves`, of those on the batch's two halves, [k, 2, …].

    Args:
        adapters: trained [k, …], frozen [k, …], and frozen and equal for all clients. rows: the batches [k, B, …].
        about: the clients' tasks, int32 [k], and which rows are samples, float32 [k, B].
    """
    (trained, own, common), (tasks, real) = adapters, about

    def total_loss(trained: Tree, own: Tree, batch: Tree, tasks: jax.Array, counts: Tree) -> Any:
        # Clients share no trained leaf, so the gradient of their summed loss is each client's own gradient.
        def one(trained: Tree, own: Tree, batch: Tree, task: jax.Array, counts: Tree) -> Any:
            return client_loss(spec, base, trained, {**own, **common}, batch, task, counts)

        losses, terms = jax.vmap(one, spmd_axis_name=None if mesh is None else "clients")(
            trained, own, batch, tasks, counts)
        return jnp.sum(losses), terms

    def gradient(trained: Tree, own: Tree, tasks: jax.Array, batch: Tree) -> tuple[Tree, dict[str, jax.Array]]:
        return _accumulated(spec.microbatch, batch, lambda part, counts: jax.grad(total_loss, has_aux=True)(
            trained, own, part, tasks, counts))

    if not spec.rule.halves:
        grads, terms = gradient(trained, own, tasks, rows)
        return grads, terms, spec.rule.summand(grads)
    # Two clients with the same adapters stand for the halves.
    twice: tuple[Tree, Tree, jax.Array] = jax.tree.map(
        lambda leaf: jnp.repeat(leaf, 2, axis=0), (trained, own, tasks))
    halves = jax.tree.map(lambda leaf: leaf.reshape(2 * len(leaf), -1, *leaf.shape[2:]), rows)
    apart = jax.tree.map(lambda leaf: leaf.reshape(-1, 2, *leaf.shape[1:]), gradient(*twice, halves))
    count = jnp.sum(real.reshape(len(real), 2, -1), axis=2)
    share = count / jnp.maximum(jnp.sum(count, axis=1, keepdims=True), 1)
    grads, terms = jax.tree.map(lambda leaf: jnp.einsum("kh,kh...->k...", share, leaf), apart)
    return grads, terms, spec.rule.summand(apart[0])


def _start(spec: PhaseSpec, adapters: Adapters, batch: ClientBatch) -> Carry:
    trained = spec.read(adapters.own, spec.trained)
    labels = optimizer_labels(trained)
    state = jax.vmap(lambda tree, total, rate: make_optimizer(
        spec.optimizer, labels, total, rate, _is_small(tree)).init(tree))(trained, batch.steps, batch.rates)
    sums = {name: jnp.zeros(len(batch.steps)) for name in (*spec.terms, "last_loss")}
    gradients = {}
    if spec.rule.averages_gradients:
        size = (2,) if spec.rule.halves else ()
        gradients = spec.rule.summand(jax.tree.map(
            lambda leaf: jnp.zeros((len(leaf), *size, *leaf.shape[1:]), leaf.dtype), trained))
    return Carry(adapters, trained, state, sums, gradients, batch.steps)


def _advance(spec: PhaseSpec, mesh: jax.sharding.Mesh | None, base: Mapping[str, Tree], carry: Carry,
             batch: ClientBatch, offset: jax.Array | int) -> Carry:
    """Returns the carry after the steps of `batch`, of which the first is step `offset` of the phase."""
    own, common = carry.adapters.own, carry.adapters.common
    start, own_frozen, common_frozen = (spec.read(own, spec.trained), spec.read(own, spec.frozen),
                                        spec.read(common, spec.frozen))
    carried = {n: own[n] if n in own else common[n] for n in spec.carried}
    axes = {n: 0 if n in own else None for n in carried}
    labels = optimizer_labels(start)
    update = jax.vmap(lambda grads, state, tree, total, rate: make_optimizer(
        spec.optimizer, labels, total, rate, _is_small(tree)).update(grads, state, tree))

    def step(index: jax.Array, state: tuple) -> tuple:
        trained, optimizer, sums, gradients = state
        rows = jax.vmap(gather_batch)(batch.data, batch.order[:, index], batch.real[:, index])
        if DROPOUT in rows:  # another mask at each step
            rows[DROPOUT] = jax.vmap(jax.vmap(partial(folded, number=index + offset)))(rows[DROPOUT])
        if mesh is not None:
            rows = jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, PartitionSpec("clients", "fsdp")))
        grads, terms, parts = _gradients(spec, mesh, base, (trained, own_frozen, common_frozen), rows,
                                         (batch.task_index, batch.real[:, index]))
        active = index + offset < carry.steps  # [k]; a step beyond S_k changes nothing
        if spec.rule.averages_gradients:
            gradients = jax.tree.map(lambda total, g: _where(active, total + g, total), gradients, parts)
        if type(spec.rule) is not LocalRule:
            grads = jax.vmap(spec.rule.gradient, in_axes=(0, 0, 0, axes))(grads, trained, start, carried)
        updates, new_optimizer = update(grads, optimizer, trained, carry.steps, batch.rates)
        new_trained = jax.tree.map(partial(_where, active), optax.apply_updates(trained, updates), trained)
        new_optimizer = jax.tree.map(partial(_where, active), new_optimizer, optimizer)
        sums = {n: sums[n] + jnp.where(active, terms[n], 0.0) for n in terms} | {
            "last_loss": _where(active, terms["loss"], sums["last_loss"])}
        return new_trained, new_optimizer, sums, gradients

    # The arrays may have room for more steps than the longest client of this chunk has.
    count = jnp.clip(jnp.max(carry.steps) - offset, 0, batch.order.shape[1])
    trained, optimizer, sums, gradients = jax.lax.fori_loop(
        0, count, step, (carry.trained, carry.optimizer, carry.sums, carry.gradients))
    return Carry(carry.adapters, trained, optimizer, sums, gradients, carry.steps)


def _is_small(tree: Tree) -> bool:
    """Whether one client's trained subtrees are so small that a copy of them costs next to nothing."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree)) <= SMALL


def _where(active: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns `new` for clients that are active [k] and `old` for the others; leaves [k, …]."""
    return jnp.where(active.reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def _finish(spec: PhaseSpec, carry: Carry) -> tuple[dict[str, Tree], dict[str, jax.Array]]:
    own, common = carry.adapters.own, carry.adapters.common
    count = jnp.maximum(carry.steps, 1)
    metrics = {name: value if name == "last_loss" else value / count for name, value in carry.sums.items()}
    after: dict[str, Tree] = {}
    if spec.rule.averages_gradients:
        means = jax.tree.map(lambda total: total / count.reshape(-1, *(1,) * (total.ndim - 1)), carry.gradients)
        carried = {n: own[n] if n in own else common[n] for n in spec.carried}
        after = jax.vmap(spec.rule.carry, in_axes=(0, {n: 0 if n in own else None for n in carried}))(means, carried)
    known = dict(spec.aliases)
    trained = {n: carry.trained[known.get(n, n)] for n in spec.trained}
    adapters = {**own, **{n: t for n, t in after.items() if n in own}, **trained}
    return {n: t for n, t in adapters.items() if n not in spec.received}, metrics


OWN, COMMON = PartitionSpec("clients"), PartitionSpec()
ADAPTERS = Adapters(OWN, COMMON)
CARRY = Carry(ADAPTERS, OWN, OWN, OWN, OWN, OWN)


def _on_mesh(function: Callable, mesh: jax.sharding.Mesh | None, arguments: tuple, specs: tuple, out: Any) -> Any:
    """Calls function(mesh or None, *arguments) with the clients divided among the rows of `mesh` (axis "clients").

    Clients do not depend on each other. Where a row is one device, each device runs separately, for as many steps as
    its own longest client has. Where "fsdp" or "tensor" has several devices, XLA divides the work among them by the
    shardings of the base and of the batch (over "fsdp").
    """
    if mesh is None:
        return function(None, *arguments)
    if mesh.size == mesh.shape["clients"]:
        return jax.shard_map(partial(function, None), mesh=mesh, in_specs=specs, out_specs=out,
                             check_vma=False)(*arguments)
    return _constrained(function(mesh, *_constrained(arguments, specs, mesh)), out, mesh)


def _constrained(tree: Any, specs: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shards the parts of `tree` whose spec is OWN over the axis "clients"; the other parts are unchanged."""
    def one(spec: PartitionSpec, part: Any) -> Any:
        return jax.lax.with_sharding_constraint(part, NamedSharding(mesh, spec)) if spec == OWN else part

    return jax.tree.map(one, specs, tree, is_leaf=lambda node: isinstance(node, PartitionSpec))


@partial(KeptJit, static=("spec", "mesh"), donate=("own",))
def local_update(spec: PhaseSpec, base: Mapping[str, Tree], own: Mapping[str, Tree], received: Adapters,
                 batch: ClientBatch, mesh: jax.sharding.Mesh | None = None,
                 ) -> tuple[dict[str, Tree], dict[str, jax.Array]]:
    """Trains a chunk of k clients for one phase.

    Args:
        base: frozen weights, shared by all clients (an argument, never vmapped and never a constant of the program).
        own, received: the clients' adapters, as `Adapters.divided` returns them. Arrays of `own` that are on a device
            are used up: their memory becomes that of the results.
        mesh: its axis "clients" divides the clients, its axis "fsdp" the samples of a batch.

    Returns: adapters [k, …] without the received subtrees, and the terms of the loss averaged over each client's own
        steps, plus the last step's loss (`last_loss`), float32 [k]. A step beyond S_k changes nothing: parameters,
        moments and schedule count included.
    """
    def whole(row: jax.sharding.Mesh | None, base: Any, adapters: Adapters, batch: ClientBatch) -> Any:
        return _finish(spec, _advance(spec, row, base, _start(spec, adapters, batch), batch, 0))

    adapters = Adapters({**own, **received.own}, received.common)
    return _on_mesh(whole, mesh, (base, adapters, batch), (COMMON, ADAPTERS, OWN), OWN)


@partial(KeptJit, static=("spec", "mesh"))
def start(spec: PhaseSpec, adapters: Adapters, batch: ClientBatch, mesh: jax.sharding.Mesh | None = None) -> Carry:
    """Returns the carry before the first step of a phase."""
    return _on_mesh(lambda row, *arguments: _start(spec, *arguments), mesh, (adapters, batch), (ADAPTERS, OWN), CARRY)


@partial(KeptJit, static=("spec", "mesh"), donate=("carry",))
def advance(spec: PhaseSpec, base: Mapping[str, Tree], carry: Carry, batch: ClientBatch, offset: jax.Array,
            mesh: jax.sharding.Mesh | None = None) -> Carry:
    """Returns the carry after some more steps. `batch` has the data of these steps alone, from step `offset` on, so
    that no other data need be on the device."""
    return _on_mesh(partial(_advance, spec), mesh, (base, carry, batch, offset), (COMMON, CARRY, OWN, COMMON), CARRY)


@partial(KeptJit, static=("spec", "mesh"))
def finish(spec: PhaseSpec, carry: Carry, mesh: jax.sharding.Mesh | None = None) -> tuple[dict, dict]:
    """Returns what `local_update` returns, after all steps."""
    return _on_mesh(lambda row, carry: _finish(spec, carry), mesh, (carry,), (CARRY,), OWN)
