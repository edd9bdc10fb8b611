"""CLIP's vision tower (Radford et al., 2021, arXiv 2103.00020): pixels to patch features of one chosen layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from pilot_jax.models.config import VisionConfig


def _activation(name: str, x: jax.Array) -> jax.Array:
    if name == "quick_gelu":
        return x * jax.nn.sigmoid(1.702 * x)
    return jax.nn.gelu(x, approximate=False)


class VisionBlock(nn.Module):
    """Pre-norm encoder layer. x [B, P, D] → [B, P, D], P = patches + CLS."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        c, (batch, length, width) = self.config, x.shape
        heads, head_dim = c.num_heads, width // c.num_heads
        dense = lambda features, name: nn.Dense(features, dtype=x.dtype, name=name)  # noqa: E731
        norm = lambda name: nn.LayerNorm(epsilon=c.layer_norm_eps, dtype=jnp.float32, name=name)  # noqa: E731

        h = norm("norm1")(x).astype(x.dtype)
        # q, k and v read the same input: one matmul.
        q, k, v = jnp.unstack(dense(3 * width, "qkv")(h).reshape(batch, length, 3, heads, head_dim), axis=2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        attended = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, width)
        x = x + dense(width, "out")(attended)
        h = norm("norm2")(x).astype(x.dtype)
        x = x + dense(width, "fc2")(_activation(c.hidden_act, dense(c.intermediate_size, "fc1")(h)))
        return x, None


class VisionTower(nn.Module):
    """Frozen feature extractor f of the paper: H_v = f(X_v).

    pixels [B, H, W, 3] (normalised by the checkpoint's image processor) → features [B, N, D] of layer
    `config.num_layers` (the selected layer is the last one run), without post-norm, CLS dropped or kept.
    """

    config: VisionConfig
    drop_cls: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        c, p = self.config, self.config.patch_size
        side = c.image_size // p
        batch = pixels.shape[0]
        # A convolution whose stride is its kernel is a matmul over flattened patches.
        patches = pixels.astype(self.dtype).reshape(batch, side, p, side, p, 3).transpose(0, 1, 3, 2, 4, 5)
        x = nn.Dense(c.hidden_size, use_bias=False, dtype=self.dtype, name="patch_embed")(
            patches.reshape(batch, side * side, p * p * 3))
        cls = self.param("class_embed", nn.initializers.normal(0.02), (c.hidden_size,)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(cls, (batch, 1, c.hidden_size)), x], axis=1)
        x = x + self.param("position_embed", nn.initializers.normal(0.02), x.shape[1:]).astype(self.dtype)
        x = nn.LayerNorm(epsilon=c.layer_norm_eps, dtype=jnp.float32, name="pre_norm")(x).astype(self.dtype)
        layers = nn.scan(VisionBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.num_layers)
        x, _ = layers(c, name="layers")(x)
        return x[:, 1:] if self.drop_cls else x
