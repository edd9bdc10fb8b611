"""The parts of a run that planning needs, of which nothing is allocated and no weights are read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pilot_jax.config import DataConfig, EvalConfig, FederationConfig, ModelConfig, SystemConfig, TrainConfig
from pilot_jax.federation.strategies import Strategy
from pilot_jax.models.spec import VlmSpec


@dataclasses.dataclass(frozen=True)
class Outline:
    """The parts of a run that planning needs: the model's shapes, the strategy, and sections of the config."""

    spec: VlmSpec  # shapes of the base model
    text_directory: Path  # folder of the tokenizer
    strategy: Strategy
    model: ModelConfig
    data: DataConfig
    settings: FederationConfig
    train: TrainConfig
    eval: EvalConfig
    system: SystemConfig
