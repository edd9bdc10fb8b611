"""FedMosaic's relevance-guided aggregation, RELA (Seo et al., ICLR 2026, arXiv 2506.11024), between equal models.

Each client trains a LoRA of its own and adds to it, frozen, a mixture of the others' LoRAs. The mixture's weights are
softmax(cos(g_k, g_j)/τ) over j ≠ k, where g is a client's decayed gradient: the mean gradient of a phase, averaged with
the g before. LoRA is uploaded with g; the projector stays with its client.

Read: the abstract, and the authors' code (github.com/snumprlab/fedmosaic); the text of the paper was not at hand. From
the code are the softmax without the client itself, τ = 0.5, g ← (mean + g)/2, and the frozen mixture. It differs in
these points:

- The code takes g from the frozen base model, with respect to the last layer's down-projection, truncated and noised.
  Here g is what training computes anyway: the gradient of B in the last layer. As A starts equal for all, this is the
  gradient of the layer's weights times one common matrix. For noise there is `federation.privacy`.
- The code averages cosines of the columns of g; here g is one vector.
- The code halves the sum of both LoRAs, which is the same as half of `model.lora.alpha`.
- Dimension-invariant LoRA (Co-LoRA, before PQ-LoRA), for clients of different models, is not a part of it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from pydantic import Field

from pilot_jax.config import StrategyParams
from pilot_jax.federation.cohort import Aggregated
from pilot_jax.federation.distances import cosines
from pilot_jax.federation.phases import LocalRule
from pilot_jax.federation.roles import BASE_ROWS, Role, Roles, num_bytes
from pilot_jax.federation.strategies.base import Strategy, register
from pilot_jax.parallel.processes import to_host


def last_layer(lora):
    """Returns B of the last layer for each target, leaves [1, d_out, R]."""
    return {target: pair["b"][-1:] for target, pair in lora["layers"].items()}


@dataclasses.dataclass(frozen=True)
class Decayed(LocalRule):
    """Makes γ·g + (1 − γ)·(mean gradient of the phase) the new g; in a client's first phase, when g is 0, the mean."""

    averages_gradients: bool = True
    decay: float = 0.5

    def carry(self, mean_gradient, carried):
        new, old = last_layer(mean_gradient["text_adapter"]), carried["relevance"]
        is_first = ~jnp.any(jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(old)]))
        decay = jnp.where(is_first, 0.0, self.decay)
        return {**carried, "relevance": jax.tree.map(lambda g, m: decay * g + (1 - decay) * m, old, new)}


@register("fedmosaic")
class FedMosaic(Strategy):
    """FedMosaic's aggregation; the module's text describes it."""

    class Params(StrategyParams):
        relevance_temperature: float = Field(0.5, gt=0, description="Temperature τ of FedMosaic's weights, which are "
                                             "softmax(cosine of gradients / τ) over the other clients.")
        relevance_decay: float = Field(0.5, ge=0, lt=1, description="Weight of the earlier gradients in FedMosaic's "
                                       "decayed gradient.")

    aggregated_by = "relevance"
    one_model = False
    needs_one_rank = True

    def roles(self):
        return Roles((*BASE_ROWS,
                      Role("text_adapter", {"plain": "trained"}, "shared", self.aggregated_by),
                      Role("others_adapter", {"plain": "frozen"}, "local", "never", read_as="private_adapter"),
                      Role("relevance", {"plain": "carried"}, "shared", "never"),
                      self.projector_role("local", "never")))

    def local_rule(self):
        return Decayed(decay=self.params.relevance_decay)

    def initial_adapters(self, key, projector, model, rank, num_tasks):
        trained = super().initial_adapters(key, projector, model, rank, num_tasks)
        lora = trained["text_adapter"]  # B = 0: it adds nothing until the first mixture
        return {**trained, "others_adapter": lora, "relevance": jax.tree.map(jnp.zeros_like, last_layer(lora))}

    def mix(self, cohort):
        """Returns the weights [S, S] of the others' LoRAs; a row of zeros for a client that is alone."""
        others = ~jnp.eye(len(cohort), dtype=bool)
        score = cosines(cohort.uploads["relevance"]) / self.params.relevance_temperature
        return jax.nn.softmax(score, axis=1, where=others)

    def aggregate(self, cohort, server):
        weights = to_host(self.mix(cohort))
        lora = dataclasses.replace(cohort, uploads={"text_adapter": cohort.uploads["text_adapter"]})
        downloads = {"others_adapter": self.combine(lora, weights)["text_adapter"]} if len(cohort) > 1 else {}
        return Aggregated(downloads, dict(server), {"weights": weights})

    def sent_bytes(self, adapters):
        up, _ = super().sent_bytes(adapters)
        return up, {"others_adapter": num_bytes(adapters["others_adapter"])}
