"""RoLoRA (Chen et al., arXiv 2409.02346; NeurIPS 2025, arXiv 2502.01755): A and B are trained in turn.

In odd phases all clients train B while A is frozen, in even ones A while B is frozen, and only the trained factor is
uploaded and averaged. The other one is equal for all clients, so that the mean of their products BA is the product of
their means, and half of LoRA is transmitted. Where the paper alternates by round, phases are counted: round 1 has two
with `federation.schedule: first_time`. Weights are n_k/Σn, as in `fedavg`, where the paper has 1/N.
"""

from __future__ import annotations

from pilot_jax.federation.roles import BASE_ROWS, Role, Roles
from pilot_jax.federation.strategies.base import register
from pilot_jax.federation.strategies.lora_sharing import FfaLora


@register("rolora")
class RoLora(FfaLora):
    """RoLoRA; the module's text describes it."""

    first_stages = later_stages = ("train_b", "train_a")  # B first: it is 0 at the start, where A has no gradient

    def stages(self, first_time, round_):
        both = self.schedule == "every_round" or (self.schedule == "first_time" and round_ == 1)
        if both:
            return self.first_stages
        earlier = round_ - 1 if self.schedule == "single" else round_  # phases before this round
        return (self.first_stages[earlier % 2],)

    def roles(self):
        return Roles((*BASE_ROWS,
                      Role("text_adapter_a", {"train_b": "frozen", "train_a": "trained"}, "shared", "mean"),
                      Role("text_adapter_b", {"train_b": "trained", "train_a": "frozen"}, "shared", "mean"),
                      self.projector_role("shared", "mean", self.first_stages)))
