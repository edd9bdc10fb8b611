"""FedYogi (Reddi et al., ICLR 2021, arXiv 2003.00295): v ← v − (1−β2)·Δ²·sign(v − Δ²)."""

from __future__ import annotations

import jax.numpy as jnp

from pilot_jax.federation.strategies.adaptive import Adaptive


class FedYogi(Adaptive):
    @staticmethod
    def second_moment(v, squared, server):
        return v - (1 - server.beta2) * squared * jnp.sign(v - squared)
