"""The decoder of Llama (Touvron et al., 2023, arXiv 2302.13971), Mistral and Qwen2, with LoRA and a KV cache.

The weights of all layers are stacked, and the layers are computed by a scan. Every linear layer has its own kernel
[d_in, d_out]. Fusing the kernels that read the same input is slower on CPU, where slicing the product costs more than
the larger product saves (docs/performance.md).

Dimension letters besides the package's own: M keys (the text's, or the slots of a cache), H query heads, KV heads of
keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import PyTree

from pilot_jax.config.model import Remat
from pilot_jax.kernels.attention import MASKED, attention, causal_attention
from pilot_jax.kernels.pointwise import rms_norm, swiglu
from pilot_jax.kernels.quantised import Kernel, Stored, is_quantised, product
from pilot_jax.kernels.rotation import rotated
from pilot_jax.models.lora import lora_linears
from pilot_jax.models.spec import RopeSpec, TextSpec
from pilot_jax.parallel.mesh import gathered

Attention = Literal["own", "cudnn", "xla"]  # `attention` of this package, or an implementation of `causal_attention`
# What the backward pass of a layer reads from memory, by `remat`. Selective: the outputs of linear layers, from which
# the rest (norms, RoPE, attention, SwiGLU) is computed again.
LINEAR = "output of a linear layer"
POLICIES = {True: None, "selective": jax.checkpoint_policies.save_only_these_names(LINEAR)}
Cache = dict[str, jax.Array]  # {"k", "v"}, each [layers, B, KV, M, head_dim], or [B, KV, M, head_dim] inside one layer


class CachedKeys(NamedTuple):
    """A KV cache, and where the new tokens enter it."""

    cache: Cache
    slot: jax.Array | int  # the slot of the first new key
    positions: jax.Array  # RoPE positions of all keys, int [B, M], for the sliding window


class LayerInputs(NamedTuple):
    """The inputs that are the same for all layers."""

    cos: jax.Array  # RoPE table, float32 [B, 1, L, head_dim]
    sin: jax.Array  # likewise
    biases: tuple[jax.Array, ...]  # each float32 [B, L, M], 0 or MASKED: none, one, or (without, with sliding window)
    slot: jax.Array | int  # the slot of the cache from which the new keys are written


def rope_frequencies(rope: RopeSpec, head_dim: int) -> np.ndarray:
    """Returns the rotation of each pair of dimensions in radians per position, float32 [head_dim/2].

    With the kind "llama3" (Llama 3.1's rule for long contexts), wavelengths below original_max_positions /
    high_freq_factor keep their frequency, those above original_max_positions / low_freq_factor have it divided by
    `factor`, and those between are interpolated.
    """
    inverse = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        inverse = inverse / rope.factor
    elif rope.kind == "llama3":
        turns = rope.original_max_positions * inverse / (2 * np.pi)  # over the original context
        share = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
        inverse = share * inverse + (1 - share) * inverse / rope.factor
    return inverse.astype(np.float32)


def rope_tables(config: TextSpec, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns RoPE's cos and sin for positions [B, L], each float32 [B, 1, L, head_dim]; large angles need float32."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config.rope, config.head_dim)
    cos, sin = (jnp.concatenate([f(angles)] * 2, axis=-1)[:, None] for f in (jnp.cos, jnp.sin))
    return cos, sin


def take_rows(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns x [B, L, C] at the positions `rows` [B, A], exactly: [B, A, C].

    It is computed as a product with one-hot rows, so that its gradient is a product too. The gradient of a gather would
    be a scatter, which XLA's CPU backend computes entry by entry.
    """
    picks = jax.nn.one_hot(rows, x.shape[1], dtype=x.dtype)
    return jnp.einsum("bal,blc->bac", picks, x, precision=jax.lax.Precision.HIGHEST)


class DecoderBlock(nn.Module):
    """One decoder layer: x [B, L, C] → [B, L, C], and the layer's cache with the new keys and values.

    If `shared.biases` has two entries, the bool `windowed` chooses the one with the sliding window. If it has none,
    attention is causal and computed by `kernel`. With `rows` [B, A], only the outputs at these positions are computed,
    [B, A, C], from the keys and values of all L positions. With a `mesh`, each weight is gathered over its axis
    `fsdp` for its products.
    """

    config: TextSpec
    lora_scale: float
    kernel: Attention = "own"
    operands: str = "float32"
    mesh: jax.sharding.Mesh | None = None

    def _linears(self, x: jax.Array, names: tuple[str, ...], lora: Mapping[str, Mapping[str, jax.Array]]
                 ) -> list[jax.Array]:
        """Returns x·W (+ bias) (+ scale·x·Aᵀ·Bᵀ) of every linear in `names`; x [B·L, d_in]."""
        kernels = {n: self._kernel(n, x.dtype) for n in names}
        adapted = tuple(n for n in names if n in lora)
        outs = {n: product(x, kernels[n]) for n in names if n not in lora}
        if adapted:
            outs |= zip(adapted, lora_linears(x, tuple(kernels[n] for n in adapted), lora, adapted, self.lora_scale,
                                              self.operands), strict=True)
        for n in names:
            if n in self.config.biases:
                outs[n] += self.param(f"{n}_bias", nn.initializers.zeros, outs[n].shape[-1:]).astype(x.dtype)
        return [checkpoint_name(outs[n], LINEAR) for n in names]

    def _kernel(self, name: str, dtype: jnp.dtype) -> Kernel:
        """Returns the weight [d_in, d_out] of a linear layer; an array is in `dtype`."""
        if self.has_variable("params", name) and is_quantised(self.get_variable("params", name)):
            arrays = dict(self.get_variable("params", name))
        else:
            weight = self.param(name, nn.initializers.normal(0.02), self.config.linear_shapes[name]).astype(dtype)
            if self.mesh is None:
                return weight
            arrays = {"array": weight}
        return Stored(arrays, () if self.mesh is None else tuple(
            (key, gathered(name, array.shape, self.mesh)) for key, array in arrays.items()))

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None, windowed: jax.Array, shared: LayerInputs,
                 rows: jax.Array | None = None) -> tuple[jax.Array, Cache | None]:
        c, (batch, length, width) = self.config, x.shape
        cos, sin, biases, slot = shared
        kv, groups, hd = c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim
        lora: dict[str, Mapping[str, jax.Array]]
        lora = {n: self.get_variable("lora", n) for n in c.linear_shapes if self.has_variable("lora", n)}

        def heads(y: jax.Array, count: int) -> jax.Array:
            return y.reshape(batch, -1, count, hd).transpose(0, 2, 1, 3)

        norm1 = self.param("norm1", nn.initializers.ones, (width,))
        h = rms_norm(x, norm1, c.rms_norm_eps).reshape(-1, width)  # linears read one matrix of tokens
        if rows is None:
            q, k, v = self._linears(h, ("q", "k", "v"), lora)
            q_cos, q_sin = cos, sin
        else:
            k, v = self._linears(h, ("k", "v"), lora)
            x, length = take_rows(x, rows), rows.shape[1]
            (q,) = self._linears(rms_norm(x, norm1, c.rms_norm_eps).reshape(-1, width), ("q",), lora)
            q_cos, q_sin = (jnp.take_along_axis(t, rows[:, None, :, None], axis=2) for t in (cos, sin))
            biases = tuple(jnp.take_along_axis(b, rows[..., None], axis=1) for b in biases)
        q, k = rotated(heads(q, kv * groups), q_cos, q_sin), rotated(heads(k, kv), cos, sin)
        q, v = q.reshape(batch, kv, groups, length, hd), heads(v, kv)
        x = x.reshape(-1, width)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache["k"], k, slot, axis=2)
            v = jax.lax.dynamic_update_slice_in_dim(cache["v"], v, slot, axis=2)
            cache = {"k": k, "v": v}
        if self.kernel == "own" or biases:
            bias = biases[0] if len(biases) == 1 else jnp.where(windowed, biases[1], biases[0])
            attended = attention(q, k, v, bias)
        else:
            attended = causal_attention(q, k, v, c.sliding_window, self.kernel)
        attended = attended.transpose(0, 3, 1, 2, 4).reshape(batch * length, kv * groups * hd)
        x = x + self._linears(attended, ("o",), lora)[0]

        h = rms_norm(x, self.param("norm2", nn.initializers.ones, (width,)), c.rms_norm_eps)
        gate, up = self._linears(h, ("gate", "up"), lora)
        x = x + self._linears(swiglu(gate, up), ("down",), lora)[0]
        return x.reshape(batch, length, width), cache


class Decoder(nn.Module):
    """A decoder: token embedding, scanned layers, final norm and output head.

    `kernel` computes the attention of right-padded rows in models whose layers all have the same mask. All other
    attention is computed by the implementation "own".
    """

    config: TextSpec
    lora_scale: float = 1.0
    dtype: jnp.dtype = jnp.float32
    remat: Remat = False
    unroll: int = 1
    kernel: Attention = "own"
    operands: str = "float32"
    mesh: jax.sharding.Mesh | None = None

    def setup(self) -> None:
        c = self.config
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size))
        # prevent_cse is needed outside scans only; inside a scan it blocks optimisation.
        block = (nn.remat(DecoderBlock, prevent_cse=False, policy=POLICIES[self.remat]) if self.remat
                 else DecoderBlock)
        scanned = nn.scan(
            block, variable_axes={"params": 0, "lora": 0}, split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast), length=c.num_layers, unroll=self.unroll)
        self.layers = scanned(c, self.lora_scale, self.kernel, self.operands, self.mesh)
        self.norm = self.param("norm", nn.initializers.ones, (c.hidden_size,))
        if not c.tie_word_embeddings:
            self.head = self.param("head", nn.initializers.normal(0.02), (c.hidden_size, c.vocab_size))

    def embed(self, ids: jax.Array) -> jax.Array:
        """Returns the embeddings [B, L, C] of token ids [B, L]."""
        return self.embedding.astype(self.dtype)[ids]

    def hidden(self, x: jax.Array, positions: jax.Array, mask: jax.Array, cached: CachedKeys | None = None,
               rows: jax.Array | None = None, right_padded: bool = False) -> tuple[jax.Array, Cache | None]:
        """Returns the hidden states after the final norm, [B, L, C], and the cache with the new keys and values.

        Args:
            x: embeddings [B, L, C].
            positions: RoPE positions, int [B, L].
            mask: bool [B, L, M], which of the M keys each query sees; without a cache, M = L.
            cached: the cache to which the L new keys are added; None: no cache.
            rows: int [B, A]; only the states at these positions are returned, [B, A, C].
            right_padded: whether `mask` is the causal mask of rows whose padding comes last, so that no visible token
                sees the padding. Only then may `kernel` compute attention without the mask.
        """
        c = self.config
        cos, sin = rope_tables(c, positions)
        masks = [mask]
        if c.sliding_window is not None:
            keys = positions if cached is None else cached.positions
            near = mask & (positions[:, :, None] - keys[:, None, :] < c.sliding_window)
            masks = [near] if c.layers_see_alike else [mask, near]
        windowed = jnp.asarray(c.sliding_layers or (False,) * c.num_layers)
        biases = tuple(jnp.where(m, 0.0, MASKED) for m in masks)
        if self.kernel != "own" and right_padded and c.layers_see_alike:
            biases = ()
        cache, slot = (None, 0) if cached is None else (cached.cache, cached.slot)
        shared = LayerInputs(cos, sin, biases, slot)
        if rows is not None and cache is None and biases and self.unroll >= c.num_layers:
            x = self._unrolled(x, windowed, shared, rows)
        else:
            x, cache = self.layers(x, cache, windowed, shared)
            x = x if rows is None else take_rows(x, rows)
        return rms_norm(x, self.norm, c.rms_norm_eps), cache

    def _unrolled(self, x: jax.Array, windowed: jax.Array, shared: LayerInputs, rows: jax.Array) -> jax.Array:
        """Returns the last layer's output at `rows`; the last layer computes queries and MLP at these positions only.

        The layers are written out one after another, because a scan over all but the last would copy their weights.
        """
        block = DecoderBlock(self.config, self.lora_scale, operands=self.operands, mesh=self.mesh, parent=None)
        stacked = {name: self.variables[name]["layers"] for name in ("params", "lora") if name in self.variables}
        last = self.config.num_layers - 1

        def run(weights: dict[str, PyTree], x: jax.Array, windowed: jax.Array, shared: LayerInputs,
                rows: jax.Array | None) -> jax.Array:
            return cast(jax.Array, block.apply(weights, x, None, windowed, shared, rows)[0])

        # Jitted, so that layers with the same shapes are traced once.
        layer = jax.jit(jax.checkpoint(run, policy=POLICIES[self.remat]) if self.remat else run)
        for i in range(last + 1):
            weights = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
            x = layer(weights, x, windowed[i], shared, rows if i == last else None)
        return x

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns the float32 logits [..., V] of hidden states [..., C]."""
        head = self.embedding.T if self.config.tie_word_embeddings else self.head
        return jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def empty_cache(config: TextSpec, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """Returns a cache of zeros with room for `slots` keys per row."""
    shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}
