"""Per-client state, in memory. Trees that clients share (initial adapters, the bank) are stored once, by reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class ClientState:
    adapters: dict[str, Any]  # NumPy leaves, without client axis
    stage: str = "none"  # the last stage completed; "none" before a client first takes part
    rounds: int = 0  # rounds taken part in

    @property
    def is_new(self) -> bool:
        return self.rounds == 0


def to_host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def stack(trees: list[Any]) -> Any:
    """Trees of one structure → leaves [len(trees), …]."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)


def row(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)
