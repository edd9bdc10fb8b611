"""Federated algorithms, one file each with its citation. A strategy may import roles, mixing, local rules and initial
adapters.

To add one: subclass `base.Strategy` in a new file and name it in `STRATEGIES` (or pass the object to `simulate`).
"""

from __future__ import annotations

from pilot_jax.config import StrategyConfig
from pilot_jax.federation.strategies.base import Strategy
from pilot_jax.federation.strategies.fedavg import FedAvg, FedProx
from pilot_jax.federation.strategies.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from pilot_jax.federation.strategies.lora_sharing import FedDpa, FedSaLora, FfaLora
from pilot_jax.federation.strategies.pilot import Pilot
from pilot_jax.federation.strategies.references import Centralised, Local
from pilot_jax.federation.strategies.robust import Median, TrimmedMean
from pilot_jax.federation.strategies.scaffold import Scaffold
from pilot_jax.federation.strategies.similarity import Similarity

STRATEGIES: dict[str, type[Strategy]] = {
    "pilot": Pilot, "local": Local, "centralised": Centralised, "fedavg": FedAvg, "fedprox": FedProx,
    "fedavgm": FedAvgM, "fedadam": FedAdam, "fedyogi": FedYogi, "fedadagrad": FedAdagrad, "scaffold": Scaffold,
    "ffa_lora": FfaLora, "fedsa_lora": FedSaLora, "feddpa": FedDpa, "similarity": Similarity, "median": Median,
    "trimmed_mean": TrimmedMean,
}


def make_strategy(config: StrategyConfig, schedule: str) -> Strategy:
    return STRATEGIES[config.name](config, schedule)
