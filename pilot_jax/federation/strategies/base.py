"""What a strategy is: an ownership table, a schedule, starting adapters, a rule for local steps, an aggregation.

Most strategies are a mixing matrix (`mix`), and perhaps a local rule and a server optimizer: that is all they define.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pilot_jax.config import STRATEGY_PARAMS, StrategyParams
from pilot_jax.federation import mixing
from pilot_jax.federation.client import PLAIN_RULE, LocalRule
from pilot_jax.federation.cohort import Cohort
from pilot_jax.federation.roles import BASE_ROWS, Role, Roles, Scope, Tree, num_bytes
from pilot_jax.models.lora import init_lora
from pilot_jax.models.spec import VlmSpec
from pilot_jax.parallel.processes import to_host


class Aggregated(NamedTuple):
    """What the server makes of a phase's uploads.

    downloads: shared subtrees with leaves [S, …], row s for client s; received subtrees with leaves that all
    clients get alike. server: its state afterwards. mixing: arrays to log, among them `weights` [S, S] and, for ATA,
    `distances` [S, S].
    """

    downloads: dict[str, Tree]
    server: dict[str, Any]
    mixing: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Base of all strategies: ordinary projector and LoRA, trained in plain LLaVA mode, averaged.

    Pilot trains R + 1 phases in R rounds; so does everyone, by a second phase in a client's first round.
    """

    params: Any = None  # of the class' own `Params`; None: their defaults
    schedule: str = "first_time"

    Params: ClassVar[type[StrategyParams]] = StrategyParams  # the keys of the section `strategy` beside `name`
    first_stages: ClassVar[Any] = ("plain", "plain")  # a client's first round
    later_stages: ClassVar[Any] = ("plain",)  # its other rounds: a suffix of the first
    scope: ClassVar[Scope] = "shared"  # of projector and LoRA
    aggregated_by: ClassVar[str] = "mean"
    one_model: ClassVar[bool] = True  # everyone starts a phase from the server's model; else from what it last had
    pools_data: ClassVar[bool] = False  # one client that has everybody's data

    def __post_init__(self) -> None:
        params = self.Params() if self.params is None else self.params
        object.__setattr__(self, "params", params.model_copy(update={"name": self.name}))

    @property
    def name(self) -> str:
        return name_of(type(self))

    def stages(self, first_time: bool, round_: int) -> tuple[str, ...]:
        """The phases of a client's round. A baseline's extra phase falls into round 1, where everyone is new: later
        on, a phase of newcomers alone would replace everyone's model by theirs."""
        return self.first_stages if round_ == 1 or self.schedule == "every_round" else self.later_stages

    def roles(self) -> Roles:
        """The ownership table: who trains, freezes, uploads and receives which subtree in which stage."""
        return Roles((*BASE_ROWS,
                      Role("text_adapter", {"plain": "trained"}, self.scope, self.aggregated_by),
                      Role("projector", {"plain": "trained"}, self.scope, self.aggregated_by)))

    def initial_adapters(self, key: jax.Array, projector: Mapping[str, Tree], model: VlmSpec, rank: int,
                         num_tasks: int) -> dict[str, Tree]:
        """What every client starts from. The same for all: LoRA distances would otherwise measure the random start."""
        return {"text_adapter": init_lora(key, model.text, rank), "projector": float32(projector)}

    def warning(self) -> str | None:
        """What a user should know before a run with these parameters; None: nothing."""
        return None

    def local_rule(self) -> LocalRule:
        """What its clients do to their gradients."""
        return PLAIN_RULE

    def server_optimizer(self) -> optax.GradientTransformation | None:
        """Turns (server model − mixed uploads) into the server's step; None takes the mixed uploads as they are."""
        return None

    def initial_server_state(self, adapters: Mapping[str, Tree], sizes: np.ndarray, tasks: np.ndarray,
                             ) -> dict[str, Any]:
        """`adapters`: the shared and received subtrees at the start; sizes, tasks: int [K], of all clients."""
        if not self.one_model:
            return {}
        model = {n: adapters[n] for n in self.roles().names(scope="shared") if n in adapters}
        optimizer = self.server_optimizer()
        return {"model": model} | ({} if optimizer is None else {"optimizer": optimizer.init(model)})

    def fetch(self, adapters: dict[str, Tree], server: Mapping[str, Any], task: int) -> dict[str, Tree]:
        """A client's adapters at the start of a phase: what it has, and what the server now holds for it."""
        return {**adapters, **server["model"]} if self.one_model else adapters

    def mix(self, cohort: Cohort) -> jax.Array:
        """The mixing matrix [S, S] of all shared subtrees; default FedAvg's, n_j/Σn in every row."""
        return mixing.mean(cohort.sizes)

    def combine(self, cohort: Cohort, weights: jax.Array) -> dict[str, Tree]:
        """Mixed uploads, leaves [M, …], for the rows of `weights` [M, S]; for aggregations that no matrix expresses.

        Strategies of one model have equal rows, of which this gets the first alone.
        """
        return mixing.apply(weights, dict(cohort.uploads))

    def aggregate(self, cohort: Cohort, server: Mapping[str, Any]) -> Aggregated:
        """What each client of the cohort gets back, and the server's state after it."""
        weights, state = to_host(self.mix(cohort)), dict(server)
        downloads = self.combine(cohort, weights[:1] if self.one_model else weights)
        if self.one_model:
            model = to_host(jax.tree.map(lambda leaf: leaf[0], downloads))
            model, state = self._server_step(model, state)
            downloads = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (len(cohort), *leaf.shape)), model)
        return Aggregated(downloads, state, {"weights": weights})

    def _server_step(self, mixed: dict[str, Tree], state: dict[str, Any]) -> tuple[dict[str, Tree], dict[str, Any]]:
        """The server's model after its optimizer, if it has one (Reddi et al., 2021: the mean change of the clients,
        negated, is the server's gradient)."""
        optimizer = self.server_optimizer()
        if optimizer is not None:
            pseudo_gradient = jax.tree.map(jnp.subtract, state["model"], mixed)
            steps, state["optimizer"] = optimizer.update(pseudo_gradient, state["optimizer"], state["model"])
            mixed = to_host(optax.apply_updates(jax.tree.map(jnp.asarray, state["model"]), steps))
        state["model"] = mixed
        return mixed, state

    def sent_bytes(self, adapters: Mapping[str, Tree]) -> tuple[dict[str, int], dict[str, int]]:
        """(up, down) bytes per subtree for one client and phase, as float32."""
        up = {name: num_bytes(tree) for name, tree in self.roles().select(adapters, "shared").items()}
        return up, dict(up)


def float32(tree: Tree) -> Tree:
    """The tree with float32 leaves."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


STRATEGIES: dict[str, type[Strategy]] = {}
_Class = TypeVar("_Class", bound=type[Strategy])


def name_of(strategy: type[Strategy]) -> str:
    """The name under which a class is registered; else "module:Class"."""
    known = next((name for name, other in STRATEGIES.items() if other is strategy), None)
    return known or f"{strategy.__module__}:{strategy.__qualname__}"


def register(name: str = "") -> Callable[[_Class], _Class]:
    """A class decorator that makes `strategy.name: NAME` choose the class (default: "module:Class")."""
    def add(strategy: _Class) -> _Class:
        key = name or name_of(strategy)
        STRATEGIES[key], STRATEGY_PARAMS[key] = strategy, strategy.Params
        return strategy

    return add
