"""The two parts of a run: the federation, which does not change, and the state, which does."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from pilot_jax.config import FederationConfig, TrainConfig
from pilot_jax.data.arrays import ClientData, num_steps
from pilot_jax.federation.client import PhaseSpec, phase_spec
from pilot_jax.federation.cohort import participants
from pilot_jax.federation.privacy import multiplier
from pilot_jax.federation.randomness import client_generator
from pilot_jax.federation.roles import Tree
from pilot_jax.federation.strategies.base import Strategy
from pilot_jax.models.pretrained import PretrainedModel
from pilot_jax.parallel.host_memory import empty
from pilot_jax.parallel.mesh import mesh_of
from pilot_jax.storage import Key, Store

Tamper = Callable[[str, int, dict, dict], dict]  # (client, round, upload, shared subtrees at its start) -> upload


@dataclasses.dataclass(frozen=True)
class ClientState:
    """A client's adapters and history, in memory. Trees that clients share (initial adapters, the bank) are stored
    once, by reference."""

    adapters: dict[str, Tree]  # NumPy leaves, without client axis
    stage: str = "none"  # that of its model: the last, or the strategy's `answering_stage`; "none" before its first
    rounds: int = 0  # number of rounds in which it has taken part

    @property
    def is_new(self) -> bool:
        return self.rounds == 0


@dataclasses.dataclass(frozen=True)
class StoredState:
    """A `ClientState` whose adapters are on disk and are read on access."""

    store: Store
    key: Key
    stage: str
    rounds: int

    @property
    def is_new(self) -> bool:
        return self.rounds == 0

    @property
    def adapters(self) -> dict[str, Tree]:
        return self.store.read(self.key)


AnyState = ClientState | StoredState
Population = tuple[AnyState, ...]


@dataclasses.dataclass(frozen=True)
class Federation:
    """The part of a run that does not change."""

    strategy: Strategy
    model: PretrainedModel
    clients: tuple[ClientData, ...]  # ordered by name; a client's index is its id in mixing
    tasks: tuple[str, ...]  # global task order
    settings: FederationConfig
    train: TrainConfig
    seed: int
    rank: int = 8  # LoRA rank
    store: Store | None = None  # holds clients' adapters and data, if they are not in memory
    spread_uploads: bool = False  # whether a cohort's uploads are divided among the devices of the mesh
    most_uploads: int = 0  # of any client in the run, if none is refused; for `settings.privacy`
    tamper: Tamper | None = None  # changes the uploads of simulated attackers

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(client.name for client in self.clients)

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The mesh of the base model, on which clients are trained and evaluated; None: one device."""
        return mesh_of(self.model.base)

    @property
    def server_mesh(self) -> jax.sharding.Mesh | None:
        """The mesh over which the uploads of a cohort are spread; None if the devices share one memory."""
        return self.mesh if self.spread_uploads else None

    def members(self, round_: int) -> list[int]:
        """Returns the indices of the clients that take part in `round_` (from 1), in ascending order."""
        return participants(self.settings, self.names, round_, self.seed)

    def task_index(self, client: int) -> int:
        """Returns the index of a client's task; 0 if the client has the data of all tasks."""
        task = self.clients[client].task
        return self.tasks.index(task) if task in self.tasks else 0

    def full_steps(self, client: int) -> int:
        """Returns the number of steps of a client's phase, if the client is no straggler."""
        return num_steps(self.clients[client].size, self.train.batch_size, self.settings.local_epochs,
                         self.settings.local_steps)

    def steps(self, client: int, round_: int) -> int:
        """Returns S_k, the number of steps of a client's phases in `round_`."""
        slow, count = self.settings.stragglers, self.full_steps(client)
        if slow.share > 0:
            rng = client_generator(self.seed, self.clients[client].name, round_, "straggling")
            if rng.random() < slow.share:
                return max(1, math.ceil(slow.steps * count))
        return count

    @functools.cached_property
    def noise_multiplier(self) -> float:
        """z of `settings.privacy`; 0 without privacy, or if the strategy uploads nothing."""
        privacy = self.settings.privacy
        if privacy.clip is None or not self.strategy.roles().names(scope="shared"):
            return 0.0
        return multiplier(privacy, self.most_uploads)

    def phase(self, stage: str) -> PhaseSpec:
        """Returns the static part of a phase of `stage`."""
        return phase_spec(self.model.module, self.strategy.roles(), stage, self.train, self.strategy.local_rule())


def most_uploads(fed: Federation) -> int:
    """Returns the largest number of uploads of one client in the whole run, if none is refused."""
    uploads = [0] * len(fed.clients)
    for (stage, client), phases in _all_phases(fed).items():
        uploads[client] += len(phases) if fed.strategy.roles().uploaded(stage) else 0
    return max(uploads)


def all_steps(fed: Federation) -> dict[tuple[str, int], int]:
    """Returns the steps of the whole run by stage and client, which are known before it starts."""
    return {(stage, c): sum(fed.steps(c, round_) for round_ in phases)
            for (stage, c), phases in _all_phases(fed).items()}


def _all_phases(fed: Federation) -> dict[tuple[str, int], list[int]]:
    """Returns the rounds of all phases of the run by stage and client; a round with two such phases is listed twice."""
    seen: set[int] = set()
    out: dict[tuple[str, int], list[int]] = {}
    for round_ in range(1, fed.settings.rounds + 1):
        for c in fed.members(round_):
            for stage in fed.strategy.stages(c not in seen, round_):
                out.setdefault((stage, c), []).append(round_)
            seen.add(c)
    return out


@dataclasses.dataclass(frozen=True)
class Timings:
    """The durations of a phase in seconds."""

    seconds: float = 0.0  # training, waiting for inputs included
    prepare_seconds: float = 0.0  # preparation of the chunks' inputs in a thread, during the training
    waited_seconds: float = 0.0  # how long the training waited for this preparation
    feature_seconds: float = 0.0  # computation of image features; not in `seconds`


@dataclasses.dataclass(frozen=True)
class Trained:
    """The results of a phase's local training: each client's adapters and its record for the log."""

    adapters: dict[int, dict[str, Tree]]
    records: dict[int, dict[str, Any]]
    timings: Timings = Timings()


@dataclasses.dataclass(frozen=True)
class State:
    """The part of a run that changes from phase to phase."""

    population: Population
    server: dict[str, Any]
    client_steps: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    train_seconds: float = 0.0
    round: int = 1  # the current round, or the next
    phase: int = 0  # number of its phases that are done
    version: int = 0  # number of aggregations so far
    fetched: tuple[int, ...] = ()  # by client: the server's version that its adapters match
    uploads: tuple[int, ...] = ()  # by client: number of its uploads
    norms: Mapping[str, list[float]] = dataclasses.field(default_factory=dict)  # by stage: the last accepted
    benched: tuple[int, ...] = ()  # clients whose upload was refused in this round
    quarantined: int = 0  # number of refused uploads in the whole run
    partial: Trained | None = None  # results of an interrupted phase


def stored(store: Store | None, client: int, state: AnyState) -> AnyState:
    """Returns the state, with its adapters written to the store if there is one."""
    return state if store is None else StoredState(store, store.write(client, state.adapters), state.stage,
                                                   state.rounds)


def prune(store: Store, population: Population) -> None:
    """Removes the adapters from the store that the population no longer refers to."""
    store.prune({state.key for state in population if isinstance(state, StoredState)})


def stack(trees: list[Tree]) -> Tree:
    """Stacks trees of one structure: leaves [len(trees), …], in memory that a CPU device uses without a copy."""
    def one(*leaves: Any) -> np.ndarray:
        rows = [np.asarray(leaf) for leaf in leaves]
        out = empty((len(rows), *rows[0].shape), np.result_type(*rows))
        return np.stack(rows, out=out)

    return jax.tree.map(one, *trees)


def row(tree: Tree, index: int) -> Tree:
    """Returns row `index` of every leaf."""
    return jax.tree.map(lambda leaf: leaf[index], tree)
