"""Mixtures that take from another client as much as a measure on halves of the data supports (`federation.halves`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from pilot_jax.config import StrategyParams
from pilot_jax.federation.halves import shares
from pilot_jax.federation.roles import BASE_ROWS, Role, Roles
from pilot_jax.federation.strategies.base import Strategy, register
from pilot_jax.federation.strategies.pilot import AtaConfig, Pilot, PilotParams


@register("split_half")
class SplitHalf(Strategy):
    """Plain LLaVA's projector and LoRA: each client receives its own mixture of the changes of LoRA, and keeps its own
    projector, because pictures differ where instructions do not."""

    class Params(StrategyParams):
        split_half_limit: float = Field(0.5, gt=0, description="Ratio δ²/σ² at and above which nothing is taken from "
                                        "another client: weights are ∝ n_j·max(0, 1 − ratio/limit).")

    one_model = False
    splits_halves = True
    mixes_updates = True

    def roles(self):
        return Roles((*BASE_ROWS, Role("text_adapter", {"plain": "trained"}, "shared", "split_half"),
                      self.projector_role("local", "never")))

    def mix(self, cohort):
        return shares(cohort.ratio, cohort.sizes, self.params.split_half_limit)


OWN = {"weighting": "split_half", "mixes": "updates"}  # keys of `ata` whose defaults are not Pilot's


@register("pilot_split_half")
class PilotSplitHalf(Pilot):
    """Pilot with `ata.weighting: split_half`, and ATA over changes of LoRA."""

    class Params(PilotParams):
        ata: AtaConfig = AtaConfig(**OWN)

        @field_validator("ata", mode="before")
        @classmethod
        def _own_defaults(cls, given: Any) -> Any:
            """Returns the section with this strategy's defaults for what a config leaves out of it."""
            return {**OWN, **given} if isinstance(given, Mapping) else given
