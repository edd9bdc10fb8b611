"""What a run is made of: the federation, which does not change, and the state, which does."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from pilot_jax.config import Config
from pilot_jax.data.arrays import ClientData, num_steps
from pilot_jax.federation.client import Phase
from pilot_jax.federation.privacy import multiplier
from pilot_jax.federation.strategies.base import Strategy
from pilot_jax.models.pretrained import PretrainedModel
from pilot_jax.parallel.host_memory import empty
from pilot_jax.parallel.mesh import mesh_of
from pilot_jax.storage import Key, Store


@dataclasses.dataclass(frozen=True)
class ClientState:
    adapters: dict[str, Any]  # NumPy leaves, without client axis
    stage: str = "none"  # the last stage completed; "none" before a client first takes part
    rounds: int = 0  # rounds taken part in

    @property
    def is_new(self) -> bool:
        return self.rounds == 0


@dataclasses.dataclass(frozen=True)
class StoredState:
    """A `ClientState` whose adapters are read when they are asked for."""

    store: Store
    key: Key
    stage: str
    rounds: int

    @property
    def is_new(self) -> bool:
        return self.rounds == 0

    @property
    def adapters(self) -> dict[str, Any]:
        return self.store.read(self.key)


AnyState = ClientState | StoredState
Population = tuple[AnyState, ...]
Tamper = Callable[[str, int, dict, dict], dict]  # (client, round, upload, what it began with) -> upload


@dataclasses.dataclass(frozen=True)
class Federation:
    """What does not change during a run."""

    config: Config
    strategy: Strategy
    model: PretrainedModel
    clients: tuple[ClientData, ...]  # ordered by name; a client's index is its id in mixing
    tasks: tuple[str, ...]  # global task order
    pool_of: tuple[ClientData, ...] = ()  # the clients whose data the one client has, where a strategy pools them
    store: Store | None = None  # where clients' adapters and data are, if not in memory
    most_uploads: int = 0  # of one client in the whole run, if none is refused; where `federation.privacy` asks
    tamper: Tamper | None = None  # what simulated attackers do

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The mesh on which the base lies, on which clients are trained and answer; None: one device."""
        return mesh_of(self.model.base)

    @property
    def server_mesh(self) -> jax.sharding.Mesh | None:
        """Over what the uploads of a cohort are spread; None where devices share one memory."""
        return self.mesh if self.config.system.mesh.devices > 1 else None

    @property
    def examined(self) -> tuple[ClientData, ...]:
        """The clients on whose data models are scored."""
        return self.pool_of or self.clients

    def model_of(self, examined: int) -> int:
        """Whose model answers for an examined client."""
        return 0 if self.pool_of else examined

    def task_index(self, client: int) -> int:
        return 0 if self.pool_of else self.tasks.index(self.clients[client].task)

    def full_steps(self, client: int) -> int:
        """The steps of a client's phase, if it does not straggle."""
        f = self.config.federation
        each = None if f.local_steps is None else f.local_steps * max(len(self.pool_of), 1)
        return num_steps(self.clients[client].size, self.config.train.batch_size, f.local_epochs, each)

    def steps(self, client: int, round_: int) -> int:
        """S_k: the steps of a client's phases in `round_`."""
        slow, count = self.config.federation.stragglers, self.full_steps(client)
        if slow.share > 0:
            rng = client_generator(self.config.system.seed, self.clients[client].name, round_, "straggling")
            if rng.random() < slow.share:
                return max(1, math.ceil(slow.steps * count))
        return count

    @functools.cached_property
    def noise_multiplier(self) -> float:
        """z of `federation.privacy`: 0 without it, and where a strategy uploads nothing."""
        privacy = self.config.federation.privacy
        if privacy.clip is None or not self.strategy.roles().names(scope="shared"):
            return 0.0
        return multiplier(privacy, self.most_uploads)

    def phase(self, stage: str) -> Phase:
        return Phase(self.model.module, self.strategy.roles(), stage, self.config.train, self.strategy.local_rule())


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
    uploads: tuple[int, ...] = ()  # how often each client has sent something
    norms: Mapping[str, list[float]] = dataclasses.field(default_factory=dict)  # of updates last accepted, by stage
    benched: tuple[int, ...] = ()  # clients whose upload was refused in this round
    quarantined: int = 0  # refused uploads, of the whole run
    partial: Any = None  # `Trained` of a phase that was interrupted


def client_generator(seed: int, client: str, round_: int, phase: str) -> np.random.Generator:
    """A client's stream of randomness: fold_in(root, client, round, phase), whoever else takes part.

    Names, not positions, go in, so that a client's draws do not depend on the others.
    """
    key = jax.random.key(seed)
    for part in (client, str(round_), phase):
        key = jax.random.fold_in(key, int.from_bytes(hashlib.sha256(part.encode()).digest()[:4], "big"))
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def stored(store: Store | None, client: int, state: AnyState) -> AnyState:
    """The state, handed to the store if there is one."""
    return state if store is None else StoredState(store, store.write(client, state.adapters), state.stage,
                                                   state.rounds)


def prune(store: Store, population: Population) -> None:
    """Forget what the population no longer refers to."""
    store.prune({state.key for state in population if isinstance(state, StoredState)})


def stack(trees: list[Any]) -> Any:
    """Trees of one structure → leaves [len(trees), …]."""
    def one(*leaves: Any) -> np.ndarray:
        rows = [np.asarray(leaf) for leaf in leaves]
        out = empty((len(rows), *rows[0].shape), np.result_type(*rows))
        return np.stack(rows, out=out)

    return jax.tree.map(one, *trees)


def row(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)
