"""FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629) over LoRA and projector: FedIT on a vision–language model."""

from __future__ import annotations

import jax
import numpy as np

from pilot_jax.federation import mixing
from pilot_jax.federation.strategies.base import Aggregated, Strategy


class FedAvg(Strategy):
    """Everyone receives the mean of the uploads, weighted by data size."""

    def initial_server_state(self, adapters):
        return {"model": adapters}

    def fetch(self, adapters, server_state, task):
        return {**adapters, **server_state["model"]}

    def aggregate(self, uploads, sizes, tasks, client_ids, server_state):
        matrix = mixing.mean(sizes)
        downloads = mixing.apply(matrix, dict(uploads))
        model = jax.tree.map(lambda leaf: np.asarray(leaf[0]), downloads)
        return Aggregated(downloads, {**server_state, "model": model}, {"weights": np.asarray(matrix)})
