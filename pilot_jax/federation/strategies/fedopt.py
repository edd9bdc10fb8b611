"""What FedAdam, FedYogi and FedAdagrad share (Reddi et al., ICLR 2021, arXiv 2003.00295, algorithm 2).

m ← β1·m + (1−β1)·Δ;  w ← w + η·m / (√v + τ), with v from the rule in each one's file, v = τ² at first. As published,
without optax.adam's correction for the zero start, which would change the first of so few server steps.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from pilot_jax.config import ServerConfig
from pilot_jax.federation.strategies.base import Strategy


def scale_by_adaptive(second_moment: Callable[[jax.Array, jax.Array], jax.Array], beta1: float,
                      tau: float) -> optax.GradientTransformation:
    """m / (√v + τ). `second_moment`: (v, Δ²) → v, entry by entry."""

    def init(params):
        v = jax.tree.map(lambda p: jnp.full_like(p, tau**2), params)
        return {"m": jax.tree.map(jnp.zeros_like, params), "v": v}

    def update(delta, state, params=None):
        m = jax.tree.map(lambda m, d: beta1 * m + (1 - beta1) * d, state["m"], delta)
        v = jax.tree.map(lambda v, d: second_moment(v, d**2), state["v"], delta)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + tau), m, v), {"m": m, "v": v}

    return optax.GradientTransformation(init, update)


class Adaptive(Strategy):
    @staticmethod
    def second_moment(v: jax.Array, squared: jax.Array, server: ServerConfig) -> jax.Array:
        raise NotImplementedError

    def server_optimizer(self):
        server = self.config.server
        return optax.chain(
            scale_by_adaptive(lambda v, squared: self.second_moment(v, squared, server), server.momentum, server.tau),
            optax.scale(-(server.learning_rate or 0.003)))


class FedAdagrad(Adaptive):
    @staticmethod
    def second_moment(v, squared, server):
        return v + squared


class FedAdam(Adaptive):
    @staticmethod
    def second_moment(v, squared, server):
        return server.beta2 * v + (1 - server.beta2) * squared


class FedYogi(Adaptive):
    @staticmethod
    def second_moment(v, squared, server):
        return v - (1 - server.beta2) * squared * jnp.sign(v - squared)


class FedAvgM(Strategy):
    def server_optimizer(self):
        server = self.config.server
        return optax.sgd(server.learning_rate or 1.0, momentum=server.momentum)
