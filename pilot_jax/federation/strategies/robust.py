"""Robust means, entry by entry, that few clients cannot move far (Yin et al., ICML 2018, arXiv 1803.01498)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from pydantic import Field

from pilot_jax.config import StrategyParams
from pilot_jax.federation import mixing
from pilot_jax.federation.strategies.base import Strategy, register


@register("median")
class Median(Strategy):
    """The median of every entry: fewer than half of the clients cannot move it far."""

    aggregated_by = "median"

    def mix(self, cohort):
        return mixing.mean(jnp.ones(len(cohort)))  # only logged

    def combine(self, cohort, weights):
        return jax.tree.map(lambda leaf: jnp.median(leaf, axis=0, keepdims=True), dict(cohort.uploads))


@register("trimmed_mean")
class TrimmedMean(Median):
    """The mean of every entry without its ⌊β·S⌋ largest and its ⌊β·S⌋ smallest uploads."""

    class Params(StrategyParams):
        trim: float = Field(0.2, ge=0, lt=0.5, description="Share β of the uploads that trimmed_mean drops in "
                            "every entry: the β·S largest and the β·S smallest values.")

    aggregated_by = "trimmed_mean"

    def combine(self, cohort, weights):
        def trimmed(leaf):
            drop = int(self.params.trim * len(leaf))
            return jnp.mean(jnp.sort(leaf, axis=0)[drop:len(leaf) - drop], axis=0, keepdims=True)

        return jax.tree.map(trimmed, dict(cohort.uploads))
