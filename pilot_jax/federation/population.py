"""Per-client state: in memory, where trees that clients share (initial adapters, the bank) are there once, by
reference, or in a store on disk."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from pilot_jax.hosts import empty
from pilot_jax.store import Key, Store


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
