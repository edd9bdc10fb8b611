"""Llama decoder (Touvron et al., 2023, arXiv 2302.13971) and its kin (Mistral, Qwen2) with LoRA and a KV cache.

Layers are stacked and scanned. q/k/v share one kernel [C, KV, H/KV + 2, head_dim], grouped by key-value head so that
it shards over KV; gate/up share [C, 2, F].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pilot_jax.models.config import RopeConfig, TextConfig
from pilot_jax.models.lora import lora_deltas

MASKED = -1e30  # finite, so that a row with no visible key gives uniform weights instead of NaN


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each pair, float32 [head_dim/2].

    llama3 (Llama 3.1's long-context rule): wavelengths below original/high keep their frequency, those above
    original/low have it divided by `factor`, and those between are interpolated.
    """
    inverse = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        inverse = inverse / rope.factor
    elif rope.kind == "llama3":
        turns = rope.original_max_positions * inverse / (2 * np.pi)  # in the original context
        share = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
        inverse = share * inverse + (1 - share) * inverse / rope.factor
    return inverse.astype(np.float32)


def rope_tables(config: TextConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, L, head_dim/2] for positions [B, L]; float32, since angles at large positions need it."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config.rope, config.head_dim)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x [B, L, ..., head_dim] by half-split pairs (Hugging Face's layout)."""
    shape = (*cos.shape[:2], *(1,) * (x.ndim - 3), cos.shape[-1])
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


class DecoderBlock(nn.Module):
    """x [B, L, C]; cache {"k","v": [B, S, KV, head_dim]} or None; masks [B, L, S] bool, True = visible.

    `masks` are (everything before, what the sliding window leaves); `windowed` picks one where layers differ.
    """

    config: TextConfig
    lora_scale: float

    def _weight(self, name: str, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return self.param(name, nn.initializers.normal(0.02), shape).astype(dtype)

    def _bias(self, name: str, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return self.param(name, nn.initializers.zeros, shape).astype(dtype)

    @nn.compact
    def __call__(self, x, cache, windowed, cos, sin, masks, slot):
        c, (batch, length, _) = self.config, x.shape
        kv, groups, hd, wide = c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim, c.intermediate_size
        lora = {n: self.get_variable("lora", n) for n in c.linear_shapes} if self.has_variable("lora", "q") else None

        h = rms_norm(x, self.param("norm1", nn.initializers.ones, (c.hidden_size,)), c.rms_norm_eps)
        qkv = jnp.einsum("blc,ckgd->blkgd", h, self._weight("qkv", (c.hidden_size, kv, groups + 2, hd), x.dtype))
        if "q" in c.biases:
            qkv = qkv + self._bias("qkv_bias", (kv, groups + 2, hd), x.dtype)
        if lora:
            dq, dk, dv = lora_deltas(h, lora, ("q", "k", "v"), self.lora_scale)
            one_each = (batch, length, kv, 1, hd)
            qkv = qkv + jnp.concatenate(
                [dq.reshape(batch, length, kv, groups, hd), dk.reshape(one_each), dv.reshape(one_each)], axis=3)
        rotated = apply_rope(qkv[:, :, :, : groups + 1], cos, sin)
        q, k, v = rotated[:, :, :, :groups], rotated[:, :, :, groups], qkv[:, :, :, groups + 1]
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache["k"], k, slot, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache["v"], v, slot, axis=1)
            cache = {"k": k, "v": v}
        mask = masks[0] if len(masks) == 1 else jnp.where(windowed, masks[1], masks[0])
        scores = jnp.einsum("blkgd,bskd->bkgls", q, k, preferred_element_type=jnp.float32) * hd**-0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1).astype(x.dtype)
        attended = jnp.einsum("bkgls,bskd->blkgd", weights, v).reshape(batch, length, kv * groups * hd)
        out = attended @ self._weight("o", (kv * groups * hd, c.hidden_size), x.dtype)
        if "o" in c.biases:
            out = out + self._bias("o_bias", (c.hidden_size,), x.dtype)
        if lora:
            out = out + lora_deltas(attended, lora, ("o",), self.lora_scale)[0]
        x = x + out

        h = rms_norm(x, self.param("norm2", nn.initializers.ones, (c.hidden_size,)), c.rms_norm_eps)
        gate_up = jnp.einsum("blc,cnf->blnf", h, self._weight("gate_up", (c.hidden_size, 2, wide), x.dtype))
        if "gate" in c.biases:
            gate_up = gate_up + self._bias("gate_up_bias", (2, wide), x.dtype)
        gate, up = gate_up[:, :, 0], gate_up[:, :, 1]
        if lora:
            d_gate, d_up = lora_deltas(h, lora, ("gate", "up"), self.lora_scale)
            gate, up = gate + d_gate, up + d_up
        inner = jax.nn.silu(gate) * up
        out = inner @ self._weight("down", (wide, c.hidden_size), x.dtype)
        if "down" in c.biases:
            out = out + self._bias("down_bias", (c.hidden_size,), x.dtype)
        if lora:
            out = out + lora_deltas(inner, lora, ("down",), self.lora_scale)[0]
        return x + out, cache


class Decoder(nn.Module):
    """Token embedding, scanned blocks, final norm and output head."""

    config: TextConfig
    lora_scale: float = 1.0
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    unroll: int = 1

    def setup(self) -> None:
        c = self.config
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size))
        # prevent_cse is for code outside scans; inside one it only blocks optimisation.
        block = nn.remat(DecoderBlock, prevent_cse=False) if self.remat else DecoderBlock
        scanned = nn.scan(
            block, variable_axes={"params": 0, "lora": 0}, split_rngs={"params": True},
            in_axes=(0, 0, *(nn.broadcast,) * 4), length=c.num_layers,
            unroll=self.unroll)
        self.layers = scanned(c, self.lora_scale)
        self.norm = self.param("norm", nn.initializers.ones, (c.hidden_size,))
        if not c.tie_word_embeddings:
            self.head = self.param("head", nn.initializers.normal(0.02), (c.hidden_size, c.vocab_size))

    def embed(self, ids: jax.Array) -> jax.Array:
        """ids [B, L] → [B, L, C]."""
        return self.embedding.astype(self.dtype)[ids]

    def hidden(self, x: jax.Array, positions: jax.Array, mask: jax.Array, cache: dict | None = None,
               slot: jax.Array | int = 0, key_positions: jax.Array | None = None) -> tuple[jax.Array, dict | None]:
        """Final normed states [B, L, C] and the updated cache.

        positions [B, L] are RoPE positions; mask [B, L, S] says which of the S keys a query sees. With a cache
        ({"k","v": [layers, B, S, KV, head_dim]}) the L new keys are written at `slot`, and key_positions [B, S] say
        where its keys stand, for the sliding window; without one they are `positions`.
        """
        c = self.config
        cos, sin = rope_tables(c, positions)
        masks = (mask,)
        if c.sliding_window is not None:
            keys = positions if key_positions is None else key_positions
            near = mask & (positions[:, :, None] - keys[:, None, :] < c.sliding_window)
            masks = (near,) if all(c.sliding_layers) else (mask, near)
        windowed = jnp.asarray(c.sliding_layers or (False,) * c.num_layers)
        x, cache = self.layers(x, cache, windowed, cos, sin, masks, slot)
        return rms_norm(x, self.norm, c.rms_norm_eps), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., C] → float32 logits [..., V]."""
        head = self.embedding.T if self.config.tie_word_embeddings else self.head
        return jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def empty_cache(config: TextConfig, batch: int, slots: int, dtype: jnp.dtype) -> dict:
    """Zeros {"k","v": [layers, B, slots, KV, head_dim]}."""
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}
