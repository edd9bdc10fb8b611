"""The vision towers of CLIP (Radford et al., 2021, arXiv 2103.00020) and SigLIP (Zhai et al., 2023, arXiv 2303.15343).

A tower maps pixels to patch features, the outputs of the chosen layers. Unlike CLIP's, SigLIP's has no CLS token and no
norm before the encoder, and its patch embedding has a bias. The encoder layers are the same.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from pilot_jax.models.spec import VisionSpec


def _activation(name: str, x: jax.Array) -> jax.Array:
    if name == "quick_gelu":
        return x * jax.nn.sigmoid(1.702 * x)
    return jax.nn.gelu(x, approximate=name == "gelu_pytorch_tanh")


class VisionBlock(nn.Module):
    """A pre-norm encoder layer: x [B, P, D] → [B, P, D], where P counts the patches and the CLS token, if any.

    The second output, which the scan over layers stacks, equals the first one if `emit` is set, and is None otherwise.
    """

    config: VisionSpec
    emit: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        c, (batch, length, width), dtype = self.config, x.shape, x.dtype
        heads, head_dim = c.num_heads, width // c.num_heads

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=dtype, name=name)

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=c.layer_norm_eps, dtype=jnp.float32, name=name)

        h = norm("norm1")(x).astype(x.dtype)
        # q, k and v read the same input: one matmul.
        q, k, v = jnp.unstack(dense(3 * width, "qkv")(h).reshape(batch, length, 3, heads, head_dim), axis=2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        attended = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, width)
        x = x + dense(width, "out")(attended)
        h = norm("norm2")(x).astype(x.dtype)
        x = x + dense(width, "fc2")(_activation(c.hidden_act, dense(c.intermediate_size, "fc1")(h)))
        return x, x if self.emit else None


class VisionTower(nn.Module):
    """The paper's frozen feature extractor f: H_v = f(X_v).

    It maps pixels [B, height, width, 3], normalised by the checkpoint's image processor, to features [B, N, D]. These
    are the concatenated outputs of the layers `config.feature_layers`, without the final norm, and without the first
    token if `drop_first` is set.
    """

    config: VisionSpec
    drop_first: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        c, p = self.config, self.config.patch_size
        side = c.image_size // p
        batch = pixels.shape[0]
        # A convolution whose stride is its kernel size is a matmul over flattened patches. Pixels at the right and
        # bottom that fill no patch are left out, as in transformers: 384 = 27·14 + 6.
        pixels = pixels[:, :side * p, :side * p].astype(self.dtype)
        patches = pixels.reshape(batch, side, p, side, p, 3).transpose(0, 1, 3, 2, 4, 5)
        x = nn.Dense(c.hidden_size, use_bias=c.family == "siglip", dtype=self.dtype, name="patch_embed")(
            patches.reshape(batch, side * side, p * p * 3))
        if c.has_cls:
            cls = self.param("class_embed", nn.initializers.normal(0.02), (c.hidden_size,)).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(cls, (batch, 1, c.hidden_size)), x], axis=1)
        x = x + self.param("position_embed", nn.initializers.normal(0.02), x.shape[1:]).astype(self.dtype)
        if c.family == "clip":
            x = nn.LayerNorm(epsilon=c.layer_norm_eps, dtype=jnp.float32, name="pre_norm")(x).astype(self.dtype)
        features = x
        if c.num_layers:
            several = len(c.feature_layers) > 1
            layers = nn.scan(VisionBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.num_layers)
            features, outputs = layers(c, several, name="layers")(x)
            if several:
                states = jnp.concatenate([x[None], outputs])  # type: ignore[list-item]
                features = jnp.concatenate([states[i] for i in c.feature_layers], axis=-1)
        return features[:, 1:] if self.drop_first else features
