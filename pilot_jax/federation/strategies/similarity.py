"""Similarity-weighted averaging: w_kj ∝ exp(cos(u_k, u_j)/τ), u the change of a client's uploads since the start.

The cosine of updates as a measure of like data: Sattler et al., TNNLS 2021, arXiv 1910.01991, who cluster by it. Soft
weights from it, each client receiving a mixture of its own, are the simplest personalised form, and ATA's nearest
relative: all clients instead of M, direction instead of distance.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pilot_jax.federation.strategies.base import Strategy
from pilot_jax.kernels.pairwise import exact_einsum


class Similarity(Strategy):
    aggregated_by = "similarity"
    one_model = False

    def initial_server_state(self, adapters, sizes, tasks):
        return {"start": adapters}

    def mix(self, uploads, sizes, tasks, client_ids, server_state):
        moved = jax.tree.map(lambda leaf, start: (leaf - start).reshape(len(sizes), -1), dict(uploads),
                             {n: server_state["start"][n] for n in uploads})
        gram = sum(exact_einsum("si,ti->st", leaf, leaf) for leaf in jax.tree.leaves(moved))
        norm = jnp.sqrt(jnp.diag(gram))
        cosine = gram / jnp.maximum(norm[:, None] * norm, 1e-30)
        return jax.nn.softmax(cosine / self.config.similarity_temperature, axis=1)
