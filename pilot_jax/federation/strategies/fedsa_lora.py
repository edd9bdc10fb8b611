"""FedSA-LoRA (Guo et al., ICLR 2025, arXiv 2410.01463): A and B are trained, only A is shared and averaged; B, which
the paper finds to be what is particular to a client, stays there."""

from __future__ import annotations

from pilot_jax.federation.roles import BASE_ROWS, Role, Roles
from pilot_jax.federation.strategies.ffa_lora import FfaLora


class FedSaLora(FfaLora):
    name = "fedsa_lora"

    def roles(self):
        return Roles((*BASE_ROWS,
                      Role("text_adapter_a", {"plain": "trained"}, "shared", "mean"),
                      Role("text_adapter_b", {"plain": "trained"}, "local", "never"),
                      Role("projector", {"plain": "trained"}, "shared", "mean")))
