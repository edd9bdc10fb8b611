"""FedProx (Li et al., MLSys 2020, arXiv 1812.06127): FedAvg whose clients minimise their loss + μ/2·‖w − w_start‖²."""

from __future__ import annotations

import dataclasses

import jax

from pilot_jax.federation.client import LocalRule
from pilot_jax.federation.strategies.base import Strategy


@dataclasses.dataclass(frozen=True)
class Proximal(LocalRule):
    mu: float = 0.0

    def gradient(self, gradient, trained, start, carried):
        return jax.tree.map(lambda g, w, w0: g + self.mu * (w - w0), gradient, trained, start)


class FedProx(Strategy):
    def local_rule(self):
        return Proximal(mu=self.config.prox_mu)
