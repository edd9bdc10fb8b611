"""The lower and the upper reference of every federated comparison: local and centralised training."""

from __future__ import annotations

from pilot_jax.federation import mixing
from pilot_jax.federation.strategies.base import Strategy


class Local(Strategy):
    scope = "local"
    aggregated_by = "never"
    one_model = False

    def mix(self, uploads, sizes, tasks, client_ids, server_state):
        return mixing.identity(len(sizes))


class Centralised(Strategy):
    scope = "local"
    aggregated_by = "never"
    one_model = False
    pools_data = True
