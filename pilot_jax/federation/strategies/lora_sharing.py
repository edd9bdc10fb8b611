"""What of LoRA is shared: FFA-LoRA, FedSA-LoRA, FedDPA."""

from __future__ import annotations

import jax

from pilot_jax.federation.roles import BASE_ROWS, Role, Roles
from pilot_jax.federation.strategies.base import Strategy
from pilot_jax.models.lora import factors, init_lora


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


class FedSaLora(FfaLora):
    name = "fedsa_lora"

    def roles(self):
        return Roles((*BASE_ROWS,
                      Role("text_adapter_a", {"plain": "trained"}, "shared", "mean"),
                      Role("text_adapter_b", {"plain": "trained"}, "local", "never"),
                      Role("projector", {"plain": "trained"}, "shared", "mean")))


class FedDpa(Strategy):
    def roles(self):
        return Roles((*super().roles().rows, Role("private_adapter", {"plain": "trained"}, "local", "never")))

    def initial_adapters(self, key, projector, model, rank, num_tasks):
        shared = super().initial_adapters(key, projector, model, rank, num_tasks)
        return {**shared, "private_adapter": init_lora(jax.random.fold_in(key, 2000), model.text, rank)}
