"""Who owns which parameter: one table for gradients, optimizer labels, uploads, byte counts and checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pilot_jax.models.lora import LORA_SUBTREES

Tree = Any  # a pytree of arrays: nested dicts with arrays as leaves
Mode = Literal["trained", "frozen", "carried", "anchor", "-"]
Scope = Literal["base", "shared", "local", "received"]


@dataclasses.dataclass(frozen=True)
class Role:
    """One row of the table: a top-level subtree of a client's adapters (or, with scope base, of the model).

    In a stage, the model reads what is trained or frozen. The local rule alone reads what is carried, which it may
    change, and anchors, which stay as they are. "-" is unused.
    """

    subtree: str
    modes: Mapping[str, Mode]  # by stage
    scope: Scope
    aggregated_by: str  # ata, per_task_mean, mean, never, …: the rule of `aggregate` for it
    read_as: str = ""  # the subtree as which the model reads it, if not under its own name

    @property
    def name_in_model(self) -> str:
        return self.read_as or self.subtree


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
        """Checks that every subtree has exactly one row, every row a subtree, and the model one subtree for a name."""
        known = [row.subtree for row in self.adapter_rows]
        if len(set(known)) != len(known) or set(known) != set(adapters):
            raise AssertionError(f"adapters {sorted(adapters)} are not covered exactly once by roles {sorted(known)}")
        for stage in {stage for row in self.adapter_rows for stage in row.modes}:
            read = [r.name_in_model for r in self.adapter_rows if r.modes.get(stage) in ("trained", "frozen")]
            if len(set(read)) != len(read):
                raise AssertionError(f"in {stage}, two subtrees have one name in the model: {sorted(read)}")

    def select(self, adapters: Mapping[str, Tree], scope: Scope) -> dict[str, Tree]:
        """Returns the subtrees of one scope."""
        return {name: adapters[name] for name in self.names(scope=scope)}

    def uploaded(self, stage: str) -> tuple[str, ...]:
        """Returns the shared subtrees that a phase of `stage` changes, which are trained or carried in it."""
        return tuple(row.subtree for row in self.adapter_rows
                     if row.scope == "shared" and row.modes[stage] in ("trained", "carried"))

    def upload(self, adapters: Mapping[str, Tree], stage: str) -> dict[str, Tree]:
        """Returns what a client uploads after a phase of `stage`. Nothing else can be an upload."""
        return {name: adapters[name] for name in self.uploaded(stage)}

    def read_by_model(self, adapters: Mapping[str, Tree], stage: str) -> dict[str, Tree]:
        """Returns the subtrees that the model reads in `stage`, under the names by which it knows them."""
        return {row.name_in_model: adapters[row.subtree] for row in self.adapter_rows
                if row.modes[stage] in ("trained", "frozen")}


def optimizer_labels(trained: Mapping[str, Tree]) -> dict[str, Tree]:
    """Returns labels for `optax.partition`: "lora" or "connector" at every trained leaf."""
    return {name: jax.tree.map(lambda _, n=name: "lora" if n in LORA_SUBTREES else "connector", tree)
            for name, tree in trained.items()}


BASE_ROWS = tuple(Role(name, {"plain": "frozen", "stage1": "frozen", "stage2": "frozen"}, "base", "never")
                  for name in ("vision_tower", "language_model"))


def float32(tree: Tree) -> Tree:
    """Returns the tree with float32 leaves."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def num_parameters(tree: Tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: Tree) -> int:
    """Returns the size of a tree in bytes when it is transmitted, as float32 whatever its dtype in memory."""
    return 4 * num_parameters(tree)
