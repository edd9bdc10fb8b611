"""What a strategy is: an ownership table, a schedule, starting adapters, a rule for local steps, an aggregation.

Most strategies are a mixing matrix (`mix`), and perhaps a local rule and a server optimizer: that is all they define.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pilot_jax.config import StrategyConfig
from pilot_jax.federation import mixing
from pilot_jax.federation.client import PLAIN_RULE, LocalRule
from pilot_jax.federation.roles import BASE_ROWS, Role, Roles, Scope, num_bytes
from pilot_jax.models.lora import init_lora
from pilot_jax.models.spec import VlmSpec
from pilot_jax.parallel.processes import to_host


class Aggregated(NamedTuple):
    """What the server makes of a phase's uploads.

    downloads: shared subtrees with leaves [S, …], row s for client s; received subtrees with leaves that all
    clients get alike. mixing: what to log, among it `weights` [S, S] and, for ATA, `distances`.
    """

    downloads: dict[str, Any]
    server_state: dict[str, Any]
    mixing: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Base of all strategies: ordinary projector + LoRA, trained in plain LLaVA mode.

    Pilot trains R + 1 phases in R rounds; so does everyone, by a second phase in a client's first round.
    """

    config: StrategyConfig = dataclasses.field(default_factory=StrategyConfig)
    schedule: str = "first_time"

    first_stages = ("plain", "plain")  # a client's first round
    later_stages = ("plain",)  # its other rounds: a suffix of the first
    scope: ClassVar[Scope] = "shared"  # of projector and LoRA
    aggregated_by = "mean"
    one_model = True  # everyone starts a phase from the server's model; else from what it last had itself
    pools_data = False  # one client that has everybody's data

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def stages(self, first_time: bool, round_: int) -> tuple[str, ...]:
        """The phases of a client's round. A baseline's extra phase falls into round 1, where everyone is new: later
        on, a phase of newcomers alone would replace everyone's model by theirs."""
        return self.first_stages if round_ == 1 or self.schedule == "every_round" else self.later_stages

    def roles(self) -> Roles:
        return Roles((*BASE_ROWS,
                      Role("text_adapter", {"plain": "trained"}, self.scope, self.aggregated_by),
                      Role("projector", {"plain": "trained"}, self.scope, self.aggregated_by)))

    def initial_adapters(self, key: jax.Array, projector: Mapping, model: VlmSpec, rank: int,
                         num_tasks: int) -> dict[str, Any]:
        """What every client starts from. The same for all: LoRA distances would otherwise measure the random start."""
        return {"text_adapter": init_lora(key, model.text, rank), "projector": float32(projector)}

    def local_rule(self) -> LocalRule:
        """What its clients do to their gradients."""
        return PLAIN_RULE

    def server_optimizer(self) -> optax.GradientTransformation | None:
        """Turns (server model − mixed uploads) into the server's step; None takes the mixed uploads as they are."""
        return None

    def initial_server_state(self, adapters: Mapping[str, Any], sizes: np.ndarray, tasks: np.ndarray,
                             ) -> dict[str, Any]:
        """`adapters`: the shared and received subtrees at the start; sizes, tasks: int [K], of all clients."""
        if not self.one_model:
            return {}
        model = {n: adapters[n] for n in self.roles().names(scope="shared") if n in adapters}
        optimizer = self.server_optimizer()
        return {"model": model} | ({} if optimizer is None else {"optimizer": optimizer.init(model)})

    def fetch(self, adapters: dict[str, Any], server_state: Mapping[str, Any], task: int) -> dict[str, Any]:
        """A client's adapters at the start of a phase: what it has, and what the server now holds for it."""
        return {**adapters, **server_state["model"]} if self.one_model else adapters

    def mix(self, uploads: Mapping[str, Any], sizes: np.ndarray, tasks: np.ndarray, client_ids: np.ndarray,
            server_state: Mapping[str, Any]) -> jax.Array:
        """The mixing matrix [S, S] of all shared subtrees; default FedAvg's, n_j/Σn in every row."""
        return mixing.mean(sizes)

    def combine(self, uploads: Mapping[str, Any], matrix: jax.Array) -> dict[str, Any]:
        """Mixed uploads, leaves [M, …], for the rows of `matrix` [M, S]; for aggregations that no matrix expresses.
        Of equal rows, as strategies of one model have, there is one."""
        return mixing.apply(matrix, dict(uploads))

    def aggregate(self, uploads: Mapping[str, Any], sizes: np.ndarray, tasks: np.ndarray, client_ids: np.ndarray,
                  server_state: Mapping[str, Any]) -> Aggregated:
        """uploads: the shared subtrees, leaves [S, …]; sizes, tasks, client_ids: int [S].

        `server_state["round"]` is the current round, from 1.
        """
        matrix, state = to_host(self.mix(uploads, sizes, tasks, client_ids, server_state)), dict(server_state)
        downloads = self.combine(uploads, matrix[:1] if self.one_model else matrix)
        if self.one_model:
            model = to_host(jax.tree.map(lambda leaf: leaf[0], downloads))
            optimizer = self.server_optimizer()
            if optimizer is not None:
                # Reddi et al., 2021: the mean change of the clients, negated, is the server's gradient.
                pseudo_gradient = jax.tree.map(jnp.subtract, state["model"], model)
                steps, state["optimizer"] = optimizer.update(pseudo_gradient, state["optimizer"], state["model"])
                model = to_host(optax.apply_updates(jax.tree.map(jnp.asarray, state["model"]), steps))
            state["model"] = model
            downloads = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (len(sizes), *leaf.shape)), model)
        return Aggregated(downloads, state, {"weights": matrix})

    def sent_bytes(self, adapters: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
        """(up, down) bytes per subtree for one client and phase, as float32."""
        up = {name: num_bytes(tree) for name, tree in self.roles().select(adapters, "shared").items()}
        return up, dict(up)


def float32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)
