"""FedAdam (Reddi et al., ICLR 2021, arXiv 2003.00295): v ← β2·v + (1−β2)·Δ²."""

from __future__ import annotations

from pilot_jax.federation.strategies.adaptive import Adaptive


class FedAdam(Adaptive):
    @staticmethod
    def second_moment(v, squared, server):
        return server.beta2 * v + (1 - server.beta2) * squared
