"""Centralised training: one model on everybody's data at one place, which federated learning may not do.

The upper reference. It visits as many samples as all clients together, in batches of the same size.
"""

from __future__ import annotations

from pilot_jax.federation.strategies.base import Strategy


class Centralised(Strategy):
    scope = "local"
    aggregated_by = "never"
    one_model = False
    pools_data = True
