"""LoRA (Hu et al., 2022, arXiv 2106.09685), the paper's *text-adapter*, as a collection of its own.

Tree: {"layers": {target: {"a": [layers, R, d_in], "b": [layers, d_out, R]}}}: PEFT's orientation, one stacked
leaf per target, so that A and B read as in W' = W + (α/r)·B·A.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pilot_jax.kernels.low_rank import low_rank, merged
from pilot_jax.models.spec import TextSpec

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
# The subtrees a client's LoRA may consist of: whole, or as its factors, for strategies that treat A and B apart; and a
# second one beside it.
LORA_SUBTREES = ("text_adapter", "text_adapter_a", "text_adapter_b", "private_adapter")


def init_lora(key: jax.Array, config: TextSpec, rank: int) -> dict:
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
