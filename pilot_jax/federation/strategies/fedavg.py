"""FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629) over LoRA and projector, with fine-tuning, and FedProx.

FedAvg on a language model is FedIT (Zhang et al., ICASSP 2024, arXiv 2305.05644). FedAvg whose model each client then
trains further on its own data is a usual baseline of personalised methods (Cheng et al., 2021, "Fine-tuning is fine in
federated learning", arXiv 2108.07313; Collins et al., NeurIPS 2022, "FedAvg with fine tuning: local updates lead to
representation learning", arXiv 2205.13692). The papers' own numbers of steps are not taken over.
FedProx (Li et al., MLSys 2020, arXiv 1812.06127): each client minimises its loss + μ/2·‖w − w_start‖².
"""

from __future__ import annotations

import dataclasses

import jax
from pydantic import Field

from pilot_jax.config import StrategyParams
from pilot_jax.federation.phases import LocalRule
from pilot_jax.federation.strategies.base import Strategy, register


@register("fedavg")
class FedAvg(Strategy):
    """FedAvg: all clients receive the mean of the uploads, weighted by data size, which is the base class's matrix."""


@register("fedavg_ft")
class FedAvgFinetuned(FedAvg):
    """FedAvg with fine-tuning: after the last round, every client trains the server's model further on its own data.

    It takes `federation.finetune_steps` steps, or where that is null, as many as in one of its phases.
    """

    finetunes = True


@dataclasses.dataclass(frozen=True)
class Proximal(LocalRule):
    """Adds the gradient of μ/2·‖w − w_start‖²."""

    mu: float = 0.0

    def gradient(self, gradient, trained, start, carried):
        return jax.tree.map(lambda g, w, w0: g + self.mu * (w - w0), gradient, trained, start)


@register("fedprox")
class FedProx(Strategy):
    """FedProx: FedAvg with a proximal term in each client's loss."""

    class Params(StrategyParams):
        prox_mu: float = Field(0.01, ge=0, description="Coefficient μ of FedProx's term μ/2·‖w − w_start‖² "
                               "in each client's loss.")

    def local_rule(self):
        return Proximal(mu=self.params.prox_mu)
