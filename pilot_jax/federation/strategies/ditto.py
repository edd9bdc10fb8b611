"""Ditto (Li et al., ICML 2021, arXiv 2012.04221, algorithm 1): FedAvg, and a personal model v_k for each client.

In each round, client k trains v_k on its loss + λ/2·‖v_k − w‖², and then, as in FedAvg, the global model w, both from
the w with which the round began. v_k never leaves the client, and it is what answers and is exported.

Each is a phase of its own, "personal" and "plain", with as many steps and batches of their own. The authors' code
(github.com/litian96/ditto) alternates single steps of both on the same batches; neither model reads the other's steps.
"""

from __future__ import annotations

import dataclasses

import jax
from pydantic import Field

from pilot_jax.config import StrategyParams
from pilot_jax.federation import mixing
from pilot_jax.federation.phases import LocalRule
from pilot_jax.federation.roles import BASE_ROWS, Role, Roles
from pilot_jax.federation.strategies.base import Strategy, register


@dataclasses.dataclass(frozen=True)
class TowardsGlobal(LocalRule):
    """Adds the gradient of λ/2·‖v − w‖² in the personal phase. The global phase has no anchor."""

    strength: float = 0.0

    def gradient(self, gradient, trained, start, carried):
        if not carried:
            return gradient
        return jax.tree.map(lambda g, v, w: g + self.strength * (v - w), gradient, trained, dict(carried))


@register("ditto")
class Ditto(Strategy):
    """Ditto; the module's text describes it."""

    class Params(StrategyParams):
        ditto_lambda: float = Field(1.0, ge=0, description="Coefficient λ of Ditto's term λ/2·‖v_k − w‖² in the loss "
                                    "of the personal models. 0: they are trained alone, as with local.")

    first_stages = ("personal", "plain", "personal", "plain")
    later_stages = ("personal", "plain")
    answering_stage = "personal"
    needs_one_rank = True

    def roles(self):
        names, rows = ["text_adapter", "projector"], [*BASE_ROWS]
        if self.params.projector == "frozen":
            names, rows = ["text_adapter"], [*rows, self.projector_role("shared", "mean", self.later_stages)]
        for name in names:
            rows += [Role(name, {"personal": "anchor", "plain": "trained"}, "shared", "mean"),
                     Role(f"personal_{name}", {"personal": "trained", "plain": "-"}, "local", "never", read_as=name)]
        return Roles(tuple(rows))

    def local_rule(self):
        return TowardsGlobal(strength=self.params.ditto_lambda)

    def initial_adapters(self, key, projector, model, rank, num_tasks):
        model = super().initial_adapters(key, projector, model, rank, num_tasks)
        return model | {f"personal_{name}": tree for name, tree in model.items()}

    def mix(self, cohort):
        """Returns FedAvg's matrix, and the identity after the personal phase, in which nothing is uploaded."""
        return super().mix(cohort) if cohort.uploads else mixing.identity(len(cohort))
