"""Similarity-weighted averaging: w_kj ∝ exp(cos(u_k, u_j)/τ), u the change of a client's uploads since the start.

Sattler et al. (TNNLS 2021, arXiv 1910.01991) cluster clients with similar data by the cosine of their updates. Here it
gives soft weights, and each client receives its own mixture. The strategy differs from ATA in that it mixes all clients
instead of M neighbours, by direction instead of distance.
"""

from __future__ import annotations

import jax
from pydantic import Field

from pilot_jax.config import StrategyParams
from pilot_jax.federation.cohort import Aggregated
from pilot_jax.federation.distances import cosines
from pilot_jax.federation.strategies.base import Strategy, register
from pilot_jax.parallel.processes import to_host


@register("similarity")
class Similarity(Strategy):
    """Similarity-weighted averaging; the module's text describes it."""

    class Params(StrategyParams):
        similarity_temperature: float = Field(0.1, gt=0, description="Temperature τ of the weights "
                                              "softmax(cosine of updates / τ).")

    aggregated_by = "similarity"
    one_model = False
    needs_one_rank = True

    def combines(self):
        return "factors", "product", "aligned"

    def initial_server_state(self, adapters, sizes, tasks):
        return {"start": adapters}

    def aggregate(self, cohort, server):
        moved = jax.tree.map(lambda leaf, start: leaf - start, dict(cohort.uploads),
                             {n: server["start"][n] for n in cohort.uploads})
        weights = to_host(jax.nn.softmax(cosines(moved) / self.params.similarity_temperature, axis=1))
        return Aggregated(self.combined(cohort, weights, server), dict(server), {"weights": weights})
