"""FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629) over LoRA and projector. On a language model this is FedIT
(Zhang et al., ICASSP 2024, arXiv 2305.05644); here on a vision–language model."""

from __future__ import annotations

import dataclasses

import jax

from pilot_jax.federation.client import LocalRule
from pilot_jax.federation.strategies.base import Strategy


class FedAvg(Strategy):
    """Everyone receives the mean of the uploads, weighted by data size: the base class's own mixing matrix."""


@dataclasses.dataclass(frozen=True)
class Proximal(LocalRule):
    mu: float = 0.0

    def gradient(self, gradient, trained, start, carried):
        return jax.tree.map(lambda g, w, w0: g + self.mu * (w - w0), gradient, trained, start)


class FedProx(Strategy):
    def local_rule(self):
        return Proximal(mu=self.config.prox_mu)
