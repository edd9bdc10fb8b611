"""The two parts of a run: the federation, which does not change, and the state, which does."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pilot_jax.config import FederationConfig, PrivacyConfig, StragglersConfig, TrainConfig, with_scaled_rates
from pilot_jax.data.arrays import ClientData, num_steps
from pilot_jax.errors import InputError
from pilot_jax.federation.cohort import participants
from pilot_jax.federation.lora_options import fitted, with_rank
from pilot_jax.federation.phases import PLAIN_RULE, PhaseSpec, phase_spec
from pilot_jax.federation.privacy import multiplier
from pilot_jax.federation.randomness import client_generator
from pilot_jax.federation.roles import Tree
from pilot_jax.federation.strategies.base import Strategy
from pilot_jax.models.pretrained import PretrainedModel
from pilot_jax.parallel.host_memory import empty
from pilot_jax.parallel.mesh import mesh_of
from pilot_jax.parallel.processes import to_host
from pilot_jax.storage import Key, Store

Tamper = Callable[[str, int, dict, dict], dict]  # (client, round, upload, shared subtrees at its start) -> upload


class _History:
    """What all states of a client have in common."""

    rounds: int  # number of rounds in which it has taken part

    @property
    def is_new(self) -> bool:
        return self.rounds == 0


@dataclasses.dataclass(frozen=True)
class ClientState(_History):
    """A client's adapters and history, in memory. Trees that clients share (initial adapters, the bank) are stored
    once, by reference."""

    adapters: dict[str, Tree]  # NumPy leaves, without client axis
    stage: str = "none"  # that of its model: the last, or the strategy's `answering_stage`; "none" before its first
    rounds: int = 0


@dataclasses.dataclass(frozen=True)
class StoredState(_History):
    """A `ClientState` whose adapters are on disk and are read on access."""

    store: Store
    key: Key
    stage: str
    rounds: int

    @property
    def adapters(self) -> dict[str, Tree]:
        return self.store.read(self.key)


@dataclasses.dataclass(frozen=True)
class CurrentState(_History):
    """A client's state with the server's current model, which is put into its adapters on access."""

    fed: Federation
    state: AnyState
    server: Mapping[str, Any]
    task: int  # index of the client's task
    stage: str
    rounds: int

    @property
    def adapters(self) -> dict[str, Tree]:
        return to_host(up_to_date(self.fed.strategy, self.task, self.state.adapters, self.server))


AnyState = ClientState | StoredState | CurrentState
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
    rank: int = 8  # LoRA rank; the largest, if the clients' differ
    ranks: tuple[int, ...] | None = None  # LoRA rank of each client, if they differ
    store: Store | None = None  # holds clients' adapters and data, if they are not in memory
    spread_uploads: bool = False  # whether a cohort's uploads are divided among the devices of the mesh
    most_uploads: int = 0  # of any client in the run, if none is refused; for `settings.privacy`
    tamper: Tamper | None = None  # changes the uploads of simulated attackers
    unpooled: tuple[ClientData, ...] = ()  # the clients whose data the strategy pools; empty if it pools none
    secret_noise: bool = False  # whether the seed of `settings.privacy` is ignored, as a server elsewhere knows it
    plain_steps: bool = False  # whether clients follow their loss alone, without the strategy's local rule

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

    def rank_of(self, client: int) -> int:
        """Returns the LoRA rank of a client."""
        return self.rank if self.ranks is None else self.ranks[client]

    def bytes_of(self, direction: int, stage: str, adapters: Mapping[int, dict[str, Tree]],
                 clients: Sequence[int]) -> dict[str, int]:
        """Returns the bytes of each subtree that `clients` together upload (direction 0) or download (1) in a phase."""
        out: dict[str, int] = {}
        counts = collections.Counter({self.rank_of(c): 0 for c in adapters})
        counts.update(self.rank_of(c) for c in clients)
        for rank, count in counts.items():  # clients of one rank have adapters of the same size
            one = next(c for c in adapters if self.rank_of(c) == rank)
            for name, size in self.strategy.traffic(adapters[one], stage, rank, self.rank)[direction].items():
                out[name] = out.get(name, 0) + size * count
        return out

    def train_of(self, client: int) -> TrainConfig:
        """Returns the settings of a client's local training."""
        return self.train.of_client(self.clients[client].name)

    def full_steps(self, client: int) -> int:
        """Returns the number of steps of a client's phase, if the client is no straggler."""
        return num_steps(self.clients[client].size, self.train_of(client).batch_size, self.settings.local_epochs,
                         self.settings.local_steps)

    def steps(self, client: int, round_: int) -> int:
        """Returns S_k, the number of steps of a client's phases in `round_`."""
        slow, count = self.settings.stragglers, self.full_steps(client)
        if slow.share > 0:
            rng = client_generator(self.seed, self.clients[client].name, round_, "straggling")
            if rng.random() < slow.share:
                return max(1, math.ceil(slow.steps * count))
        return count

    def weight(self, client: int) -> int:
        """Returns the client's weight in means: n_k, its number of samples; 1 with privacy, as n_k is not noised."""
        return self.clients[client].size if self.settings.privacy.clip is None else 1

    @functools.cached_property
    def noise_multiplier(self) -> float:
        """z of `settings.privacy`; 0 without privacy, or if the strategy uploads nothing.

        Raises:
            InputError: the strategy measures noise on halves of the data, which noised uploads hide; or layers have
                LoRA ranks of their own; or several processes have no common seed.
        """
        privacy = self.settings.privacy
        if privacy.clip is not None and self.strategy.splits_halves:
            raise InputError(f"federation.privacy.clip: {self.strategy.name} measures how noisy updates are, which is "
                             "hidden by the noise of privacy. Set it to null, or use another strategy, such as pilot.")
        if privacy.clip is not None and self.strategy.layer_ranks:
            raise InputError("model.lora.layer_ranks: the noise of federation.privacy would give every layer the "
                             "largest rank. Remove one of the two.")
        if privacy.clip is not None and privacy.seed is None and jax.process_count() > 1:
            raise InputError("federation.privacy.seed: the processes must draw the same noise. Set a seed, which only "
                             "they know.")
        if privacy.clip is None or not self.strategy.ownership().names(scope="shared"):
            return 0.0
        return multiplier(privacy, self.most_uploads)

    def phase(self, stage: str) -> PhaseSpec:
        """Returns the static part of a phase of `stage`."""
        rule = PLAIN_RULE if self.plain_steps else self.strategy.local_rule()
        return phase_spec(self.model.module, self.strategy.ownership(), stage, self.train, rule)

    @property
    def last_stage(self) -> str:
        """The stage of the last phase of a run."""
        return self.strategy.stages(False, max(2, self.settings.rounds))[-1]

    def finetuning(self) -> Federation | None:
        """Returns the federation as it fine-tunes after the last round; None if it does not.

        Its clients are those with data of their own, also where the strategy pools them. Nothing is uploaded, so there
        are no privacy noise, stragglers, attackers and local rules, which correct for averaging.
        """
        settings, steps = self.settings, self.settings.finetune_steps
        if steps is None and not self.strategy.finetunes:
            return None
        update: dict[str, Any] = {"privacy": PrivacyConfig(), "stragglers": StragglersConfig()}
        if steps is not None:
            update["local_steps"] = steps
        return dataclasses.replace(self, settings=settings.model_copy(update=update), plain_steps=True, tamper=None,
                                   train=with_scaled_rates(self.train, settings.finetune_rate),
                                   clients=self.unpooled or self.clients, unpooled=())


def most_uploads(fed: Federation) -> int:
    """Returns the largest number of uploads of one client in the whole run, if none is refused."""
    uploads = [0] * len(fed.clients)
    for (stage, client), phases in _all_phases(fed).items():
        uploads[client] += len(phases) if fed.strategy.ownership().uploaded(stage) else 0
    return max(uploads)


def all_steps(fed: Federation) -> dict[tuple[str, int], int]:
    """Returns the steps of the whole run, fine-tuning included, by stage and client; they are known before it starts.

    Fine-tuning of clients whose data are pooled counts for the one client that has them."""
    out = {(stage, c): sum(fed.steps(c, round_) for round_ in phases)
           for (stage, c), phases in _all_phases(fed).items()}
    if (tuning := fed.finetuning()) is not None:
        for c in range(len(tuning.clients)):
            key = fed.last_stage, 0 if fed.unpooled else c
            out[key] = out.get(key, 0) + tuning.full_steps(c)
    return out


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


def up_to_date(strategy: Strategy, task: int, adapters: dict[str, Tree], server: Mapping[str, Any]) -> dict[str, Tree]:
    """Returns a client's adapters with the server's current subtrees for it, which are fitted to the client's rank.

    task: index of the client's task.
    """
    new = strategy.fetch(adapters, server, task)
    return {**new, **fitted({n: t for n, t in new.items() if t is not adapters.get(n)}, adapters)}


def initial_population(fed: Federation, adapters: dict[str, Tree]) -> Population:
    """Returns the clients before their first round; with ranks that differ, the LoRA of each is cut to its own."""
    if fed.ranks is None:
        return (ClientState(adapters),) * len(fed.clients)
    by_rank = {rank: ClientState(with_rank(adapters, rank, fed.rank)) for rank in set(fed.ranks)}
    return tuple(by_rank[rank] for rank in fed.ranks)


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
