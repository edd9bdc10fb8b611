"""FFA-LoRA (Sun et al., ICLR 2024, arXiv 2403.12313): A stays as it was drawn, only B is trained and averaged, so that
the mean of the clients' BA is the BA of their mean."""

from __future__ import annotations

from pilot_jax.federation.roles import BASE_ROWS, Role, Roles
from pilot_jax.federation.strategies.base import Strategy
from pilot_jax.models.lora import factors


class FfaLora(Strategy):
    name = "ffa_lora"

    def roles(self):
        return Roles((*BASE_ROWS,
                      Role("text_adapter_a", {"plain": "frozen"}, "local", "never"),
                      Role("text_adapter_b", {"plain": "trained"}, "shared", "mean"),
                      Role("projector", {"plain": "trained"}, "shared", "mean")))

    def initial_adapters(self, key, projector, model, rank, num_tasks):
        whole = super().initial_adapters(key, projector, model, rank, num_tasks)
        return {**factors(whole["text_adapter"]), "projector": whole["projector"]}
