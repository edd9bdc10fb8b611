"""FedAvg in which one LoRA is made of several in other ways than by the means of A and B (`federation/combining.py`).

These strategies are FedAvg with another value of `strategy.combine`. Every strategy that shares LoRA as a whole takes
that key too.
"""

from __future__ import annotations

from typing import Literal

from pilot_jax.config import StrategyParams, combine_field
from pilot_jax.federation.strategies.base import Strategy, register


@register("flexlora")
class FlexLora(Strategy):
    """FlexLoRA (Bai et al., NeurIPS 2024, arXiv 2402.11505): the server forms the mean of the products B·A, and each
    client receives its best approximation of the client's own rank, from an SVD.

    HLoRA (Liu et al., 2025, arXiv 2503.00813) has the same rule. Read: the abstracts. Inferred: that B = U·Σ and
    A = Vᵀ; the product, which the rule is about, does not depend on it, but the steps of training after it do.
    """

    class Params(StrategyParams):
        combine: Literal["product"] = combine_field("product")


@register("fedrot_lora")
class FedRotLora(Strategy):
    """FedRot-LoRA (Zhang et al., ICML 2026, arXiv 2602.23638): each client's pair is rotated to the model that it
    received before the means are taken, by its A in odd rounds and by its B in even ones; in round 1 not at all.

    The authors' code has both orders of A and B. `strategy.rotation` is the paper's λ.
    """

    class Params(StrategyParams):
        combine: Literal["aligned"] = combine_field("aligned")


@register("fedex_lora")
class FedExLora(Strategy):
    """FedEx-LoRA (Singhal et al., ACL 2025, arXiv 2410.09432): what the mean of the products B·A has beyond the product
    of the means is added to the frozen weights of all clients, so that the aggregation is exact."""

    class Params(StrategyParams):
        combine: Literal["exact"] = combine_field("exact")


@register("flora")
class Flora(FedExLora):
    """FLoRA (Wang et al., NeurIPS 2024, arXiv 2409.05976): all clients' factors, weighted and stacked, are added to the
    frozen weights, and LoRA starts anew after each aggregation (`combining.redrawn`). The clients' ranks can differ.
    """

    restarts_lora = True
