"""Decoding with a KV cache, greedy or sampled, of one model or of many clients' models at once.

The loop is outermost and the model inside it is vmapped over clients: vmapping a `while_loop` instead would select
over the whole carry, cache included, in every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from pilot_jax.models.llama import Cache, empty_cache
from pilot_jax.models.vlm import Vlm, variables
from pilot_jax.programs import KeptJit


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The rule by which tokens are chosen. It is a static argument: each value compiles a program of its own."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]  # each of them ends a row; the rest of the row is filled with the first of them
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # tokens are drawn from the fewest that together have this probability


def nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """Returns logits [..., V] with -inf outside the nucleus (Holtzman et al., 2020, arXiv 1904.09751, §3.1)."""
    ordered = jnp.sort(logits, axis=-1)[..., ::-1]
    probs = jax.nn.softmax(ordered, axis=-1)
    inside = jnp.cumsum(probs, axis=-1) - probs < top_p  # the token that crosses top_p is the last one in
    smallest = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def choose(logits: jax.Array, keys: jax.Array, step: jax.Array | int, how: Decoding) -> jax.Array:
    """Returns the next tokens, int32 [K, B], from logits [K, B, V].

    `keys` [K, B] has one random key per row, from which the key of each `step` is derived.
    """
    if how.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = nucleus(logits / how.temperature, how.top_p)
    draw = jax.vmap(jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row)))
    return draw(keys, logits).astype(jnp.int32)


_Step = tuple[jax.Array, Cache]  # logits and cache


class _Carry(NamedTuple):
    """The state of the decoding loop."""

    step: jax.Array  # int32: number of tokens that every row has so far
    done: jax.Array  # bool [K, B]: rows that have ended
    out: jax.Array  # int32 [K, B, max_new_tokens]
    cache: Cache  # leaves [K, layers, B, KV, L + max_new_tokens, head_dim]
    visible: jax.Array  # bool [K, B, L + max_new_tokens]: slots of the cache that hold visible tokens


# With XLA's faster compilation, the many small operations of a token take a fifth longer, and compile no faster.
@partial(KeptJit, static=("module", "stage", "how"), compile_fast=False)
def generate(module: Vlm, base: Mapping[str, PyTree], adapters: Mapping[str, PyTree], prompts: Mapping[str, jax.Array],
             task_index: jax.Array, *, stage: str, how: Decoding) -> jax.Array:
    """Returns continuations of right-padded prompts, int32 [K, B, max_new_tokens], by K models that share one base.

    Args:
        adapters: leaves [K, …].
        prompts: input_ids and attention_mask, int [K, B, L]; features [K, B, N, D], absent if there are no images; keys
            [K, B], one random key per row, for sampling.
        task_index: int32 [K], each model's own task, for the connector.
        stage: the connector's stage: "plain", "stage1" or "stage2".
    """
    ids, mask, keys, features = *(prompts[n] for n in ("input_ids", "attention_mask", "keys")), prompts.get("features")
    _, batch, length = ids.shape
    slots, stop, fill = length + how.max_new_tokens, jnp.asarray(how.stop_ids), how.stop_ids[0]

    def prefill(own: PyTree, task: jax.Array, ids: jax.Array, mask: jax.Array, features: jax.Array | None) -> _Step:
        cache = empty_cache(module.config.text, batch, slots, module.dtype)
        step = module.apply(variables(base, own), ids, mask, features, cache, stage, task, method="prefill")
        return cast(_Step, step)

    logits, cache = jax.vmap(prefill)(adapters, task_index, ids, mask, features)
    first = choose(logits, keys, 0, how)
    visible = jnp.pad(mask > 0, ((0, 0), (0, 0), (0, how.max_new_tokens)))
    lengths = jnp.sum(mask, axis=-1).astype(jnp.int32)

    def some_row_goes_on(carry: _Carry) -> jax.Array:
        return (carry.step < how.max_new_tokens) & ~jnp.all(carry.done)

    def advance(carry: _Carry) -> _Carry:
        step, done, out, cache, visible = carry
        token = out[:, :, step - 1]
        visible = visible.at[:, :, length + step - 1].set(True)

        def decode(own: PyTree, token: jax.Array, position: jax.Array, visible: jax.Array, cache: Cache) -> _Step:
            slot, both = length + step - 1, variables(base, own)
            return cast(_Step, module.apply(both, token, position, visible, cache, slot, method="decode"))

        logits, cache = jax.vmap(decode)(adapters, token, lengths + step - 1, visible, cache)
        token = jnp.where(done, fill, choose(logits, keys, step, how))
        return _Carry(step + 1, done | jnp.isin(token, stop), out.at[:, :, step].set(token), cache, visible)

    out = jnp.full((*first.shape, how.max_new_tokens), fill, jnp.int32).at[:, :, 0].set(first)
    start = _Carry(jnp.int32(1), jnp.isin(first, stop), out, cache, visible)
    return jax.lax.while_loop(some_row_goes_on, advance, start).out
