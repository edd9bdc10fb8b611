"""What a run is made of: the federation, which does not change, and the state, which does."""

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

Tamper = Callable[[str, int, dict, dict], dict]  # (client, round, upload, what it began with) -> upload


@dataclasses.dataclass(frozen=True)
class ClientState:
    """What a client has, in memory. Trees that clients share (initial adapters, the bank) are there once, by
    reference."""

    adapters: dict[str, Tree]  # NumPy leaves, without client axis
    stage: str = "none"  # the last stage completed; "none" before a client first takes part
    rounds: int = 0  # rounds taken part in

    @property
    def is_new(self) -> bool:
        return self.rounds == 0


@dataclasses.dataclass(frozen=True)
class StoredState:
    """A `ClientState` whose adapters are on disk, and read when they are asked for."""

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
    """What does not change during a run."""

    strategy: Strategy
    model: PretrainedModel
    clients: tuple[ClientData, ...]  # ordered by name; a client's index is its id in mixing
    tasks: tuple[str, ...]  # global task order
    settings: FederationConfig
    train: TrainConfig
    seed: int
    rank: int = 8  # of LoRA
    store: Store | None = None  # where clients' adapters and data are, if not in memory
    spread_uploads: bool = False  # whether a cohort's uploads are divided among the devices of the mesh
    most_uploads: int = 0  # of one client in the whole run, if none is refused; where `settings.privacy` asks
    tamper: Tamper | None = None  # what simulated attackers do

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(client.name for client in self.clients)

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The mesh on which the base lies, on which clients are trained and answer; None: one device."""
        return mesh_of(self.model.base)

    @property
    def server_mesh(self) -> jax.sharding.Mesh | None:
        """The mesh over which the uploads of a cohort are spread; None where devices share one memory."""
        return self.mesh if self.spread_uploads else None

    def members(self, round_: int) -> list[int]:
        """Indices of the clients that take part in `round_` (from 1), in order."""
        return participants(self.settings, self.names, round_, self.seed)

    def task_index(self, client: int) -> int:
        """Index of a client's task; 0 where a client has the data of all tasks."""
        task = self.clients[client].task
        return self.tasks.index(task) if task in self.tasks else 0

    def full_steps(self, client: int) -> int:
        """The steps of a client's phase, if it does not straggle."""
        return num_steps(self.clients[client].size, self.train.batch_size, self.settings.local_epochs,
                         self.settings.local_steps)

    def steps(self, client: int, round_: int) -> int:
        """S_k: the steps of a client's phases in `round_`."""
        slow, count = self.settings.stragglers, self.full_steps(client)
        if slow.share > 0:
            rng = client_generator(self.seed, self.clients[client].name, round_, "straggling")
            if rng.random() < slow.share:
                return max(1, math.ceil(slow.steps * count))
        return count

    @functools.cached_property
    def noise_multiplier(self) -> float:
        """z of `settings.privacy`: 0 without it, and where a strategy uploads nothing."""
        privacy = self.settings.privacy
        if privacy.clip is None or not self.strategy.roles().names(scope="shared"):
            return 0.0
        return multiplier(privacy, self.most_uploads)

    def phase(self, stage: str) -> PhaseSpec:
        return phase_spec(self.model.module, self.strategy.roles(), stage, self.train, self.strategy.local_rule())


def most_uploads(fed: Federation) -> int:
    """How often one client uploads in the whole run, at most, if no upload is refused."""
    count = [0] * len(fed.clients)
    for round_ in range(1, fed.settings.rounds + 1):
        for c in fed.members(round_):
            count[c] += len(fed.strategy.stages(count[c] == 0, round_))
    return max(count)


def steps_by_stage(fed: Federation) -> dict[str, int]:
    """Client steps of the whole run in each stage, known before it starts."""
    seen: set[int] = set()
    out: dict[str, int] = {}
    for round_ in range(1, fed.settings.rounds + 1):
        for c in fed.members(round_):
            for stage in fed.strategy.stages(c not in seen, round_):
                out[stage] = out.get(stage, 0) + fed.steps(c, round_)
            seen.add(c)
    return out


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds of a phase."""

    seconds: float = 0.0  # of training
    prepare_seconds: float = 0.0  # spent on making the chunks' inputs, beside the device's work
    waited_seconds: float = 0.0  # of these, how long the device waited
    feature_seconds: float = 0.0  # not in `seconds`: images through the tower


@dataclasses.dataclass(frozen=True)
class Trained:
    """Local updates of a phase: by client, its adapters and its record for the log."""

    adapters: dict[int, dict[str, Tree]]
    records: dict[int, dict[str, Any]]
    timings: Timings = Timings()


@dataclasses.dataclass(frozen=True)
class State:
    """What a run carries from phase to phase."""

    population: Population
    server: dict[str, Any]
    client_steps: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    train_seconds: float = 0.0
    round: int = 1  # the round that is running or comes next
    phase: int = 0  # its phases that are done
    version: int = 0  # aggregations so far
    fetched: tuple[int, ...] = ()  # by client: the version of the server that its adapters are up to date with
    uploads: tuple[int, ...] = ()  # by client: how often it has uploaded
    norms: Mapping[str, list[float]] = dataclasses.field(default_factory=dict)  # of updates last accepted, by stage
    benched: tuple[int, ...] = ()  # clients whose upload was refused in this round
    quarantined: int = 0  # refused uploads, of the whole run
    partial: Trained | None = None  # of a phase that was interrupted


def stored(store: Store | None, client: int, state: AnyState) -> AnyState:
    """The state, its adapters written to the store if there is one."""
    return state if store is None else StoredState(store, store.write(client, state.adapters), state.stage,
                                                   state.rounds)


def prune(store: Store, population: Population) -> None:
    """Removes from the store what the population no longer refers to."""
    store.prune({state.key for state in population if isinstance(state, StoredState)})


def stack(trees: list[Tree]) -> Tree:
    """Trees of one structure → leaves [len(trees), …], in memory that a CPU device takes as it is."""
    def one(*leaves: Any) -> np.ndarray:
        rows = [np.asarray(leaf) for leaf in leaves]
        out = empty((len(rows), *rows[0].shape), np.result_type(*rows))
        return np.stack(rows, out=out)

    return jax.tree.map(one, *trees)


def row(tree: Tree, index: int) -> Tree:
    """Row `index` of every leaf."""
    return jax.tree.map(lambda leaf: leaf[index], tree)
