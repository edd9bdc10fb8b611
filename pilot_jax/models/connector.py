"""Pilot's vision–language connector: the plain projector, stage 1 and stage 2 (CT-MoA, paper §3.2–3.3).

Every adapter ψ is LLaVA's two-layer GELU MLP, {"linear_1": {"kernel" [D, C], "bias" [C]}, "linear_2": {…[C, C]}}.
Stacks of experts carry a leading T axis. Biases are absent where the checkpoint's projector has none.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from pilot_jax.kernels.pointwise import weighted

STAGES = ("plain", "stage1", "stage2")


def mlp(adapter: Mapping, features: jax.Array) -> jax.Array:
    """ψ(H_v): features [B, N, D] → [B, N, C], in the features' dtype."""
    x = features
    for name in ("linear_1", "linear_2"):
        layer = adapter[name]
        x = x @ layer["kernel"].astype(features.dtype)
        if "bias" in layer:
            x = x + layer["bias"].astype(features.dtype)
        if name == "linear_1":
            x = jax.nn.gelu(x, approximate=False)
    return x


def expert(stack: Mapping, index: jax.Array) -> Mapping:
    """Adapter `index` of a stack: leaves [T, …] → […]."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack)


def plain(adapters: Mapping, features: jax.Array) -> tuple[jax.Array, dict]:
    """LLaVA's own projector: x_img = projector(H_v)."""
    return mlp(adapters["projector"], features), {}


def stage1(adapters: Mapping, features: jax.Array) -> tuple[jax.Array, dict]:
    """x_img = ψ_t(H_v) + ψ_s(H_v); both terms are returned for L_d. Without ψ_s (an ablation) ψ_t alone."""
    x_t = mlp(adapters["task"], features)
    if "client" not in adapters:
        return x_t, {}
    x_s = mlp(adapters["client"], features)
    return x_t + x_s, {"x_t": x_t, "x_s": x_s}


def stage2(adapters: Mapping, features: jax.Array, task_index: jax.Array | int) -> tuple[jax.Array, dict]:
    """CT-MoA: x_img = Σ_i P_i·h_i + ψ_s(H_v), P = softmax(H_v·W_φ) per token.

    h_own = ψ_t^own(H_v) alone; h_i = ψ_t^i(H_v) + ψ_c^i(H_v) for the others. Slots are in global task order; slot
    `task_index` of the bank and of ψ_c is not read. The bank's term and ψ_s are constants of the stage: nothing
    trained lies before them, so no gradient is computed for their weights. Without ψ_s (an ablation) it is not added.
    """
    logits = jnp.matmul(features, adapters["router"]["kernel"].astype(features.dtype),
                        preferred_element_type=jnp.float32)  # [B, N, T]; softmax needs float32
    tasks = logits.shape[-1]
    # One expert after another, each a plain product of matrices; T is the number of tasks, a handful.
    order = (task_index + jnp.arange(tasks)) % tasks  # one's own first
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
    """Reads its adapters from the "connector" collection: the federation's boundary."""

    def __call__(self, features: jax.Array, stage: str, task_index: jax.Array | int) -> tuple[jax.Array, dict]:
        adapters = self.variables["connector"]
        if stage == "plain":
            return plain(adapters, features)
        if stage == "stage1":
            return stage1(adapters, features)
        if stage == "stage2":
            return stage2(adapters, features, task_index)
        raise ValueError(f"stage must be one of {STAGES}, got {stage!r}")
