"""The lower and the upper reference of every federated comparison: local and centralised training."""

from __future__ import annotations

from pilot_jax.federation import mixing
from pilot_jax.federation.strategies.base import Strategy, register


@register("local")
class Local(Strategy):
    """No client sends or receives anything."""

    scope = "local"
    aggregated_by = "never"
    one_model = False

    def mix(self, cohort):
        return mixing.identity(len(cohort))


@register("centralised")
class Centralised(Strategy):
    """One model on everybody's data at one place, which federated learning may not do.

    It visits as many samples as all clients together, in batches of the same size.
    """

    scope = "local"
    aggregated_by = "never"
    one_model = False
    pools_data = True
