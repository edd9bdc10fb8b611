"""Mixtures that take from another client as much as a measure on halves of the data supports (`federation.halves`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from pilot_jax.config import StrategyParams
from pilot_jax.federation.cohort import Aggregated
from pilot_jax.federation.defence import Defence
from pilot_jax.federation.halves import shares
from pilot_jax.federation.roles import BASE_ROWS, Role, Roles
from pilot_jax.federation.strategies.base import Strategy, register
from pilot_jax.federation.strategies.pilot import AtaConfig, Pilot, PilotParams


@register("split_half")
class SplitHalf(Strategy):
    """Plain LLaVA's projector and LoRA: each client receives its own mixture of the changes of each, by a measure of
    each, as pictures may differ where instructions do not."""

    class Params(StrategyParams):
        projector_from: Literal["own", "others"] = Field(
            "others", description="Whether a client keeps its own projector, or receives a mixture of the projectors' "
            "changes, whose weights are by the same rule from a measure of the projector's gradients.")
        projector_limit: float = Field(0.1, gt=0, description="What `split_half_limit` is for LoRA, for the projector: "
                                       "lower, because its measure is noisier.")
        split_half_limit: float = Field(0.5, gt=0, description="Ratio δ²/σ² at and above which nothing is taken from "
                                        "another client: weights are ∝ n_j·max(0, 1 − ratio/limit).")
        cap_one: float | None = Field(None, ge=0, le=1, description="Largest weight of any one other client in a "
                                      "client's mixture of LoRA, and of the projector. What exceeds it goes to the "
                                      "client's own change. null: no limit.")
        cap_all: float | None = Field(None, ge=0, le=1, description="Largest weight of all other clients together in "
                                      "each of the two. What exceeds it goes to the own change. null: no limit.")

    one_model = False
    splits_halves = True
    mixes_updates = True

    @property
    def mixes_projector(self):
        """Whether the projector is mixed as well."""
        return self.params.projector_from == "others" and self.params.projector == "trained"

    @property
    def measured(self):
        return ("text_adapter", "projector") if self.mixes_projector else ("text_adapter",)

    def roles(self):
        projector = self.projector_role("shared", "split_half") if self.mixes_projector else (
            self.projector_role("local", "never"))
        return Roles((*BASE_ROWS, Role("text_adapter", {"plain": "trained"}, "shared", "split_half"), projector))

    @property
    def clips(self):
        return True

    @property
    def defence(self):
        return Defence(self.params.clip, cap_one=self.params.cap_one, cap_all=self.params.cap_all)

    def mix(self, cohort):
        """Returns the mixing matrix [S, S] of LoRA."""
        return shares(cohort.ratio, cohort.sizes, self.params.split_half_limit)

    def mix_projector(self, cohort):
        """Returns the mixing matrix [S, S] of the projector."""
        return shares(cohort.ratios["projector"], cohort.sizes, self.params.projector_limit)

    def aggregate(self, cohort, server):
        asked = {"text_adapter": self.mix(cohort)}
        if self.mixes_projector:
            asked["projector"] = self.mix_projector(cohort)
        weights = {name: self.defence.applied(rows, cohort, server, mixes_updates=True, name=name)[0]
                   for name, rows in asked.items()}
        downloads = {name: self._mixed(cohort, rows, (name,))[name] for name, rows in weights.items()}
        log = {"weights" if name == "text_adapter" else f"weights_{name}": rows for name, rows in weights.items()}
        return Aggregated(downloads, dict(server), log)


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
