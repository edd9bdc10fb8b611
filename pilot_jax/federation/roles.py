"""Who owns which parameter: one table for gradients, optimizer labels, uploads, byte counts and checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from pilot_jax.models.lora import LORA_SUBTREES

Tree = Any  # a pytree of arrays: nested dicts with arrays as leaves
Mode = Literal["trained", "frozen", "carried", "-"]
Scope = Literal["base", "shared", "local", "received"]


@dataclasses.dataclass(frozen=True)
class Role:
    """One row of the table: a top-level subtree of a client's adapters (or, with scope base, of the model)."""

    subtree: str
    modes: Mapping[str, Mode]  # by stage; "carried": only the local rule uses it; "-": unused
    scope: Scope
    aggregated_by: str  # ata, per_task_mean, mean, never, …: the rule of `aggregate` for it


@dataclasses.dataclass(frozen=True)
class Roles:
    """The ownership table of a strategy."""

    rows: tuple[Role, ...]

    @property
    def adapter_rows(self) -> tuple[Role, ...]:
        return tuple(row for row in self.rows if row.scope != "base")

    def names(self, *, scope: Scope | None = None, stage: str | None = None,
              mode: Mode | None = None) -> tuple[str, ...]:
        """Returns the adapter subtrees with the given scope and/or the given mode in `stage`."""
        return tuple(
            row.subtree for row in self.adapter_rows
            if scope in (None, row.scope) and (mode is None or (stage is not None and row.modes[stage] == mode)))

    def check(self, adapters: Mapping[str, Tree]) -> None:
        """Checks that every subtree has exactly one row, and every row a subtree."""
        known = [row.subtree for row in self.adapter_rows]
        if len(set(known)) != len(known) or set(known) != set(adapters):
            raise AssertionError(f"adapters {sorted(adapters)} are not covered exactly once by roles {sorted(known)}")

    def select(self, adapters: Mapping[str, Tree], scope: Scope) -> dict[str, Tree]:
        """Returns the subtrees of one scope. `select(adapters, "shared")` is an upload, and nothing else can be one."""
        return {name: adapters[name] for name in self.names(scope=scope)}


def optimizer_labels(trained: Mapping[str, Tree]) -> dict[str, Tree]:
    """Returns labels for `optax.partition`: "lora" or "connector" at every trained leaf."""
    return {name: jax.tree.map(lambda _, n=name: "lora" if n in LORA_SUBTREES else "connector", tree)
            for name, tree in trained.items()}


BASE_ROWS = tuple(Role(name, {"plain": "frozen", "stage1": "frozen", "stage2": "frozen"}, "base", "never")
                  for name in ("vision_tower", "language_model"))


def num_parameters(tree: Tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: Tree) -> int:
    """Returns the size of a tree in bytes when it is transmitted, as float32 whatever its dtype in memory."""
    return 4 * num_parameters(tree)
