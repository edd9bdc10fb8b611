"""LoRA (Hu et al., 2022, arXiv 2106.09685), the paper's *text-adapter*, as a Flax collection of its own.

A LoRA is a tree {"layers": {target: {"a": [layers, R, d_in], "b": [layers, d_out, R]}}}. A and B have PEFT's
orientation, that of W' = W + (α/r)·B·A, and each target's layers are stacked in one leaf.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from pilot_jax.kernels.low_rank import linears_with_low_rank
from pilot_jax.models.experts import is_mixture, mixed, with_experts
from pilot_jax.models.spec import TextSpec
from pilot_jax.programs import KeptJit

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
# Names of the subtrees that make up a client's LoRA: the whole, or its two factors for strategies that treat A and B
# differently; a second LoRA that is private; and further experts with their router (`models.experts`).
LORA_SUBTREES = ("text_adapter", "text_adapter_a", "text_adapter_b", "private_adapter", "expert_bank", "expert_router",
                 "expert_slots")

LoraTree = dict[str, dict[str, dict[str, jax.Array]]]


@partial(KeptJit, static=("config", "rank"))
def init_lora(key: Key[Array, ""], config: TextSpec, rank: int) -> LoraTree:
    """Returns a new LoRA in float32: A is uniform in ±1/√d_in (PEFT's Kaiming-uniform with a = √5), and B is 0."""
    layers = {}
    for index, name in enumerate(TARGETS):
        d_in, d_out = config.linear_shapes[name]
        bound = d_in**-0.5
        a = jax.random.uniform(jax.random.fold_in(key, index), (config.num_layers, rank, d_in), jnp.float32,
                               -bound, bound)
        layers[name] = {"a": a, "b": jnp.zeros((config.num_layers, d_out, rank), jnp.float32)}
    return {"layers": layers}


def factors(adapter: Mapping[str, PyTree]) -> dict[str, dict[str, PyTree]]:
    """Splits a LoRA into the subtrees `text_adapter_a` and `text_adapter_b`, with one leaf per target."""
    return {f"text_adapter_{x}": {name: pair[x] for name, pair in adapter["layers"].items()} for x in ("a", "b")}


def assembled(adapters: Mapping[str, PyTree]) -> PyTree | None:
    """Returns the LoRA that a client's subtrees in LORA_SUBTREES add up to; None if it has none of them.

    The sum of two LoRAs is one LoRA of twice the rank: B_1·A_1 + B_2·A_2 = [B_1 B_2]·[A_1; A_2]. Experts that a router
    mixes are no LoRA: their targets have the leaves that `models.experts.with_experts` names.
    """
    if "text_adapter_a" in adapters:
        a, b = adapters["text_adapter_a"], adapters["text_adapter_b"]
        shared: PyTree | None = {"layers": {name: {"a": a[name], "b": b[name]} for name in a}}
    else:
        shared = adapters.get("text_adapter")
    if shared is not None and "expert_router" in adapters:
        return with_experts(shared, adapters)
    private = adapters.get("private_adapter")
    if private is None or shared is None:
        return shared
    return {"layers": {name: {"a": jnp.concatenate([pair["a"], private["layers"][name]["a"]], axis=-2),
                              "b": jnp.concatenate([pair["b"], private["layers"][name]["b"]], axis=-1)}
                       for name, pair in shared["layers"].items()}}


def lora_linears(x: Float[Array, "tokens d_in"], kernels: tuple[Float[Array, "d_in _d_out"], ...],
                 adapters: Mapping[str, Mapping[str, Float[Array, ...]]], names: tuple[str, ...], scale: float,
                 operands: str = "float32") -> tuple[Float[Array, "tokens _d_out"], ...]:
    """Returns x·W + scale·x·Aᵀ·Bᵀ of every target in `names`; all of them read the same x.

    Args:
        kernels: W of each target, in the order of `names`.
        adapters: one layer of a LoRA, {target: {"a": [R, d_in], "b": [d_out, R]}}, or of several that a router mixes,
            with the leaves of `models.experts.mixed`.
        scale: α/r.
        operands: the dtype of the factors of products with W + scale·B·A; see `kernels.low_rank.merged`. Several
            experts form no such sum.
    """
    if is_mixture({n: adapters[n] for n in names}):
        return tuple(x @ w + mixed(x, adapters[n], scale) for n, w in zip(names, kernels, strict=True))
    a = jnp.concatenate([adapters[n]["a"] for n in names]).astype(x.dtype)  # [len(names)·R, d_in]: reads x once
    bs = tuple((adapters[n]["b"].T * scale).astype(x.dtype) for n in names)
    return linears_with_low_rank(x, kernels, a, bs, operands)
