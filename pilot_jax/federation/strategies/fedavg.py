"""FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629) over LoRA and projector. On a language model this is FedIT
(Zhang et al., ICASSP 2024, arXiv 2305.05644); here on a vision–language model."""

from __future__ import annotations

from pilot_jax.federation.strategies.base import Strategy


class FedAvg(Strategy):
    """Everyone receives the mean of the uploads, weighted by data size: the base class's own mixing matrix."""
