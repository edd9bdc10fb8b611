"""LoRA (Hu et al., 2022, arXiv 2106.09685), the paper's *text-adapter*, as a collection of its own.

Tree: {"layers": {target: {"a": [layers, R, d_in], "b": [layers, d_out, R]}}}: PEFT's orientation, one stacked
leaf per target, so that A and B read as in W' = W + (α/r)·B·A.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from pilot_jax.models.config import TextConfig

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
# The subtrees a client's LoRA may consist of: whole, or as its factors, for strategies that treat A and B apart; and a
# second one beside it.
LORA_SUBTREES = ("text_adapter", "text_adapter_a", "text_adapter_b", "private_adapter")


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


def factors(adapter: Mapping) -> dict[str, dict]:
    """A LoRA as the subtrees `text_adapter_a` and `text_adapter_b`, one leaf per target."""
    return {f"text_adapter_{x}": {name: pair[x] for name, pair in adapter["layers"].items()} for x in ("a", "b")}


def assembled(adapters: Mapping) -> dict | None:
    """The one LoRA that a client's subtrees make, None if they hold none.

    Two side by side are one of twice the rank: B_1·A_1 + B_2·A_2 = [B_1 B_2]·[A_1; A_2].
    """
    if "text_adapter_a" in adapters:
        a, b = adapters["text_adapter_a"], adapters["text_adapter_b"]
        shared: dict | None = {"layers": {name: {"a": a[name], "b": b[name]} for name in a}}
    else:
        shared = adapters.get("text_adapter")
    private = adapters.get("private_adapter")
    if private is None or shared is None:
        return shared
    return {"layers": {name: {"a": jnp.concatenate([pair["a"], private["layers"][name]["a"]], axis=-2),
                              "b": jnp.concatenate([pair["b"], private["layers"][name]["b"]], axis=-1)}
                       for name, pair in shared["layers"].items()}}


@jax.custom_vjp
def low_rank(x: jax.Array, a: jax.Array, bs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """x [T, d_in], A of all targets [ΣR, d_in], Bᵀ of each [R_i, d_out_i] → x·Aᵀ·Bᵀ of each, [T, d_out_i].

    Its gradient rule puts the small operand first in every product over tokens. Autodiff puts the wide one first, and
    XLA's CPU backend then turns all of it round in memory.
    """
    return _forward(x, a, bs)[0]


def _forward(x, a, bs):
    u = x @ a.T
    return tuple(part @ b for part, b in zip(_split(u, bs), bs, strict=True)), (x, u, a, bs)


def _split(u: jax.Array, bs: tuple[jax.Array, ...]) -> list[jax.Array]:
    """Columns (or rows, for A) of each target."""
    return jnp.split(u, np.cumsum([len(b) for b in bs])[:-1], axis=-1)


def _factor_gradients(x, u, bs, gs):
    """Gradients of A and of each B, and x·A's own, [T, ΣR]."""
    over_tokens = (((0,), (0,)), ((), ()))
    gu = jnp.concatenate([g @ b.T for g, b in zip(gs, bs, strict=True)], axis=-1)
    dbs = tuple(jax.lax.dot_general(part, g, over_tokens) for part, g in zip(_split(u, bs), gs, strict=True))
    return jax.lax.dot_general(gu, x, over_tokens), dbs, gu


def _backward(saved, gs):
    x, u, a, bs = saved
    da, dbs, gu = _factor_gradients(x, u, bs, gs)
    return gu @ a, da, dbs


low_rank.defvjp(_forward, _backward)


@jax.custom_vjp
def merged(x: jax.Array, kernels: tuple[jax.Array, ...], a: jax.Array, bs: tuple[jax.Array, ...]
           ) -> tuple[jax.Array, ...]:
    """x·(W_i + A_iᵀ·B_iᵀ) of each target: `low_rank` added to x·W_i, in one product.

    The sums are formed for one layer at a time and again for the gradient; none is kept. No gradient for the kernels:
    what has LoRA beside it is frozen.
    """
    return _merged_forward(x, kernels, a, bs)[0]


def _sums(kernels, a, bs):
    return [w + part.T @ b for w, part, b in zip(kernels, [p.T for p in _split(a.T, bs)], bs, strict=True)]


def _merged_forward(x, kernels, a, bs):
    return tuple(x @ w for w in _sums(kernels, a, bs)), (x, kernels, a, bs)


def _merged_backward(saved, gs):
    x, kernels, a, bs = saved
    da, dbs, _ = _factor_gradients(x, x @ a.T, bs, gs)
    over_outputs = (((1,), (1,)), ((), ()))
    dx = sum(jax.lax.dot_general(g, w, over_outputs) for g, w in zip(gs, _sums(kernels, a, bs), strict=True))
    return dx, tuple(jnp.zeros_like(w) for w in kernels), da, dbs


merged.defvjp(_merged_forward, _merged_backward)


def lora_linears(x: jax.Array, kernels: tuple[jax.Array, ...], adapters: Mapping[str, Mapping[str, jax.Array]],
                 names: tuple[str, ...], scale: float) -> tuple[jax.Array, ...]:
    """x·W + scale·x·Aᵀ·Bᵀ for every target in `names`, which all read the same x [T, d_in]; one [T, d_out] each.

    The A of same-input targets are concatenated so that x is read once. BA is added to W on CPU alone, in float32 and
    one layer at a time: there thin products take longer than the sum. Elsewhere it is never formed: it would be a
    kernel for each client, and in bfloat16 the sum would lose most of it.
    """
    a = jnp.concatenate([adapters[n]["a"] for n in names]).astype(x.dtype)  # [len(names)·R, d_in]
    bs = tuple((adapters[n]["b"].T * scale).astype(x.dtype) for n in names)
    if jax.default_backend() == "cpu" and x.dtype == jnp.float32:
        return merged(x, kernels, a, bs)
    return tuple(x @ w + delta for w, delta in zip(kernels, low_rank(x, a, bs), strict=True))
