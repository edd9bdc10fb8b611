"""What of LoRA is shared: FFA-LoRA, FedSA-LoRA, FedDPA."""

from __future__ import annotations

import jax

from pilot_jax.federation.roles import BASE_ROWS, Role, Roles
from pilot_jax.federation.strategies.base import Strategy, register
from pilot_jax.models.lora import factors, init_lora


@register("ffa_lora")
class FfaLora(Strategy):
    """FFA-LoRA (Sun et al., ICLR 2024, arXiv 2403.12313): A stays as it was drawn, only B is trained and averaged, so
    that the mean of the clients' BA is the BA of their mean."""

    def roles(self):
        return Roles((*BASE_ROWS,
                      Role("text_adapter_a", {"plain": "frozen"}, "local", "never"),
                      Role("text_adapter_b", {"plain": "trained"}, "shared", "mean"),
                      Role("projector", {"plain": "trained"}, "shared", "mean")))

    def initial_adapters(self, key, projector, model, rank, num_tasks):
        whole = super().initial_adapters(key, projector, model, rank, num_tasks)
        return {**factors(whole["text_adapter"]), "projector": whole["projector"]}


@register("fedsa_lora")
class FedSaLora(FfaLora):
    """FedSA-LoRA (Guo et al., ICLR 2025, arXiv 2410.01463): A and B are trained, only A is shared and averaged; B,
    which the paper finds to be what is particular to a client, stays there."""

    def roles(self):
        return Roles((*BASE_ROWS,
                      Role("text_adapter_a", {"plain": "trained"}, "shared", "mean"),
                      Role("text_adapter_b", {"plain": "trained"}, "local", "never"),
                      Role("projector", {"plain": "trained"}, "shared", "mean")))


@register("feddpa")
class FedDpa(Strategy):
    """FedDPA (Yang et al., NeurIPS 2024, arXiv 2403.19211): a shared LoRA that is averaged, a private one beside it.

    Both are trained at once and added. Left out: the paper's weighting of the two per test instance; here it is 1 : 1.
    """

    def roles(self):
        return Roles((*super().roles().rows, Role("private_adapter", {"plain": "trained"}, "local", "never")))

    def initial_adapters(self, key, projector, model, rank, num_tasks):
        shared = super().initial_adapters(key, projector, model, rank, num_tasks)
        return {**shared, "private_adapter": init_lora(jax.random.fold_in(key, 2000), model.text, rank)}
