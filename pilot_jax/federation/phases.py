"""The static part of a phase: what is trained, with which loss, optimizer and local rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Real

from pilot_jax.config import TrainConfig
from pilot_jax.errors import InputError
from pilot_jax.federation.losses import LossWeights, loss_weights
from pilot_jax.federation.roles import Roles, Tree

AnyArray = Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class LocalRule:
    """A strategy's change to its clients' steps. Subclasses are frozen dataclasses: their fields are compiled in.

    `trained`: the trained subtrees, as the model reads them; `start`: the same before the phase; `carried`: the
    subtrees of mode "carried" (SCAFFOLD's controls) and "anchor" (Ditto's global model), under their own names.
    """

    averages_gradients: bool = False  # whether `carry` needs the mean gradient
    # Whether each batch has one half from each of two halves of the client's data. The loss is then the mean of the
    # two's losses, and `carry` gets their mean gradients one by one, leaves [2, …].
    halves: bool = False

    def gradient(self, gradient: Any, trained: Any, start: Any, carried: Mapping[str, Any]) -> Any:
        """Returns the direction that the optimizer gets instead of `gradient`; trees of one client, like `trained`."""
        return gradient

    def summand(self, gradient: Any) -> Any:
        """Returns what is summed over the steps for `carry`, from gradients [k, …] or, of halves, [k, 2, …]. It must
        give zeros for zeros."""
        return gradient

    def carry(self, mean_gradient: Any, carried: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the carried subtrees after the phase. `mean_gradient`: the loss gradient's mean over the steps."""
        return dict(carried)


PLAIN_RULE = LocalRule()


@runtime_checkable
class Module(Protocol):
    """The interface of a model that a phase trains: `models.vlm.Vlm`, or a smaller model in tests."""

    def apply(self, variables: Any, *args: Any, method: str) -> Any:
        """Returns (logits [B, A, V], the connector's auxiliary outputs); `method` is "target_logits"."""


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """A client's optimizer, reset in each phase. Peak learning rates are arguments of the program instead."""

    kind: str  # adamw | sgd
    weight_decay: float
    epsilon: float
    warmup: float  # fraction of a client's steps
    schedule: str = "cosine"  # cosine | linear | constant
    clip_norm: float | None = None  # largest L2 norm of a gradient


@dataclasses.dataclass(frozen=True)
class PhaseSpec:
    """The static part of a phase: phases with equal specs share one compiled program."""

    module: Module
    stage: str
    trained: tuple[str, ...]  # subtrees of the adapters, by their mode in the stage
    frozen: tuple[str, ...]
    carried: tuple[str, ...]  # and anchors
    received: tuple[str, ...]  # subtrees that are equal for all clients, as the server provides them
    weights: LossWeights
    optimizer: OptimizerSpec
    rule: LocalRule = PLAIN_RULE
    aliases: tuple[tuple[str, str], ...] = ()  # (subtree, the one as which the model reads it), if they differ
    microbatch: int | None = None  # number of samples that pass the model at once; None: all of a batch
    lora_dropout: float = 0.0  # for batches that have keys, see `models.lora.with_dropout`

    def read(self, adapters: Mapping[str, Tree], names: tuple[str, ...]) -> dict[str, Tree]:
        """Returns those of the subtrees `names` that there are, under the names by which the model knows them."""
        known = dict(self.aliases)
        return {known.get(n, n): adapters[n] for n in names if n in adapters}

    def split(self, adapters: Mapping[str, Tree]) -> tuple[dict[str, Tree], dict[str, Tree]]:
        """Returns (trained, frozen) subtrees, as the model reads them. Only the trained ones get gradients."""
        return self.read(adapters, self.trained), self.read(adapters, self.frozen)

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the loss terms that the stage computes."""
        if self.stage == "stage2":
            return "ce", "balance", "z", "loss"
        return ("ce", "difference", "loss") if self.stage == "stage1" and "client" in self.trained else ("ce", "loss")


def phase_spec(module: Module, roles: Roles, stage: str, train: TrainConfig, rule: LocalRule = PLAIN_RULE) -> PhaseSpec:
    """Returns the spec of a phase, from the ownership table and those values of `train` that are compiled in.

    Raises:
        InputError: the rule halves every batch, and the batch size is odd or its half is not made of microbatches; or
            there is dropout, and a router mixes several LoRA.
    """
    sizes = {"train.batch_size": train.batch_size} | {
        f"train.clients.{name}.batch_size": own.batch_size for name, own in train.clients.items() if own.batch_size}
    for key, size in sizes.items() if rule.halves else ():
        if size % 2:
            raise InputError(f"{key}: {size} is odd, but the strategy measures the noise of updates on the two halves "
                             f"of each batch. Set it to {size + 1}.")
    if rule.halves and train.microbatch is not None and train.batch_size // 2 % train.microbatch:
        raise InputError(f"train.microbatch: {train.microbatch} does not divide {train.batch_size // 2}, the half of "
                         "train.batch_size on which the strategy measures the noise of updates.")
    if train.lora_dropout and "expert_router" in roles.names():
        raise InputError("train.lora_dropout: the strategy mixes several LoRA by a router, for which dropout is not "
                         "defined here. Set it to 0.")
    return PhaseSpec(
        module, stage, roles.names(stage=stage, mode="trained"), roles.names(stage=stage, mode="frozen"),
        roles.names(stage=stage, mode="carried") + roles.names(stage=stage, mode="anchor"),
        roles.names(scope="received"), loss_weights(train, stage),
        OptimizerSpec(train.optimizer, train.weight_decay, train.adam_epsilon, train.warmup, train.schedule,
                      train.clip_norm),
        rule, tuple((row.subtree, row.read_as) for row in roles.adapter_rows if row.read_as), train.microbatch,
        train.lora_dropout)


def peak_rates(train: TrainConfig, stage: str) -> dict[str, float]:
    """Returns the peak learning rate of each optimizer label. Plain LLaVA training uses those of stage 1."""
    return {"connector": train.lr_connector,
            "lora": train.lr_lora_stage2 if stage == "stage2" else train.lr_lora_stage1}


def learning_rate(peak: float | Float[AnyArray, ""], warmup: float, step: Real[AnyArray, ""],
                  total: Real[AnyArray, ""], schedule: str = "cosine") -> Float[Array, ""]:
    """Returns peak · min(1, (i+1)/w) · ½(1+cos(π·i/S_k)), w = max(1, ⌈warmup·S_k⌉); `total` is the client's S_k.

    With `schedule` "linear", the last factor is 1 − i/S_k instead. With "constant", the rate stays at its peak after
    the warm-up. The schedules of optax are not used because they do not accept a traced number of steps.
    """
    steps = jnp.maximum(total, 1).astype(jnp.float32)
    ramp = jnp.maximum(1.0, jnp.ceil(warmup * steps))
    i = jnp.asarray(step, jnp.float32)
    rising = peak * jnp.minimum(1.0, (i + 1) / ramp)
    if schedule == "constant":
        return jnp.asarray(rising)
    if schedule == "linear":
        return jnp.asarray(rising * jnp.maximum(0.0, 1 - i / steps))
    return jnp.asarray(rising * 0.5 * (1 + jnp.cos(jnp.pi * i / steps)))


def make_optimizer(spec: OptimizerSpec, labels: Mapping[str, Tree], total_steps: jax.Array,
                   rates: Mapping[str, jax.Array], flat: bool = False) -> optax.GradientTransformation:
    """Returns an optimizer with one transformation per label. `total_steps` and peak rates may be traced: each vmapped
    client has its own schedule.

    flat: whether AdamW updates the leaves of a label as one vector. The updates are the same. For small leaves it is
        faster, and up to a fifth faster to compile; it needs memory for another copy of them.
    """

    def one(peak: jax.Array) -> optax.GradientTransformation:
        def schedule(count: jax.Array) -> jax.Array:
            return learning_rate(peak, spec.warmup, count, total_steps, spec.schedule)

        if spec.kind == "sgd":
            return optax.sgd(schedule)
        adamw = optax.adamw(schedule, eps=spec.epsilon, weight_decay=spec.weight_decay)
        return optax.flatten(adamw) if flat else adamw

    used = set(jax.tree.leaves(labels))
    optimizer = optax.partition({name: one(peak) for name, peak in rates.items() if name in used}, labels)
    return optimizer if spec.clip_norm is None else optax.chain(optax.clip_by_global_norm(spec.clip_norm), optimizer)
