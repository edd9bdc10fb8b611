"""FedAvgM (Hsu et al., 2019, arXiv 1909.06335): FedAvg with momentum at the server, v ← β·v + Δ, w ← w − η·v."""

from __future__ import annotations

import optax

from pilot_jax.federation.strategies.base import Strategy


class FedAvgM(Strategy):
    def server_optimizer(self):
        server = self.config.server
        return optax.sgd(server.learning_rate or 1.0, momentum=server.momentum)
