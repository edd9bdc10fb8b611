"""pilot_jax: federated multimodal instruction tuning in JAX.

Dimension letters used in every docstring:
    K clients, S cohort (clients of one round), T tasks, B batch, N image tokens, L text length (image tokens
    included), A supervised positions, D vision width, C language-model width, R LoRA rank, V vocabulary, E experts.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# Resolved on first use, so that `import pilot_jax` and `pilot-jax --help` stay fast.
_PUBLIC = {
    "load": "pilot_jax.models.pretrained",
    "load_from_parts": "pilot_jax.models.pretrained",
    "simulate": "pilot_jax.runs.simulate",
    "Run": "pilot_jax.runs.restore",
    "Strategy": "pilot_jax.federation.strategies.base",
    "Config": "pilot_jax.config",
    "load_config": "pilot_jax.config",
    "InputError": "pilot_jax.errors",
    "mixing": "pilot_jax.federation.mixing",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pilot_jax' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    return module if _PUBLIC[name].endswith(f".{name}") else getattr(module, name)
