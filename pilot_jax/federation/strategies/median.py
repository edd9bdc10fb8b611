"""Coordinate-wise median (Yin et al., ICML 2018, arXiv 1803.01498): fewer than half of the
clients cannot move it far."""

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
