"""Greedy decoding with a KV cache, for one model or for many clients at once.

The loop is outermost and the model inside it is vmapped over clients: vmapping a `while_loop` instead would select
over the whole carry, cache included, in every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from pilot_jax.models.llama import empty_cache
from pilot_jax.models.vlm import Vlm, variables


@partial(jax.jit, static_argnames=("module", "stage", "max_new_tokens", "eos_id"))
def greedy(module: Vlm, base: Mapping, adapters: Mapping, prompts: Mapping[str, jax.Array], task_index: jax.Array, *,
           stage: str, max_new_tokens: int, eos_id: int) -> jax.Array:
    """Greedy continuations of right-padded prompts, for K models that share one base.

    Args:
        adapters: leaves [K, …]. prompts: input_ids, attention_mask [K, B, L]; features [K, B, N, D] or absent.
        task_index: int32 [K], each model's slot among the experts.
        eos_id: decoding of a row ends with it; the rest of the row is `eos_id`.

    Returns: int32 [K, B, max_new_tokens].
    """
    ids, mask, features = prompts["input_ids"], prompts["attention_mask"], prompts.get("features")
    _, batch, length = ids.shape
    slots = length + max_new_tokens

    def prefill(own, task, ids, mask, features):
        cache = empty_cache(module.config.text, batch, slots, module.dtype)
        return module.apply(variables(base, own), ids, mask, features, cache, stage, task, method="prefill")

    logits, cache = jax.vmap(prefill)(adapters, task_index, ids, mask, features)
    first = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    visible = jnp.pad(mask > 0, ((0, 0), (0, 0), (0, max_new_tokens)))
    lengths = jnp.sum(mask, axis=-1).astype(jnp.int32)

    def unfinished(carry):
        step, done = carry[0], carry[1]
        return (step < max_new_tokens) & ~jnp.all(done)

    def advance(carry):
        step, done, out, cache, visible = carry
        token = out[:, :, step - 1]
        visible = visible.at[:, :, length + step - 1].set(True)

        def one(own, token, position, visible, cache):
            return module.apply(variables(base, own), token, position, visible, cache, length + step - 1,
                                method="decode")

        logits, cache = jax.vmap(one)(adapters, token, lengths + step - 1, visible, cache)
        token = jnp.where(done, eos_id, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
        return step + 1, done | (token == eos_id), out.at[:, :, step].set(token), cache, visible

    out = jnp.full((*first.shape, max_new_tokens), eos_id, jnp.int32).at[:, :, 0].set(first)
    state = (jnp.int32(1), first == eos_id, out, cache, visible)
    return jax.lax.while_loop(unfinished, advance, state)[2]
