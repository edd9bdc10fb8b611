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


@jax.custom_vjp
def low_rank(x: jax.Array, a: jax.Array, bs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """x [T, d_in], A of all targets [ΣR, d_in], Bᵀ of each [R_i, d_out_i] → x·Aᵀ·Bᵀ of each, [T, d_out_i].

    Its gradient rule puts the small operand first in every product over tokens. Autodiff puts the wide one first, and
    XLA's CPU backend then turns all of it round in memory.
    """
    return _forward(x, a, bs)[0]


def _forward(x, a, bs):
    u = x @ a.T
    outs, start = [], 0
    for b in bs:
        outs.append(u[:, start:start + len(b)] @ b)
        start += len(b)
    return tuple(outs), (x, u, a, bs)


def _backward(saved, gs):
    x, u, a, bs = saved
    over_tokens = (((0,), (0,)), ((), ()))
    gu = jnp.concatenate([g @ b.T for g, b in zip(gs, bs, strict=True)], axis=-1)
    dbs, start = [], 0
    for g, b in zip(gs, bs, strict=True):
        dbs.append(jax.lax.dot_general(u[:, start:start + len(b)], g, over_tokens))
        start += len(b)
    return gu @ a, jax.lax.dot_general(gu, x, over_tokens), tuple(dbs)


low_rank.defvjp(_forward, _backward)


def lora_deltas(x: jax.Array, adapters: Mapping[str, Mapping[str, jax.Array]], names: tuple[str, ...],
                scale: float) -> tuple[jax.Array, ...]:
    """scale·x·Aᵀ·Bᵀ for every target in `names`, which all read the same x [T, d_in]; one [T, d_out] each.

    The A of same-input targets are concatenated so that x is read once. BA is never formed.
    """
    a = jnp.concatenate([adapters[n]["a"] for n in names]).astype(x.dtype)  # [len(names)·R, d_in]
    return low_rank(x, a, tuple((adapters[n]["b"].T * scale).astype(x.dtype) for n in names))
