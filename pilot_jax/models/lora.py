"""LoRA (Hu et al., 2022, arXiv 2106.09685), the paper's *text-adapter*, as a collection of its own.

Tree: {"layers": {target: {"a": [layers, R, d_in], "b": [layers, d_out, R]}}}: PEFT's orientation, one stacked
leaf per target, so that A and B read as in W' = W + (α/r)·B·A.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pilot_jax.models.config import TextConfig

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


def init_lora(key: jax.Array, config: TextConfig, rank: int) -> dict:
    """A ~ U(±1/√d_in) (PEFT's Kaiming-uniform with a = √5), B = 0, float32. See the module docstring for shapes."""
    layers = {}
    for index, name in enumerate(TARGETS):
        d_in, d_out = config.linear_shapes[name]
        bound = d_in**-0.5
        a = jax.random.uniform(jax.random.fold_in(key, index), (config.num_layers, rank, d_in), jnp.float32,
                               -bound, bound)
        layers[name] = {"a": a, "b": jnp.zeros((config.num_layers, d_out, rank), jnp.float32)}
    return {"layers": layers}


def lora_deltas(x: jax.Array, adapters: Mapping[str, Mapping[str, jax.Array]], names: tuple[str, ...],
                scale: float) -> list[jax.Array]:
    """scale·x·Aᵀ·Bᵀ for every target in `names`, which all read the same x [..., d_in]; one [..., d_out] each.

    The A of same-input targets are concatenated so that x is read once. BA is never formed.
    """
    a = jnp.concatenate([adapters[n]["a"] for n in names]).astype(x.dtype)  # [len(names)·R, d_in]
    low = jnp.einsum("...i,ri->...r", x, a) * scale
    lows = jnp.split(low, len(names), axis=-1)
    return [jnp.einsum("...r,or->...o", u, adapters[n]["b"].astype(x.dtype)) for n, u in zip(names, lows, strict=True)]
