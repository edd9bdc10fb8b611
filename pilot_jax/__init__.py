"""pilot_jax: federated multimodal instruction tuning in JAX.

Dimension letters used in every docstring:
    K clients, S cohort (clients of one round), T tasks, B batch, N image tokens, L text length (image tokens
    included), A supervised positions, D vision width, C language-model width, R LoRA rank, V vocabulary, E experts;
    M neighbours of ATA, rows of a mixing matrix or, in attention, keys; k clients that are trained side by side.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Resolved on first use, so that `import pilot_jax` and `pilot-jax --help` stay fast.
_PUBLIC = {
    "Config": "pilot_jax.config:Config",
    "Data": "pilot_jax.data.given:Data",
    "EarlyStopping": "pilot_jax.runs.early_stopping:EarlyStopping",
    "InputError": "pilot_jax.errors:InputError",
    "Run": "pilot_jax.runs.restore:Run",
    "RunObserver": "pilot_jax.federation.observer:RunObserver",
    "Sample": "pilot_jax.data.llava.sample:Sample",
    "Strategy": "pilot_jax.federation.strategies:Strategy",
    "StrategyParams": "pilot_jax.config:StrategyParams",
    "answer": "pilot_jax.runs.restore:answer",
    "export_client": "pilot_jax.runs.export:export_client",
    "image_fit": "pilot_jax.data.images:image_fit",
    "load": "pilot_jax.evaluation.questions:load",
    "load_config": "pilot_jax.config:load_config",
    "load_from_parts": "pilot_jax.evaluation.questions:load_from_parts",
    "merge_client": "pilot_jax.runs.export:merge_client",
    "metric": "pilot_jax.evaluation.metrics:metric",
    "mixing": "pilot_jax.federation.mixing:",
    "projector": "pilot_jax.models.projectors:projector",
    "register": "pilot_jax.federation.strategies:register",
    "restore": "pilot_jax.runs.restore:restore",
    "simulate": "pilot_jax.runs.simulate:simulate",
    "torch": "pilot_jax.torch:",
}
__all__ = [*(name for name in _PUBLIC if name != "torch"), "__version__"]  # a star import must not need torch


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pilot_jax' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted([*_PUBLIC, "__version__"])
