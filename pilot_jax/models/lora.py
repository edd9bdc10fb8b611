"""LoRA (Hu et al., 2022, arXiv 2106.09685), the paper's *text-adapter*, as a Flax collection of its own.

A LoRA is a tree {"layers": {target: {"a": [layers, R, d_in], "b": [layers, d_out, R]}}}. A and B have PEFT's
orientation, that of W' = W + (α/r)·B·A, and each target's layers are stacked in one leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Key, PyTree, UInt32

from pilot_jax.kernels.low_rank import linears_with_low_rank
from pilot_jax.kernels.quantised import Kernel, Stored, product
from pilot_jax.models.experts import is_mixture, mixed, with_experts
from pilot_jax.models.spec import TARGETS, TextSpec
from pilot_jax.programs import KeptJit

# Names of the subtrees that make up a client's LoRA: the whole, or its two factors for strategies that treat A and B
# differently; a second LoRA, whose output is added; and further experts with their router (`models.experts`). Two more
# go with it: the factors of a change of the frozen weights, which is the same for all clients, and the factor α/r of a
# client's own rank, relative to the model's α/R.
RESIDUAL, SCALE = "text_residual", "text_scale"
LORA_SUBTREES = ("text_adapter", "text_adapter_a", "text_adapter_b", "private_adapter", "expert_bank", "expert_router",
                 "expert_slots", RESIDUAL, SCALE)

DROPOUT = "lora_dropout"  # name of the keys of dropout in a batch, uint32 [B, 2]

LoraTree = dict[str, dict[str, dict[str, jax.Array]]]


@partial(KeptJit, static=("config", "rank"))
def init_lora(key: Key[Array, ""], config: TextSpec, rank: int) -> LoraTree:
    """Returns a new LoRA in float32 on `config.lora_targets`: A is uniform in ±1/√d_in (PEFT's Kaiming-uniform with
    a = √5), and B is 0."""
    layers = {}
    for index, name in enumerate(TARGETS):
        if name not in config.lora_targets:
            continue
        d_in, d_out = config.linear_shapes[name]
        bound = d_in**-0.5
        a = jax.random.uniform(jax.random.fold_in(key, index), (config.num_layers, rank, d_in), jnp.float32,
                               -bound, bound)
        layers[name] = {"a": a, "b": jnp.zeros((config.num_layers, d_out, rank), jnp.float32)}
    return {"layers": layers}


def factors(adapter: Mapping[str, PyTree]) -> dict[str, dict[str, PyTree]]:
    """Splits a LoRA into the subtrees `text_adapter_a` and `text_adapter_b`, with one leaf per target."""
    return {f"text_adapter_{x}": {name: pair[x] for name, pair in adapter["layers"].items()} for x in ("a", "b")}


def on_factors(name: str, tree: PyTree, on_a: Callable[[Any], Any], on_b: Callable[[Any], Any]) -> PyTree:
    """Returns the subtree `name` of LORA_SUBTREES with a function applied to every A and another to every B."""
    if name == "text_adapter_a":
        return jax.tree.map(on_a, tree)
    if name == "text_adapter_b":
        return jax.tree.map(on_b, tree)
    return {"layers": {target: {"a": on_a(pair["a"]), "b": on_b(pair["b"])} for target, pair in tree["layers"].items()}}


def joined(first: PyTree, second: PyTree) -> PyTree:
    """Returns the sum of two LoRAs as one LoRA of both ranks: B_1·A_1 + B_2·A_2 = [B_1 B_2]·[A_1; A_2]."""
    return {"layers": {name: {"a": jnp.concatenate([pair["a"], second["layers"][name]["a"]], axis=-2),
                              "b": jnp.concatenate([pair["b"], second["layers"][name]["b"]], axis=-1)}
                       for name, pair in first["layers"].items()}}


def assembled(adapters: Mapping[str, PyTree]) -> PyTree | None:
    """Returns the LoRA that a client's subtrees in LORA_SUBTREES add up to; None if it has none of them.

    A change of the frozen weights (RESIDUAL) is not part of it; `joined` adds it. Experts that a router mixes are no
    LoRA: their targets have the leaves that `models.experts.with_experts` names.
    """
    if "text_adapter_a" in adapters:
        a, b = adapters["text_adapter_a"], adapters["text_adapter_b"]
        lora: PyTree | None = {"layers": {name: {"a": a[name], "b": b[name]} for name in a}}
    else:
        lora = adapters.get("text_adapter")
    if lora is None:
        return None
    if "expert_router" in adapters:
        return with_experts(lora, adapters)
    if "private_adapter" in adapters:
        lora = joined(lora, adapters["private_adapter"])
    if SCALE in adapters:
        factor = adapters[SCALE]["factor"]
        lora = {"layers": {name: {"a": pair["a"], "b": pair["b"] * factor} for name, pair in lora["layers"].items()}}
    return lora


def collection(adapters: Mapping[str, PyTree]) -> PyTree | None:
    """Returns `assembled` as the decoder reads it: with the factors of a change of the frozen weights, if there is one.

    They are leaves of their own, so that clients that train side by side share them.
    """
    lora, residual = assembled(adapters), adapters.get(RESIDUAL)
    if lora is None or residual is None:
        return lora
    return {"layers": {name: {**pair, "residual_a": residual["layers"][name]["a"],
                              "residual_b": residual["layers"][name]["b"]} for name, pair in lora["layers"].items()}}


def folded(key: UInt32[Array, " 2"], number: Int[ArrayLike, ""]) -> UInt32[Array, " 2"]:
    """Returns another key, as numbers, for each number."""
    return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), number))


def with_dropout(lora: Mapping[str, PyTree], keys: UInt32[Array, "B 2"], rate: float) -> PyTree:
    """Returns a LoRA, as the decoder reads it, that drops a share `rate` of its inputs (Srivastava et al., 2014).

    Each sample has a key, so that what is dropped of it does not depend on the batch that it is in.
    """
    layers = {}
    for index, (name, pair) in enumerate(sorted(lora["layers"].items())):
        count = len(pair["a"])
        own = jax.vmap(lambda layer, index=index: jax.vmap(
            lambda key: folded(key, layer * len(TARGETS) + index))(keys))(jnp.arange(count))
        layers[name] = {**pair, "dropout_keys": own, "keep": jnp.full(count, 1 - rate)}
    return {"layers": layers}


def _dropped(x: Float[Array, "tokens d_in"], pair: Mapping[str, Array]) -> Float[Array, "tokens d_in"]:
    """Returns x with some entries set to 0 and the others divided by the share that is kept."""
    shape = (len(x) // len(pair["dropout_keys"]), x.shape[1])  # of one sample
    kept = jax.vmap(lambda key: jax.random.bernoulli(jax.random.wrap_key_data(key), pair["keep"], shape))(
        pair["dropout_keys"]).reshape(x.shape)
    return jnp.where(kept, x / pair["keep"].astype(x.dtype), 0)


def lora_linears(x: Float[Array, "tokens d_in"], kernels: tuple[Kernel, ...],
                 adapters: Mapping[str, Mapping[str, Float[Array, ...]]], names: tuple[str, ...], scale: float,
                 operands: str = "float32") -> tuple[Float[Array, "tokens _d_out"], ...]:
    """Returns x·W + scale·x·Aᵀ·Bᵀ of every target in `names`; all of them read the same x.

    Args:
        kernels: W of each target, in the order of `names`.
        adapters: one layer of a LoRA, {target: {"a": [R, d_in], "b": [d_out, R]}}. With "residual_a" [C, d_in] and
            "residual_b" [d_out, C] beside them, W is W + scale·(residual_b·residual_a)ᵀ. With the leaves of
            `with_dropout`, LoRA reads x after dropout. Or one layer of several LoRA that a router mixes, with the
            leaves of `models.experts.mixed`.
        scale: α/r.
        operands: the dtype of the factors of products with W + scale·B·A; see `kernels.low_rank.merged`. Several
            experts form no such sum.
    """
    if is_mixture({n: adapters[n] for n in names}):
        return tuple(product(x, w) + mixed(x, adapters[n], scale) for n, w in zip(names, kernels, strict=True))
    if "residual_a" in adapters[names[0]]:
        if any(isinstance(w, Stored) for w in kernels):
            return _with_residual(x, kernels, adapters, names, scale, operands)
        kernels = tuple(w + (scale * adapters[n]["residual_a"].T @ adapters[n]["residual_b"].T).astype(w.dtype)
                        for n, w in zip(names, cast(tuple[Array, ...], kernels), strict=True))
    if "dropout_keys" in adapters[names[0]]:
        return tuple(product(x, w) + (_dropped(x, adapters[n]) @ adapters[n]["a"].T.astype(x.dtype))
                     @ (adapters[n]["b"].T * scale).astype(x.dtype) for n, w in zip(names, kernels, strict=True))
    a = jnp.concatenate([adapters[n]["a"] for n in names]).astype(x.dtype)  # [len(names)·R, d_in]: reads x once
    bs = tuple((adapters[n]["b"].T * scale).astype(x.dtype) for n in names)
    return linears_with_low_rank(x, kernels, a, bs, operands)


def _with_residual(x: Array, kernels: tuple[Kernel, ...], adapters: Mapping[str, Mapping[str, Array]],
                   names: tuple[str, ...], scale: float, operands: str) -> tuple[Array, ...]:
    """Returns `lora_linears` with a change of `Stored` weights, which is a product of its own: it forms no sum."""
    kept = {n: {k: leaf for k, leaf in adapters[n].items() if not k.startswith("residual_")} for n in names}
    changes = [x @ adapters[n]["residual_a"].T.astype(x.dtype) @ (scale * adapters[n]["residual_b"].T).astype(x.dtype)
               for n in names]
    return tuple(y + change for y, change in zip(
        lora_linears(x, kernels, kept, names, scale, operands), changes, strict=True))
