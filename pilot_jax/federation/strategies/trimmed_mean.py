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
        def trimmed(leaf):
            drop = int(self.config.trim * len(leaf))
            return jnp.mean(jnp.sort(leaf, axis=0)[drop:len(leaf) - drop], axis=0, keepdims=True)

        return jax.tree.map(trimmed, dict(uploads))
