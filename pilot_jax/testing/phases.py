"""One phase without a round around it, for tests and benchmarks of local training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pilot_jax.federation.executor import Executor, Work
from pilot_jax.federation.roles import Tree
from pilot_jax.federation.state import Federation


def train_phase(fed: Federation, adapters: Mapping[int, dict[str, Tree]], round_: int, stage: str, label: str,
                executor: Executor | None = None) -> tuple[dict[int, dict[str, Tree]], list[dict[str, Any]]]:
    """Trains the clients in `adapters` for one phase. Returns their new adapters, and a record for each."""
    done, = (executor or Executor()).train([Work(fed, adapters, round_, stage, label)])
    return done.adapters, list(done.records.values())
