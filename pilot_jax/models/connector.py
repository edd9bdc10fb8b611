"""Pilot's vision–language connector: the plain projector, stage 1 and stage 2 (CT-MoA, paper §3.2–3.3).

It maps image features H_v [B, N, D] to the embeddings x_img [B, N, C] that take the places of image tokens. Every
adapter ψ is LLaVA's two-layer GELU MLP, {"linear_1": {"kernel" [D, C], "bias" [C]}, "linear_2": {…[C, C]}}; stacks of
experts have a leading T axis. Biases are absent where the checkpoint's projector has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, PyTree

from pilot_jax.kernels.pointwise import weighted

STAGES = ("plain", "stage1", "stage2")

Adapter = Mapping[str, Mapping[str, Float[Array | np.ndarray, "..."]]]  # {layer: {"kernel", "bias"}}, ψ or a stack


def connector_stage(stage: str) -> str:
    """Returns the connector of a phase's stage: Pilot's two have their own, and all others the plain projector."""
    return stage if stage in STAGES else "plain"


def mlp(adapter: Adapter, features: Float[Array | np.ndarray, "*rows D"]) -> Float[Array, "*rows C"]:
    """Returns ψ(H_v), in the features' dtype."""
    x = jnp.asarray(features)
    for name in ("linear_1", "linear_2"):
        layer = adapter[name]
        x = x @ layer["kernel"].astype(features.dtype)
        if "bias" in layer:
            x = x + layer["bias"].astype(features.dtype)
        if name == "linear_1":
            x = jax.nn.gelu(x, approximate=False)
    return x


def expert(stack: Adapter, index: Int[Array, ""]) -> Adapter:
    """Returns adapter `index` of a stack: leaves [T, …] → […]."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack)


def plain(adapters: Mapping[str, PyTree], features: Float[Array | np.ndarray, "B N D"],
          projector: Callable[..., Any] = mlp) -> tuple[Float[Array, "B N C"], dict[str, jax.Array]]:
    """Returns x_img = projector(H_v), LLaVA's own connector, and no auxiliary outputs."""
    return projector(adapters["projector"], features).astype(features.dtype), {}


def stage1(adapters: Mapping[str, PyTree], features: Float[Array | np.ndarray, "B N D"]
           ) -> tuple[Float[Array, "B N C"], dict[str, jax.Array]]:
    """Returns x_img = ψ_t(H_v) + ψ_s(H_v), and both terms as "x_t" and "x_s", for the loss L_d.

    Without ψ_s (an ablation), x_img = ψ_t(H_v) and nothing else. ψ_t is `adapters["task"]`, ψ_s `adapters["client"]`.
    """
    x_t = mlp(adapters["task"], features)
    if "client" not in adapters:
        return x_t, {}
    x_s = mlp(adapters["client"], features)
    return x_t + x_s, {"x_t": x_t, "x_s": x_s}


def stage2(adapters: Mapping[str, PyTree], features: Float[Array | np.ndarray, "B N D"],
           task_index: Int[Array, ""] | int | np.integer) -> tuple[Float[Array, "B N C"], dict[str, jax.Array]]:
    """Returns CT-MoA's x_img = Σ_i P_i·h_i + ψ_s(H_v) with P = softmax(H_v·W_φ) per token, and "router_logits".

    For the client's own task, number `task_index`, h_own = ψ_t^own(H_v) (`adapters["task"]`); for every other task
    h_i = ψ_t^i(H_v) + ψ_c^i(H_v) (stacks "task_bank" and "cross_task", in global task order, whose own slot is not
    read). W_φ is "router", ψ_s "client"; without ψ_s (an ablation) it is not added. The bank's term and ψ_s are
    constants in this stage: nothing trained lies before them, so no gradient is computed for their weights.
    """
    logits = jnp.matmul(features, adapters["router"]["kernel"].astype(features.dtype),
                        preferred_element_type=jnp.float32)  # [B, N, T]; softmax needs float32
    tasks = logits.shape[-1]
    # One expert after another, each a plain product of matrices: there are only a few tasks.
    order = (task_index + jnp.arange(tasks)) % tasks  # the own task first
    probs = jnp.take(jax.nn.softmax(logits, axis=-1), order, axis=-1).astype(features.dtype)
    x = weighted(mlp(adapters["task"], features), probs[..., :1])
    if "client" in adapters:
        x = mlp(adapters["client"], features) + x
    for i in range(1, tasks):
        h = mlp(expert(adapters["task_bank"], order[i]), features) + mlp(expert(adapters["cross_task"], order[i]),
                                                                         features)
        x = x + weighted(h, probs[..., i, None])
    return x, {"router_logits": logits}


class Connector(nn.Module):
    """The connector as a Flax module, whose adapters are in the collection "connector"; see `stage1` and `stage2`.

    `projector`: that of the stage "plain", if it is not LLaVA's; see `models.projectors`.
    """

    projector: Any = None

    def __call__(self, features: Float[Array, "B N D"], stage: str, task_index: Int[Array, ""] | int | np.integer
                 ) -> tuple[Float[Array, "B N C"], dict[str, jax.Array]]:
        adapters = self.variables["connector"]
        if stage == "plain":
            return plain(adapters, features, self.projector or mlp)
        if stage == "stage1":
            return stage1(adapters, features)
        if stage == "stage2":
            return stage2(adapters, features, task_index)
        raise ValueError(f"stage must be one of {STAGES}, got {stage!r}")
