"""The cohort of a round: which clients take part, their uploads as the server receives them, and what it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int

from pilot_jax.config import FederationConfig
from pilot_jax.errors import InputError
from pilot_jax.federation.randomness import client_generator
from pilot_jax.federation.roles import Tree


@dataclasses.dataclass(frozen=True)
class Cohort:
    """The uploads of one phase, with everything else that an aggregation may use."""

    uploads: Mapping[str, Tree]  # the shared subtrees, leaves [S, …]
    sizes: Int[Array | np.ndarray, " S"]  # n_k, numbers of training samples; 1 for all with privacy
    tasks: Int[Array | np.ndarray, " S"]  # index of each client's task
    ids: Int[Array | np.ndarray, " S"]  # stable number of each client
    round: int  # from 1
    starts: Mapping[str, Tree] | None = None  # `uploads` before the phase, for a strategy that `needs_starts`
    new: Bool[np.ndarray, " S"] | None = None  # which clients take part for the first time; None: not known
    ratios: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # δ²/σ² [S, S] of `halves`, by subtree

    @property
    def ratio(self) -> np.ndarray | None:
        """δ²/σ² [S, S] of LoRA, for a strategy with `splits_halves`."""
        return self.ratios.get("text_adapter")

    def __len__(self) -> int:
        """Returns S."""
        return len(self.sizes)


class Aggregated(NamedTuple):
    """The server's results of a phase.

    downloads: shared subtrees with leaves [S, …], row s for client s; received subtrees with leaves that are equal for
    all clients. server: its state afterwards. mixing: arrays to log, among them `weights` [S, S] and, for ATA,
    `distances` [S, S]. Of a cohort above `mixing.DENSE` ATA logs `weights` [S, M + 1]; `columns` [S, M + 1], positions
    of the clients that the weights belong to, the client itself first; and `distances` [S, M] of the others.
    """

    downloads: dict[str, Tree]
    server: dict[str, Any]
    mixing: dict[str, np.ndarray]


def participants(settings: FederationConfig, names: Sequence[str], round_: int, seed: int) -> list[int]:
    """Returns the indices of the clients that take part in `round_` (from 1), in ascending order.

    Raises:
        InputError: the settings name an unknown client, or leave no client that could take part.
    """
    late = sorted(set(settings.joins) - set(names))
    if late:
        raise InputError(f"federation.joins: unknown client {late[0]!r}. Known: {', '.join(names)}.")
    members = [i for i, name in enumerate(names) if settings.joins.get(name, 1) <= round_]
    uniform = settings.participation == "uniform"
    listed = [] if settings.participation == "uniform" else [e for e in settings.participation if e.round == round_]
    if listed:
        unknown = sorted(set(listed[0].clients) - set(names))
        if unknown or not listed[0].clients:
            wrong = f"unknown client {unknown[0]!r}" if unknown else "no client is listed"
            raise InputError(f"federation.participation: round {round_}: {wrong}. Known: {', '.join(names)}.")
        members = sorted(names.index(name) for name in set(listed[0].clients))
    if not members:
        raise InputError(f"federation.joins: no client has joined by round {round_}. Let one join by then.")
    if uniform and settings.clients_per_round is not None and settings.clients_per_round < len(members):
        rng = client_generator(seed, "server", round_, "sampling")
        members = sorted(rng.choice(members, settings.clients_per_round, replace=False).tolist())
    if settings.dropout > 0:
        draws = {i: client_generator(seed, names[i], round_, "dropout").random() for i in members}
        staying = [i for i in members if draws[i] >= settings.dropout]
        members = staying or [max(members, key=lambda i: draws[i])]
    return members
