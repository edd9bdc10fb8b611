"""Means that few clients cannot move far: the median and the trimmed mean, entry by entry."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pilot_jax.federation import mixing
from pilot_jax.federation.strategies.base import Strategy


class Median(Strategy):
    aggregated_by = "median"

    def mix(self, uploads, sizes, tasks, client_ids, server_state):
        return mixing.mean(jnp.ones(len(sizes)))  # for the log: every upload counts alike

    def combine(self, uploads, matrix):
        return jax.tree.map(lambda leaf: jnp.median(leaf, axis=0, keepdims=True), dict(uploads))


class TrimmedMean(Median):
    name = "trimmed_mean"
    aggregated_by = "trimmed_mean"

    def combine(self, uploads, matrix):
        def trimmed(leaf):
            drop = int(self.config.trim * len(leaf))
            return jnp.mean(jnp.sort(leaf, axis=0)[drop:len(leaf) - drop], axis=0, keepdims=True)

        return jax.tree.map(trimmed, dict(uploads))
