"""FedAMP and HeurFedAMP (Huang et al., AAAI 2021, arXiv 2007.03797): attentive message passing between clients.

The server gives client k a model of its own, u_k = Σ_j ξ_kj·w_j, and the client trains its w_k, from where it is, on
its loss + λ/(2α)·‖w_k − u_k‖². Before the first upload, u_k is the initial model. (The paper takes the minimiser, which
no start changes; of the public implementations, PFLlib starts from w_k.)

FedAMP: ξ_kj = α·A'(‖w_k − w_j‖²) with A(x) = 1 − exp(−x/σ), hence A'(x) = exp(−x/σ)/σ, and ξ_kk = 1 − Σ_{j≠k} ξ_kj.
HeurFedAMP: ξ_kk is a constant, and the others divide the rest as softmax(s·cos(w_k, w_j)); the paper writes σ for s.

Pilot's ATA is of its kind: it too gives each client a mixture of the nearest models. The paper's α and λ are here
α = `amp_step`·σ and λ = `amp_mu`·α, of which `amp_step` and σ: auto mean the same at every scale of the adapters.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from pilot_jax.config import StrategyParams
from pilot_jax.errors import InputError
from pilot_jax.federation import mixing
from pilot_jax.federation.cohort import Aggregated
from pilot_jax.federation.distances import cosines, distances
from pilot_jax.federation.phases import LocalRule
from pilot_jax.federation.roles import Role, Roles, num_bytes
from pilot_jax.federation.strategies.base import Strategy, register
from pilot_jax.parallel.processes import to_host


@dataclasses.dataclass(frozen=True)
class TowardsCloud(LocalRule):
    """Adds the gradient of μ/2·‖w − u‖², μ = λ/α."""

    mu: float = 0.0

    def gradient(self, gradient, trained, start, carried):
        return jax.tree.map(lambda g, w, u: g + self.mu * (w - u), gradient, trained, carried["cloud_model"])


@register("fedamp")
class FedAmp(Strategy):
    """FedAMP and HeurFedAMP; the module's text describes them."""

    class Params(StrategyParams):
        amp_attention: Literal["distance", "cosine"] = Field(
            "distance", description="Rule for FedAMP's weights ξ. distance: `amp_step`·exp(−‖w_k − w_j‖²/σ). cosine: "
            "HeurFedAMP, a softmax over the cosines of the models.")
        amp_sigma: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
            "auto", description="Scale σ of `amp_attention: distance`. auto: the mean of ‖w_k − w_j‖² over the pairs "
            "of clients.")
        amp_step: float | None = Field(None, gt=0, description="Weight α/σ of another client at distance 0 in "
                                       "`amp_attention: distance`. null: 1/S in a cohort of S clients.")
        amp_mu: float = Field(0.1, ge=0, description="Coefficient λ/α of FedAMP's term λ/(2α)·‖w_k − u_k‖² in each "
                              "client's loss.")
        amp_scale: float = Field(25.0, gt=0, description="Factor s of the cosines in `amp_attention: cosine`.")
        amp_self: float | None = Field(None, ge=0, lt=1, description="Weight ξ_kk of a client's own model in "
                                       "`amp_attention: cosine`. null: 1/S in a cohort of S clients.")

    aggregated_by = "attention"
    one_model = False
    needs_one_rank = True

    def roles(self):
        return Roles((*super().roles().rows, Role("cloud_model", {"plain": "anchor"}, "local", "never")))

    def local_rule(self):
        return TowardsCloud(mu=self.params.amp_mu)

    def initial_adapters(self, key, projector, model, rank, num_tasks):
        trained = super().initial_adapters(key, projector, model, rank, num_tasks)
        return {**trained, "cloud_model": dict(trained)}

    def mix(self, cohort):
        """Returns ξ [S, S].

        Raises:
            InputError: `amp_step` is so large that a client's own weight is negative.
        """
        params, size = self.params, len(cohort)
        if size == 1:
            return mixing.identity(1)
        others = ~jnp.eye(size, dtype=bool)
        if params.amp_attention == "cosine":
            own = 1 / size if params.amp_self is None else params.amp_self
            score = jnp.where(others, params.amp_scale * cosines(dict(cohort.uploads)), -jnp.inf)
            return own * mixing.identity(size) + (1 - own) * jax.nn.softmax(score, axis=1)
        squares = distances(dict(cohort.uploads)) ** 2
        sigma = jnp.sum(squares) / (size * (size - 1)) if params.amp_sigma == "auto" else params.amp_sigma
        step = 1 / size if params.amp_step is None else params.amp_step
        weights = jnp.where(others, step * jnp.exp(-squares / jnp.maximum(sigma, 1e-30)), 0.0)
        if float(jnp.max(jnp.sum(weights, axis=1))) > 1 + 1e-5:
            raise InputError(f"strategy.amp_step: {step:g} gives the {size - 1} other clients of a cohort more than "
                             f"the whole weight. Set it to at most {1 / (size - 1):.3g}, or to null.")
        return weights + jnp.diag(1 - jnp.sum(weights, axis=1))

    def aggregate(self, cohort, server):
        weights = to_host(self.mix(cohort))
        return Aggregated({"cloud_model": self.combine(cohort, weights)}, dict(server), {"weights": weights})

    def sent_bytes(self, adapters):
        up, _ = super().sent_bytes(adapters)
        return up, {"cloud_model": num_bytes(adapters["cloud_model"])}
