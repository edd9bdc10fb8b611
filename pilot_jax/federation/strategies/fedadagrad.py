"""FedAdagrad (Reddi et al., ICLR 2021, arXiv 2003.00295): v ← v + Δ²."""

from __future__ import annotations

from pilot_jax.federation.strategies.adaptive import Adaptive


class FedAdagrad(Adaptive):
    @staticmethod
    def second_moment(v, squared, server):
        return v + squared
