"""FedDPA (Yang et al., NeurIPS 2024, arXiv 2403.19211): a shared LoRA that is averaged, and a private one beside it.

Both are trained at once and added. Left out: the paper's weighting of the two per test instance; here it is 1 : 1.
"""

from __future__ import annotations

import jax

from pilot_jax.federation.roles import Role, Roles
from pilot_jax.federation.strategies.base import Strategy
from pilot_jax.models.lora import init_lora


class FedDpa(Strategy):
    def roles(self):
        return Roles((*super().roles().rows, Role("private_adapter", {"plain": "trained"}, "local", "never")))

    def initial_adapters(self, key, projector, model, rank, num_tasks):
        shared = super().initial_adapters(key, projector, model, rank, num_tasks)
        return {**shared, "private_adapter": init_lora(jax.random.fold_in(key, 2000), model.text, rank)}
