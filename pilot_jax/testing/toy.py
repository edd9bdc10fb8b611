"""A federation of softmax regressions with LoRA, which shows in seconds what a strategy does.

Its model has the two subtrees of every strategy that trains LoRA and the projector, under the same names as in the real
model: the projector is W [V, D], part of the base if it is frozen, and LoRA's only target "q" is A [1, R, D] and
B [1, V, R]; the logits are X·(W + B·A)ᵀ, or of several experts X·Wᵀ + Σ_e g_e(X)·X·(B_e·A_e)ᵀ. It is
small enough to be computed again in NumPy, or by hand:

    from pilot_jax.testing.toy import run_toy, toy_federation

    class Alone(pilot_jax.Strategy):
        one_model = False

        def mix(self, cohort):
            return mixing.identity(len(cohort))

    state = run_toy(toy_federation(Alone()))
    state.population[0].adapters["projector"]["w"]  # client 0's projector after all rounds
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from pilot_jax.config import FederationConfig, TrainConfig
from pilot_jax.data.arrays import ClientData, pooled
from pilot_jax.evaluation.finetune import after_finetuning, finetune
from pilot_jax.federation.executor import Executor
from pilot_jax.federation.observer import RunObserver
from pilot_jax.federation.roles import Tree
from pilot_jax.federation.rounds import run_round
from pilot_jax.federation.state import Federation, State, initial_population
from pilot_jax.federation.strategies import Strategy
from pilot_jax.models.experts import is_mixture, mixed

FEATURES, CLASSES, RANK = 5, 4, 2  # D, V, R
SIZES, TASKS = (4, 8, 6), ("t0", "t0", "t1")  # of each client
ROUNDS = FederationConfig(rounds=2, local_epochs=3)
# One step is one epoch of plain gradient descent at a cosine schedule from 0.4, without warm-up.
DESCENT = TrainConfig(batch_size=64, optimizer="sgd", warmup=0.0, lr_connector=0.4, lr_lora_stage1=0.4)


@dataclasses.dataclass(frozen=True)
class Regression:
    """The toy's model: `apply` gives its logits [B, 1, V], and no auxiliary outputs for other losses."""

    def apply(self, variables: Any, batch: Any, stage: str, task_index: Any, *, method: str) -> tuple[Any, dict]:
        w = variables["connector"]["connector"]["projector"]["w"]
        pair = variables["lora"]["decoder"]["layers"]["q"]
        if "residual_a" in pair:  # a change of the frozen weights, with `combine: exact`
            w = w + pair["residual_b"][0] @ pair["residual_a"][0]
        if is_mixture({"q": pair}):
            experts = mixed(batch["features"], {name: leaf[0] for name, leaf in pair.items()}, 1.0)
            return (batch["features"] @ w.T + experts)[:, None], {}
        return (batch["features"] @ (w + pair["b"][0] @ pair["a"][0]).T)[:, None], {}


def toy_clients(sizes: Sequence[int] = SIZES, tasks: Sequence[str] = TASKS, seed: int = 0) -> tuple[ClientData, ...]:
    """Returns clients c0, c1, … with n_k samples each: random features [n, D] and labels, and no held-out data."""
    rng = np.random.default_rng(seed)
    return tuple(_client(f"c{k}", task, rng.normal(size=(n, FEATURES)), rng.integers(CLASSES, size=n))
                 for k, (n, task) in enumerate(zip(sizes, tasks, strict=True)))


def _client(name: str, task: str, features: np.ndarray, labels: np.ndarray) -> ClientData:
    """Returns data in the form that the local update expects; each sample is one answer with one token."""
    n = len(features)
    train = {"input_ids": np.zeros((n, 8), np.int32), "attention_mask": np.ones((n, 8), np.int32),
             "target_positions": np.zeros((n, 1), np.int32), "target_ids": labels[:, None].astype(np.int32),
             "target_weights": np.ones((n, 1), np.float32), "has_image": np.ones(n, np.float32),
             "features": features.astype(np.float32)}
    return ClientData(name, task, train, {})


def toy_numbers(seed: int = 7) -> dict[str, np.ndarray]:
    """Returns the initial parameters, float64: w [V, D], a [R, D], b [V, R], and of a private LoRA a2 and b2 = 0."""
    rng = np.random.default_rng(seed)
    return {"w": rng.normal(size=(CLASSES, FEATURES)) * 0.3, "a": rng.normal(size=(RANK, FEATURES)) * 0.5,
            "b": rng.normal(size=(CLASSES, RANK)) * 0.2, "a2": rng.normal(size=(RANK, FEATURES)) * 0.5,
            "b2": np.zeros((CLASSES, RANK))}


def toy_adapters(strategy: Strategy, seed: int = 7) -> dict[str, Tree]:
    """Returns `toy_numbers` as the subtrees of a strategy's ownership table, float32. B is not 0, so A changes too.

    Known subtrees are the projector, LoRA (whole or as its two factors), a private LoRA, what the strategy itself puts
    beside LoRA (`Strategy.beside_lora`), and those that the model reads as one of these; of those that it does not
    read, FedAMP's model u_k and FedMosaic's gradient. Other subtrees that the model does not read in any stage
    (SCAFFOLD's controls) begin as zeros in the shape of LoRA and projector.

    Raises:
        ValueError: the table has another subtree. Pass your own adapters to `toy_state`.
    """
    p, roles = toy_numbers(seed), strategy.roles()
    known = {"projector": {"w": p["w"]}, "text_adapter": _lora(p["a"], p["b"]),
             "private_adapter": _lora(p["a2"], p["b2"]),
             "text_adapter_a": {"q": p["a"][None]}, "text_adapter_b": {"q": p["b"][None]},
             "relevance": {"q": np.zeros_like(p["b"][None])}}
    known |= strategy.beside_lora(jax.random.key(seed), jax.tree.map(jnp.float32, known["text_adapter"]))
    trained = {name: known[name] for name in ("text_adapter", "projector") if name in roles.names()}
    known["cloud_model"], zeros = trained, jax.tree.map(np.zeros_like, trained)
    adapters = {}
    for row in roles.adapter_rows:
        name = row.subtree if row.subtree in known else row.name_in_model
        if name not in known and not set(row.modes.values()) <= {"carried", "anchor", "-"}:
            raise ValueError(f"the toy's model does not know the subtree {row.subtree!r}")
        adapters[row.subtree] = known.get(name, zeros)
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), strategy.with_options(adapters, RANK))


def _lora(a: np.ndarray, b: np.ndarray) -> Tree:
    return {"layers": {"q": {"a": a[None], "b": b[None]}}}


def toy_federation(strategy: Strategy, clients: Sequence[ClientData] | None = None,
                   settings: FederationConfig = ROUNDS, train: TrainConfig = DESCENT, seed: int = 0,
                   ranks: tuple[int, ...] | None = None) -> Federation:
    """Returns a federation of the toy's model under a strategy.

    Args:
        clients: default: `toy_clients()`; they are pooled if the strategy pools data.
        settings, train: sections `federation` and `train` of a config; default: two rounds, three full-batch steps
            per phase.
        ranks: LoRA rank of each client, at most RANK, if they differ.
    """
    strategy = dataclasses.replace(strategy, ranks_differ=ranks is not None)
    clients = tuple(toy_clients() if clients is None else clients)
    tasks = tuple(sorted({client.task for client in clients}))
    frozen = {"projector": {"w": toy_numbers()["w"].astype(np.float32)}}
    base = frozen if strategy.params.projector == "frozen" else {}
    model = cast(Any, types.SimpleNamespace(module=Regression(), base=base))
    held = (pooled(clients),) if strategy.pools_data else clients
    return Federation(strategy, model, held, tasks, settings, train, seed, RANK, ranks,
                      unpooled=clients if strategy.pools_data else ())


def toy_state(fed: Federation, adapters: dict[str, Tree] | None = None) -> State:
    """Returns the state before round 1, in which every client has `adapters` (default: `toy_adapters`)."""
    adapters = toy_adapters(fed.strategy) if adapters is None else adapters
    roles = fed.strategy.ownership()
    roles.check(adapters)
    sizes = np.asarray([fed.weight(k) for k in range(len(fed.clients))])
    tasks = np.asarray([fed.task_index(k) for k in range(len(fed.clients))])
    server = fed.strategy.initial_server_state(
        roles.select(adapters, "shared") | roles.select(adapters, "received"), sizes, tasks)
    return State(initial_population(fed, adapters), server)


def run_toy(fed: Federation, state: State | None = None, observer: RunObserver | None = None) -> State:
    """Runs all rounds of a federation, or the remaining ones from `state` on, and returns the last state.

    A strategy that fine-tunes its final models does so here, too; `evaluation.finetune` does it for any other.

    Raises:
        FloatingPointError: see `federation.rounds.finish_phase`.
    """
    state = toy_state(fed) if state is None else state
    while state.round <= fed.settings.rounds:
        after, = run_round([fed], [state], Executor(client_chunk=2), None if observer is None else [observer])
        assert after is not None
        state = after
    tuned = finetune([fed], [state], Executor(client_chunk=2))[0] if fed.strategy.finetunes else None
    return after_finetuning(fed, state, tuned)
