"""Decoding with a KV cache, greedy or sampled, for one model or for many clients at once.

The loop is outermost and the model inside it is vmapped over clients: vmapping a `while_loop` instead would select
over the whole carry, cache included, in every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from pilot_jax.models.llama import empty_cache
from pilot_jax.models.vlm import Vlm, variables


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How tokens are chosen. One compiled program per value."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]  # any of them ends a row, which is then filled with the first
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # sample among the fewest tokens that together have this probability


def nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """Logits [..., V] with -inf outside the nucleus (Holtzman et al., 2020, arXiv 1904.09751, §3.1)."""
    ordered = jnp.sort(logits, axis=-1)[..., ::-1]
    probs = jax.nn.softmax(ordered, axis=-1)
    inside = jnp.cumsum(probs, axis=-1) - probs < top_p  # the token that crosses top_p is the last one in
    smallest = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def choose(logits: jax.Array, keys: jax.Array, step: jax.Array | int, how: Decoding) -> jax.Array:
    """Next tokens int32 [K, B] from logits [K, B, V]; keys [K, B], one stream of randomness per row."""
    if how.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = nucleus(logits / how.temperature, how.top_p)
    draw = jax.vmap(jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row)))
    return draw(keys, logits).astype(jnp.int32)


@partial(jax.jit, static_argnames=("module", "stage", "how"))
def generate(module: Vlm, base: Mapping, adapters: Mapping, prompts: Mapping[str, jax.Array], task_index: jax.Array,
             keys: jax.Array, *, stage: str, how: Decoding) -> jax.Array:
    """Continuations of right-padded prompts, for K models that share one base.

    Args:
        adapters: leaves [K, …]. prompts: input_ids, attention_mask [K, B, L]; features [K, B, N, D] or absent.
        task_index: int32 [K], each model's slot among the experts. keys: [K, B], for sampling.

    Returns: int32 [K, B, max_new_tokens]. Decoding ends when every row has.
    """
    ids, mask, features = prompts["input_ids"], prompts["attention_mask"], prompts.get("features")
    _, batch, length = ids.shape
    slots, stop, fill = length + how.max_new_tokens, jnp.asarray(how.stop_ids), how.stop_ids[0]

    def prefill(own, task, ids, mask, features):
        cache = empty_cache(module.config.text, batch, slots, module.dtype)
        return module.apply(variables(base, own), ids, mask, features, cache, stage, task, method="prefill")

    logits, cache = jax.vmap(prefill)(adapters, task_index, ids, mask, features)
    first = choose(logits, keys, 0, how)
    visible = jnp.pad(mask > 0, ((0, 0), (0, 0), (0, how.max_new_tokens)))
    lengths = jnp.sum(mask, axis=-1).astype(jnp.int32)

    def unfinished(carry):
        step, done = carry[0], carry[1]
        return (step < how.max_new_tokens) & ~jnp.all(done)

    def advance(carry):
        step, done, out, cache, visible = carry
        token = out[:, :, step - 1]
        visible = visible.at[:, :, length + step - 1].set(True)

        def one(own, token, position, visible, cache):
            return module.apply(variables(base, own), token, position, visible, cache, length + step - 1,
                                method="decode")

        logits, cache = jax.vmap(one)(adapters, token, lengths + step - 1, visible, cache)
        token = jnp.where(done, fill, choose(logits, keys, step, how))
        return step + 1, done | jnp.isin(token, stop), out.at[:, :, step].set(token), cache, visible

    out = jnp.full((*first.shape, how.max_new_tokens), fill, jnp.int32).at[:, :, 0].set(first)
    state = (jnp.int32(1), jnp.isin(first, stop), out, cache, visible)
    return jax.lax.while_loop(unfinished, advance, state)[2]
