"""Strategies that share a part of LoRA: FFA-LoRA, FedSA-LoRA, FedDPA."""

from __future__ import annotations

import jax

from pilot_jax.federation.roles import BASE_ROWS, Role, Roles
from pilot_jax.federation.strategies.base import Strategy, register
from pilot_jax.models.lora import factors, init_lora


@register("ffa_lora")
class FfaLora(Strategy):
    """FFA-LoRA (Sun et al., ICLR 2024, arXiv 2403.12313): A stays at its random start, and only B is trained and
    averaged, so that the mean of the clients' products BA is the product of their means."""

    def roles(self):
        return Roles((*BASE_ROWS,
                      Role("text_adapter_a", {"plain": "frozen"}, "local", "never"),
                      Role("text_adapter_b", {"plain": "trained"}, "shared", "mean"),
                      self.projector_role("shared", "mean")))

    def initial_adapters(self, key, projector, model, rank, num_tasks):
        whole = super().initial_adapters(key, projector, model, rank, num_tasks)
        return {**factors(whole.pop("text_adapter")), **whole}


@register("fedsa_lora")
class FedSaLora(FfaLora):
    """FedSA-LoRA (Guo et al., ICLR 2025, arXiv 2410.01463): A and B are trained, but only A is uploaded and averaged.
    B, which the paper finds to learn client-specific knowledge, stays with the client."""

    def roles(self):
        return Roles((*BASE_ROWS,
                      Role("text_adapter_a", {"plain": "trained"}, "shared", "mean"),
                      Role("text_adapter_b", {"plain": "trained"}, "local", "never"),
                      self.projector_role("shared", "mean")))


@register("feddpa")
class FedDpa(Strategy):
    """FedDPA (Yang et al., NeurIPS 2024, arXiv 2403.19211): a shared LoRA, which is averaged, and a private one.

    Both are trained at once, and their outputs are added without the paper's weights per test instance.
    """

    def roles(self):
        return Roles((*super().roles().rows, Role("private_adapter", {"plain": "trained"}, "local", "never")))

    def initial_adapters(self, key, projector, model, rank, num_tasks):
        shared = super().initial_adapters(key, projector, model, rank, num_tasks)
        return {**shared, "private_adapter": init_lora(jax.random.fold_in(key, 2000), model.text, rank)}
