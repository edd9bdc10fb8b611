"""Means that few clients cannot move far (Yin et al., ICML 2018, arXiv 1803.01498), entry by entry."""

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
        return mixing.mean(jnp.ones(len(cohort)))  # for the log: every upload counts alike

    def combine(self, cohort, weights):
        return jax.tree.map(lambda leaf: jnp.median(leaf, axis=0, keepdims=True), dict(cohort.uploads))


@register("trimmed_mean")
class TrimmedMean(Median):
    """The mean of what is left when the largest and the smallest ⌊β·S⌋ uploads of every entry are dropped."""

    class Params(StrategyParams):
        trim: float = Field(0.2, ge=0, lt=0.5, description="Share β of the uploads that trimmed_mean drops at "
                            "either end of every entry's order.")

    aggregated_by = "trimmed_mean"

    def combine(self, cohort, weights):
        def trimmed(leaf):
            drop = int(self.params.trim * len(leaf))
            return jnp.mean(jnp.sort(leaf, axis=0)[drop:len(leaf) - drop], axis=0, keepdims=True)

        return jax.tree.map(trimmed, dict(cohort.uploads))
