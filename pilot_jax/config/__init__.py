"""The configuration: its schema, and the functions that read and check files. Imports only `errors` and `words`."""

from pilot_jax.config.lora import LoraConfig, client_ranks, combine_field
from pilot_jax.config.model import BOTH_OR_NEITHER, ModelConfig, PartsConfig
from pilot_jax.config.own_code import import_own, use_modules
from pilot_jax.config.reading import (
    apply_overrides,
    differences,
    json_schema,
    known_keys,
    load_config,
    parse_config,
    parse_strategy,
    read_settings,
)
from pilot_jax.config.schema import (
    STRATEGY_PARAMS,
    Config,
    EvalConfig,
    FederationConfig,
    MeshConfig,
    ParticipationEntry,
    PrivacyConfig,
    StragglersConfig,
    StrategyParams,
    SystemConfig,
)
from pilot_jax.config.sections import DataConfig, DigitsConfig, EmojiConfig, HoldOutConfig, LimitsConfig, Section
from pilot_jax.config.strict_yaml import parse_yaml, read_yaml
from pilot_jax.config.training import ClientTrainConfig, TrainConfig, scaled_rates, with_scaled_rates

__all__ = [
    "BOTH_OR_NEITHER",
    "STRATEGY_PARAMS",
    "ClientTrainConfig",
    "Config",
    "DataConfig",
    "DigitsConfig",
    "EmojiConfig",
    "EvalConfig",
    "FederationConfig",
    "HoldOutConfig",
    "LimitsConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "ParticipationEntry",
    "PartsConfig",
    "PrivacyConfig",
    "Section",
    "StragglersConfig",
    "StrategyParams",
    "SystemConfig",
    "TrainConfig",
    "apply_overrides",
    "client_ranks",
    "combine_field",
    "differences",
    "import_own",
    "json_schema",
    "known_keys",
    "load_config",
    "parse_config",
    "parse_strategy",
    "parse_yaml",
    "read_settings",
    "read_yaml",
    "scaled_rates",
    "use_modules",
    "with_scaled_rates",
]
