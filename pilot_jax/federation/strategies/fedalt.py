"""FedALT (Bian, Wang, Zhang and Xu, AAAI 2026, arXiv 2503.11880): an own LoRA, one of the rest of the world, a mixer.

Every client goes on with its own LoRA, which no aggregation replaces. Beside it lies a frozen *rest-of-world* LoRA, the
mean of the other clients' own LoRAs (A and B each, not weighted by data size). It is downloaded after every phase, and
adds nothing in the first. In each linear layer a router mixes the two for every token:

    y = x·W + (α/r)·(g_0(x)·x·AᵀBᵀ + g_1(x)·x·A_restᵀB_restᵀ),   g = softmax(x·routerᵀ)

The router is trained with the own LoRA and never leaves the client. Read for this file: the abstract, and the authors'
code (github.com/jmbian/FedALT: `server.py`, `client.py`, `peft/tuners/lora.py`), which aggregates no router. Inferred,
since all clients take part there: the others are those of the phase's cohort, a client that is alone keeps its
rest-of-world LoRA, and the projector, which is no LoRA, is averaged as in `fedavg`.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from pilot_jax.federation import mixing
from pilot_jax.federation.cohort import Aggregated
from pilot_jax.federation.roles import BASE_ROWS, Role, Roles, num_bytes
from pilot_jax.federation.strategies.base import Strategy, register
from pilot_jax.models.experts import init_bank, init_router


def others(cohort: int) -> np.ndarray:
    """Returns the matrix [S, S] of the mean over all other clients, float32; [[0]] for a client that is alone."""
    return ((1 - np.eye(cohort)) / max(cohort - 1, 1)).astype(np.float32)


@register("fedalt")
class FedAlt(Strategy):
    """FedALT; the module's text describes it. The rest-of-world LoRA is the only expert of `expert_bank`."""

    needs_one_rank = True

    def roles(self):
        return Roles((*BASE_ROWS,
                      Role("text_adapter", {"plain": "trained"}, "shared", "mean_of_others"),
                      Role("expert_bank", {"plain": "frozen"}, "local", "never"),
                      Role("expert_router", {"plain": "trained"}, "local", "never"),
                      self.projector_role("shared", "mean")))

    def beside_lora(self, key, lora):
        return {"expert_bank": init_bank(lora, 1), "expert_router": init_router(jax.random.fold_in(key, 3000), lora, 2)}

    def initial_server_state(self, adapters, sizes, tasks):
        return super().initial_server_state({n: t for n, t in adapters.items() if n == "projector"}, sizes, tasks)

    def aggregate(self, cohort, server):
        projector = {n: t for n, t in cohort.uploads.items() if n == "projector"}
        downloads, state, _ = super().aggregate(dataclasses.replace(cohort, uploads=projector), server)
        weights = others(len(cohort))
        if len(cohort) > 1:
            means = mixing.apply(weights, cohort.uploads["text_adapter"])
            downloads["expert_bank"] = jax.tree.map(lambda leaf: leaf[:, :, None], means)  # [S, layers, 1, …]
        return Aggregated(downloads, state, {"weights": weights})

    def sent_bytes(self, adapters):
        up, down = super().sent_bytes(adapters)
        del down["text_adapter"]
        return up, {"expert_bank": num_bytes(adapters["expert_bank"]), **down}
