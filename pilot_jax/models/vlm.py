"""The vision–language model: tower → connector → merge with text → decoder.

One frozen base serves every client: `variables(base, adapters)` puts a client's adapters beside it, in the
collections "lora" and "connector", which are all that a federation ever touches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from pilot_jax.models.clip import VisionTower
from pilot_jax.models.connector import Connector
from pilot_jax.models.llama import Decoder
from pilot_jax.models.lora import LORA_SUBTREES, assembled
from pilot_jax.models.spec import VlmSpec


def variables(base: Mapping, adapters: Mapping) -> dict:
    """Linen variables from the frozen base and one client's adapters.

    `adapters` holds connector subtrees (`projector`, or `task`, `client`, …) and, optionally, those of LoRA.
    """
    connector, lora = {n: t for n, t in adapters.items() if n not in LORA_SUBTREES}, assembled(adapters)
    out = {"params": {k: base[k] for k in ("vision_tower", "decoder") if k in base},
           "connector": {"connector": connector}}
    if lora is not None:
        out["lora"] = {"decoder": lora}
    return out


def positions_of(attention_mask: jax.Array) -> jax.Array:
    """RoPE positions [B, L] that count visible tokens only, so that padding shifts nothing."""
    return jnp.maximum(jnp.cumsum(attention_mask.astype(jnp.int32), axis=-1) - 1, 0)


def causal_mask(attention_mask: jax.Array) -> jax.Array:
    """[B, L] → [B, L, L]: a query sees visible keys at or before itself."""
    length = attention_mask.shape[-1]
    return jnp.tril(jnp.ones((length, length), bool))[None] & (attention_mask[:, None, :] > 0)


class Vlm(nn.Module):
    """`stage` chooses the connector: "plain" (LLaVA's projector), "stage1" or "stage2"."""

    config: VlmSpec
    lora_scale: float = 1.0
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    unroll: int = 1
    kernel: str = "own"  # of attention in training, see `Decoder`

    def setup(self) -> None:
        c = self.config
        self.vision_tower = VisionTower(c.vision, c.drop_first, self.dtype)
        self.connector = Connector()
        self.decoder = Decoder(c.text, self.lora_scale, self.dtype, self.remat, self.unroll, self.kernel)

    def features(self, pixels: jax.Array) -> jax.Array:
        """H_v: pixels [B, H, W, 3] → [B, N, D]."""
        return self.vision_tower(pixels)

    def embed(self, input_ids: jax.Array, features: jax.Array | None, stage: str,
              task_index: jax.Array | int = 0) -> tuple[jax.Array, dict]:
        """Token embeddings with the j-th image token of each row replaced by its j-th image feature.

        input_ids [B, L] (already expanded to N image tokens), features [B, N, D] → [B, L, C], and what the
        connector's losses need (x_t, x_s or router_logits).
        """
        is_image = input_ids == self.config.image_token_id
        x = self.decoder.embed(jnp.where(is_image, 0, input_ids))
        if features is None:
            return x, {}
        image, aux = self.connector(features.astype(self.dtype), stage, task_index)
        slot = jnp.clip(jnp.cumsum(is_image, axis=-1) - 1, 0, image.shape[1] - 1)
        placed = jnp.take_along_axis(image, slot[..., None], axis=1)
        return jnp.where(is_image[..., None], placed, x), aux

    def logits(self, input_ids: jax.Array, attention_mask: jax.Array, features: jax.Array | None,
               stage: str = "plain", task_index: jax.Array | int = 0) -> jax.Array:
        """Next-token logits at every position, float32 [B, L, V]."""
        x, _ = self.embed(input_ids, features, stage, task_index)
        hidden, _ = self.decoder.hidden(x, positions_of(attention_mask), causal_mask(attention_mask))
        return self.decoder.logits(hidden)

    def target_logits(self, batch: Mapping[str, jax.Array], stage: str,
                      task_index: jax.Array | int = 0) -> tuple[jax.Array, dict]:
        """Logits at the supervised positions alone: the head is most of a small model's output cost.

        batch: input_ids, attention_mask [B, L]; features [B, N, D]; target_positions [B, A] (position p predicts the
        token at p + 1), padding last. Returns float32 [B, A, V] and the connector's auxiliary outputs.
        """
        x, aux = self.embed(batch["input_ids"], batch["features"], stage, task_index)
        mask = batch["attention_mask"]
        hidden, _ = self.decoder.hidden(x, positions_of(mask), causal_mask(mask), rows=batch["target_positions"],
                                        right_padded=True)
        return self.decoder.logits(hidden), aux

    def prefill(self, input_ids: jax.Array, attention_mask: jax.Array, features: jax.Array | None, cache: dict,
                stage: str, task_index: jax.Array | int = 0) -> tuple[jax.Array, dict]:
        """Run the prompt; logits after its last visible token [B, V], and the filled cache.

        The cache has S ≥ L slots; slots ≥ L are for tokens to come and stay masked here.
        """
        x, _ = self.embed(input_ids, features, stage, task_index)
        spare = cache["k"].shape[3] - input_ids.shape[1]
        mask = jnp.pad(causal_mask(attention_mask), ((0, 0), (0, 0), (0, spare)))
        positions = positions_of(attention_mask)
        hidden, filled = self.decoder.hidden(x, positions, mask, cache, 0, jnp.pad(positions, ((0, 0), (0, spare))))
        length = input_ids.shape[1]
        last = length - 1 - jnp.argmax(attention_mask[:, ::-1] > 0, axis=-1)
        return self.decoder.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]), cast(dict, filled)

    def decode(self, token: jax.Array, position: jax.Array, visible: jax.Array, cache: dict,
               slot: jax.Array) -> tuple[jax.Array, dict]:
        """One step: token, position [B]; visible [B, S] bool; writes cache slot `slot` → logits [B, V], cache."""
        x = self.decoder.embed(token[:, None])
        hidden, filled = self.decoder.hidden(x, position[:, None], visible[:, None], cache, slot, positions_of(visible))
        return self.decoder.logits(hidden[:, 0]), cast(dict, filled)
