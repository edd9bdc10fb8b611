"""The vision towers of CLIP (Radford et al., 2021, arXiv 2103.00020), SigLIP (Zhai et al., 2023, arXiv 2303.15343) and
DINOv2 (Oquab et al., 2023, arXiv 2304.07193).

A tower maps pixels to patch features, the outputs of the chosen layers. The three are alike but for this:

|        | CLS token | bias of the patches | norm before the encoder | layer scale | positions         |
|--------|-----------|---------------------|-------------------------|-------------|-------------------|
| CLIP   | yes       | no                  | yes                     | no          | of the image size |
| SigLIP | no        | yes                 | no                      | no          | of the image size |
| DINOv2 | yes       | yes                 | no                      | yes         | resized to it     |
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
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

        def scaled(h: jax.Array, name: str) -> jax.Array:
            """Returns `h` times DINOv2's layer scale, a learnt factor per feature; for other towers, `h` itself."""
            return h * self.param(name, nn.initializers.ones, (width,)).astype(dtype) if c.family == "dinov2" else h

        h = norm("norm1")(x).astype(x.dtype)
        # q, k and v read the same input: one matmul.
        q, k, v = jnp.unstack(dense(3 * width, "qkv")(h).reshape(batch, length, 3, heads, head_dim), axis=2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        attended = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, width)
        x = x + scaled(dense(width, "out")(attended), "scale1")
        h = norm("norm2")(x).astype(x.dtype)
        x = x + scaled(dense(width, "fc2")(_activation(c.hidden_act, dense(c.intermediate_size, "fc1")(h))), "scale2")
        return x, x if self.emit else None


def bicubic_matrix(source: int, target: int) -> np.ndarray:
    """Returns the matrix, float32 [target, source], that resizes a row of values by bicubic interpolation.

    It is the one of torch's `interpolate` (mode="bicubic", align_corners=False, no antialiasing), whose kernel is that
    of Keys (1981) with a = -0.75; beyond an end, the row continues with its last value.
    """
    a, place = -0.75, (np.arange(target) + 0.5) * source / target - 0.5
    first, out = np.floor(place).astype(int), np.zeros((target, source))
    for offset in range(-1, 3):
        x = np.abs(place - (first + offset))
        near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
        np.add.at(out, (np.arange(target), np.clip(first + offset, 0, source - 1)), np.where(x <= 1, near, far))
    return out.astype(np.float32)


def _resized(positions: jax.Array, source: int, target: int, num_first: int) -> jax.Array:
    """Returns position embeddings [num_first + target², D] of [num_first + source², D], those of patches resized."""
    if source == target:
        return positions
    matrix, grid = bicubic_matrix(source, target), positions[num_first:].astype(jnp.float32)
    grid = jnp.einsum("ai,bj,ijd->abd", matrix, matrix, grid.reshape(source, source, -1), precision="highest")
    return jnp.concatenate([positions[:num_first], grid.reshape(target**2, -1).astype(positions.dtype)])


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
        c, p, side = self.config, self.config.patch_size, self.config.side
        batch = pixels.shape[0]
        # A convolution whose stride is its kernel size is a matmul over flattened patches. Pixels at the right and
        # bottom that fill no patch are left out, as in transformers: 384 = 27·14 + 6.
        pixels = pixels[:, :side * p, :side * p].astype(self.dtype)
        patches = pixels.reshape(batch, side, p, side, p, 3).transpose(0, 1, 3, 2, 4, 5)
        x = nn.Dense(c.hidden_size, use_bias=c.family != "clip", dtype=self.dtype, name="patch_embed")(
            patches.reshape(batch, side * side, p * p * 3))
        if c.has_cls:
            cls = self.param("class_embed", nn.initializers.normal(0.02), (c.hidden_size,)).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(cls, (batch, 1, c.hidden_size)), x], axis=1)
        positions = self.param("position_embed", nn.initializers.normal(0.02), (c.num_positions, c.hidden_size))
        x = x + _resized(positions, c.trained_side or side, side, int(c.has_cls)).astype(self.dtype)
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
