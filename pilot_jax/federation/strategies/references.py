"""Local and centralised training, the lower and the upper reference of federated comparisons."""

from __future__ import annotations

from pilot_jax.federation import mixing
from pilot_jax.federation.strategies.base import Strategy, register


@register("local")
class Local(Strategy):
    """Local training: no client uploads or receives anything."""

    scope = "local"
    aggregated_by = "never"
    one_model = False

    def mix(self, cohort):
        return mixing.identity(len(cohort))


@register("centralised")
class Centralised(Strategy):
    """Centralised training: one model on the pooled data of all clients, which a federation does not allow.

    It visits as many samples as all clients together, in batches of the same size.
    """

    scope = "local"
    aggregated_by = "never"
    one_model = False
    pools_data = True
