"""Coordinate-wise trimmed mean (Yin et al., ICML 2018, arXiv 1803.01498): the mean of what is left when the largest and
the smallest ⌊β·S⌋ uploads of every entry are dropped."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pilot_jax.federation.strategies.median import Median


class TrimmedMean(Median):
    name = "trimmed_mean"
    aggregated_by = "trimmed_mean"

    def combine(self, uploads, matrix):
        cohort = len(matrix)
        drop = int(self.config.trim * cohort)

        def trimmed(leaf):
            kept = jnp.sort(leaf, axis=0)[drop:cohort - drop]
            return jnp.broadcast_to(jnp.mean(kept, axis=0), leaf.shape)

        return jax.tree.map(trimmed, dict(uploads))
