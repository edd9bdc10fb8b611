"""FedAdam, FedYogi, FedAdagrad (Reddi et al., ICLR 2021, arXiv 2003.00295, algorithm 2), and FedAvgM.

m ← β1·m + (1−β1)·Δ;  w ← w + η·m / (√v + τ), with v from the strategy's `second_moment` and v = τ² at the start. As in
the paper, there is no bias correction as in optax.adam, which would change the first steps, and a run has few.
FedAvgM (Hsu et al., 2019, arXiv 1909.06335): FedAvg with momentum at the server, v ← β·v + Δ, w ← w − η·v.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from pydantic import Field

from pilot_jax.config import Section, StrategyParams
from pilot_jax.federation.strategies.base import Strategy, register


class ServerConfig(Section):
    """The server's optimizer in fedavgm, fedadam, fedyogi, fedadagrad and scaffold."""

    learning_rate: float | None = Field(
        None, gt=0, description="Learning rate η of the server. null: 1 for fedavgm and scaffold; 0.003 for fedadam, "
        "fedyogi and fedadagrad, whose steps have about this size in every entry.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Decay of the server's momentum: β of fedavgm; β1 of fedadam, "
                            "fedyogi and fedadagrad. scaffold has none.")
    beta2: float = Field(0.99, ge=0, lt=1, description="Decay β2 of the second moment in fedadam and fedyogi.")
    tau: float = Field(1e-3, gt=0, description="Constant τ in m / (√v + τ), the step of fedadam, fedyogi, fedadagrad.")


class ServerParams(StrategyParams):
    server: ServerConfig = ServerConfig()


def scale_by_adaptive(second_moment: Callable[[jax.Array, jax.Array], jax.Array], beta1: float,
                      tau: float) -> optax.GradientTransformation:
    """Returns the transformation of Δ into m / (√v + τ). `second_moment`: (v, Δ²) → v, entry by entry."""

    def init(params):
        v = jax.tree.map(lambda p: jnp.full_like(p, tau**2), params)
        return {"m": jax.tree.map(jnp.zeros_like, params), "v": v}

    def update(delta, state, params=None):
        m = jax.tree.map(lambda m, d: beta1 * m + (1 - beta1) * d, state["m"], delta)
        v = jax.tree.map(lambda v, d: second_moment(v, d**2), state["v"], delta)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + tau), m, v), {"m": m, "v": v}

    return optax.GradientTransformation(init, update)


class Adaptive(Strategy):
    """The base of the three adaptive strategies."""

    Params = ServerParams

    @staticmethod
    def second_moment(v: jax.Array, squared: jax.Array, server: ServerConfig) -> jax.Array:
        raise NotImplementedError

    def server_optimizer(self):
        server = self.params.server
        return optax.chain(
            scale_by_adaptive(lambda v, squared: self.second_moment(v, squared, server), server.momentum, server.tau),
            optax.scale(-(server.learning_rate or 0.003)))


@register("fedadagrad")
class FedAdagrad(Adaptive):
    """FedAdagrad: v ← v + Δ²."""

    @staticmethod
    def second_moment(v, squared, server):
        return v + squared


@register("fedadam")
class FedAdam(Adaptive):
    """FedAdam: v ← β2·v + (1−β2)·Δ²."""

    @staticmethod
    def second_moment(v, squared, server):
        return server.beta2 * v + (1 - server.beta2) * squared


@register("fedyogi")
class FedYogi(Adaptive):
    """FedYogi: v ← v − (1−β2)·Δ²·sign(v − Δ²)."""

    @staticmethod
    def second_moment(v, squared, server):
        return v - (1 - server.beta2) * squared * jnp.sign(v - squared)


@register("fedavgm")
class FedAvgM(Strategy):
    """FedAvgM: FedAvg with momentum at the server."""

    Params = ServerParams

    def server_optimizer(self):
        server = self.params.server
        return optax.sgd(server.learning_rate or 1.0, momentum=server.momentum)
