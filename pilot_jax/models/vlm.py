"""The vision–language model: vision tower, connector, merge of image and text embeddings, decoder.

One frozen base serves every client: `variables(base, adapters)` adds a client's adapters to it as the collections
"lora" and "connector". A federation changes nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import PyTree

from pilot_jax.config.model import Remat
from pilot_jax.models.connector import Connector
from pilot_jax.models.llama import Attention, Cache, CachedKeys, Decoder
from pilot_jax.models.lora import LORA_SUBTREES, collection
from pilot_jax.models.spec import VlmSpec
from pilot_jax.models.vision import VisionTower


def variables(base: Mapping[str, PyTree], adapters: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Returns the variables of `Vlm`: the frozen base and one client's adapters.

    `adapters` has the connector's subtrees (`projector`, or `task`, `client`, …) and, optionally, LoRA's. Without the
    former, the connector is the base's projector.
    """
    connector, lora = {n: t for n, t in adapters.items() if n not in LORA_SUBTREES}, collection(adapters)
    connector = connector or {n: base[n] for n in ("projector",) if n in base}
    out = {"params": {k: base[k] for k in ("vision_tower", "decoder") if k in base},
           "connector": {"connector": connector}}
    if lora is not None:
        out["lora"] = {"decoder": lora}
    return out


def positions_of(attention_mask: jax.Array) -> jax.Array:
    """Returns RoPE positions [B, L], which count visible tokens only: padding does not shift them."""
    return jnp.maximum(jnp.cumsum(attention_mask.astype(jnp.int32), axis=-1) - 1, 0)


def causal_mask(attention_mask: jax.Array) -> jax.Array:
    """Returns the causal mask, bool [B, L, L]: a query sees the visible tokens at and before its own position."""
    length = attention_mask.shape[-1]
    return jnp.tril(jnp.ones((length, length), bool))[None] & (attention_mask[:, None, :] > 0)


class Vlm(nn.Module):
    """The whole model; without `config.vision`, the decoder alone.

    In its methods, `stage` chooses the connector, "plain" (LLaVA's projector), "stage1" or "stage2", and `task_index`
    is the number of the client's own task.
    """

    config: VlmSpec
    lora_scale: float = 1.0
    dtype: jnp.dtype = jnp.float32
    remat: Remat = False
    unroll: int = 1
    kernel: Attention = "own"  # the implementation of attention in training, see `Decoder`
    operands: str = "float32"  # the dtype of the factors of products with W + B·A, see `kernels.low_rank.merged`
    mesh: jax.sharding.Mesh | None = None  # over whose axis `fsdp` the decoder's weights are gathered layer by layer

    def setup(self) -> None:
        c = self.config
        if c.vision is not None:
            self.vision_tower = VisionTower(c.vision, c.drop_first, self.dtype)
            self.connector = Connector(c.projector)
        self.decoder = Decoder(c.text, self.lora_scale, self.dtype, self.remat, self.unroll, self.kernel, self.operands,
                               self.mesh)

    def features(self, pixels: jax.Array) -> jax.Array:
        """Returns H_v [B, N, D] of pixels [B, height, width, 3]."""
        return self.vision_tower(pixels)

    def embed(self, input_ids: jax.Array, features: jax.Array | None, stage: str,
              task_index: jax.Array | int = 0) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns embeddings [B, L, C] in which each row's j-th image token is its j-th connected image feature.

        The second value holds what the auxiliary losses need: "x_t" and "x_s", or "router_logits".

        Args:
            input_ids: int [B, L]; a row that has an image holds N image tokens.
            features: H_v [B, N, D]; None if no row has an image. A language model alone does not read them.
        """
        is_image = input_ids == self.config.image_token_id
        x = self.decoder.embed(jnp.where(is_image, 0, input_ids))
        if features is None or self.config.vision is None:
            return x, {}
        image, aux = self.connector(features.astype(self.dtype), stage, task_index)
        slot = jnp.clip(jnp.cumsum(is_image, axis=-1) - 1, 0, image.shape[1] - 1)
        placed = jnp.take_along_axis(image, slot[..., None], axis=1)
        return jnp.where(is_image[..., None], placed, x), aux

    def logits(self, input_ids: jax.Array, attention_mask: jax.Array, features: jax.Array | None,
               stage: str = "plain", task_index: jax.Array | int = 0) -> jax.Array:
        """Returns the next-token logits at every position, float32 [B, L, V]."""
        x, _ = self.embed(input_ids, features, stage, task_index)
        hidden, _ = self.decoder.hidden(x, positions_of(attention_mask), causal_mask(attention_mask))
        return self.decoder.logits(hidden)

    def target_logits(self, batch: Mapping[str, jax.Array], stage: str,
                      task_index: jax.Array | int = 0) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns logits at the supervised positions only, float32 [B, A, V], and the connector's auxiliary outputs.

        The logits at all other positions would be most of the cost of a small model's output head.

        Args:
            batch: input_ids and attention_mask, int [B, L], with padding at the end; features [B, N, D];
                target_positions, int [B, A], where position p predicts the token at p + 1.
        """
        x, aux = self.embed(batch["input_ids"], batch["features"], stage, task_index)
        mask = batch["attention_mask"]
        hidden, _ = self.decoder.hidden(x, positions_of(mask), causal_mask(mask), rows=batch["target_positions"],
                                        right_padded=True)
        return self.decoder.logits(hidden), aux

    def prefill(self, input_ids: jax.Array, attention_mask: jax.Array, features: jax.Array | None, cache: Cache,
                stage: str, task_index: jax.Array | int = 0) -> tuple[jax.Array, Cache | None]:
        """Returns the logits after the last visible token of each prompt, [B, V], and the filled cache.

        The cache has M ≥ L slots. The slots from L on are for generated tokens, and masked until then.
        """
        x, _ = self.embed(input_ids, features, stage, task_index)
        spare = cache["k"].shape[3] - input_ids.shape[1]
        mask = jnp.pad(causal_mask(attention_mask), ((0, 0), (0, 0), (0, spare)))
        positions = positions_of(attention_mask)
        cached = CachedKeys(cache, 0, jnp.pad(positions, ((0, 0), (0, spare))))
        hidden, filled = self.decoder.hidden(x, positions, mask, cached)
        length = input_ids.shape[1]
        last = length - 1 - jnp.argmax(attention_mask[:, ::-1] > 0, axis=-1)
        return self.decoder.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]), filled

    def decode(self, token: jax.Array, position: jax.Array, visible: jax.Array, cache: Cache,
               slot: jax.Array) -> tuple[jax.Array, Cache | None]:
        """Returns the logits [B, V] after one more token, and the cache with that token at `slot`.

        Args:
            token, position: int [B], the token and its RoPE position.
            visible: bool [B, M], the slots of the cache that the token sees, its own included.
        """
        x = self.decoder.embed(token[:, None])
        hidden, filled = self.decoder.hidden(x, position[:, None], visible[:, None],
                                             CachedKeys(cache, slot, positions_of(visible)))
        return self.decoder.logits(hidden[:, 0]), filled
