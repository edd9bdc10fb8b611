"""Federated algorithms, one file each with its citation. A strategy may import roles, mixing and initial adapters.

To add one: subclass `base.Strategy` in a new file and name it in `STRATEGIES` (or pass the object to `simulate`).
"""

from __future__ import annotations

from pilot_jax.config import StrategyConfig
from pilot_jax.federation.strategies.base import Strategy
from pilot_jax.federation.strategies.fedavg import FedAvg
from pilot_jax.federation.strategies.local import Local
from pilot_jax.federation.strategies.pilot import Pilot

STRATEGIES: dict[str, type[Strategy]] = {"pilot": Pilot, "fedavg": FedAvg, "local": Local}


def make_strategy(config: StrategyConfig, schedule: str) -> Strategy:
    return STRATEGIES[config.name](config, schedule)
