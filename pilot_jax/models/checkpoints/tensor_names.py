"""Maps Hugging Face's tensor names to the leaves of this package, with one table for reading and writing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike
from jaxtyping import PyTree

from pilot_jax.kernels.quantised import Scheme, quantised_shapes
from pilot_jax.models.spec import VisionSpec, VlmSpec

Storage = Literal["bf16"] | Scheme  # of the decoder's linear layers, as in `model.base`


@dataclasses.dataclass(frozen=True)
class Piece:
    """The place of a checkpoint's tensor in a leaf.

    The tensor is transposed by `permutation`, reshaped to `block`, and written into the leaf at the indices `start`.
    """

    leaf: tuple[str, ...]
    shape: tuple[int, ...]  # the tensor's shape in the checkpoint
    permutation: tuple[int, ...]
    block: tuple[int, ...]
    start: tuple[int, ...]

    def of_leaf(self, leaf: np.ndarray) -> np.ndarray:
        """Returns the view of the whole leaf's block [*block] into which the tensor is written."""
        return leaf[tuple(slice(a, a + n) for a, n in zip(self.start, self.block, strict=True))]

    def from_leaf(self, leaf: np.ndarray) -> np.ndarray:
        """Returns the checkpoint's tensor, cut out of the whole leaf."""
        permuted = self.of_leaf(leaf).reshape([self.shape[i] for i in self.permutation])
        return permuted.transpose(np.argsort(self.permutation))


def canonical_name(name: str) -> str:
    """Returns a tensor's canonical name, which is the same whichever release of transformers wrote the file."""
    name = re.sub(r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)", "", name)
    name = re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    return re.sub(r"^language_model\.model\.", "language_model.", name)


def stock_name(name: str, family: str) -> str:
    """Returns the name that a canonical one has in LLaVA checkpoints, in the layout that every release reads.

    Args:
        family: the vision tower's family.
    """
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    if name.startswith("vision_tower.") and family != "dinov2":
        return "vision_tower.vision_model." + name.removeprefix("vision_tower.")
    return re.sub(r"^language_model\.", "language_model.model.", name)


def pieces(config: VlmSpec) -> dict[str, Piece]:
    """Returns the piece of every tensor of the model, by the tensor's canonical name."""
    table: dict[str, Piece] = {}

    def put(name: str, leaf: str, shape: tuple[int, ...], *, block: tuple[int, ...] | None = None,
            start: tuple[int, ...] | None = None, permutation: tuple[int, ...] | None = None,
            layer: int | None = None) -> None:
        permutation = permutation or tuple(range(len(shape)))
        block = block or tuple(shape[i] for i in permutation)
        start = start or (0,) * len(block)
        if layer is not None:
            block, start = (1, *block), (layer, *start)
        table[name] = Piece(tuple(leaf.split(".")), shape, permutation, block, start)

    def linear(name: str, leaf: str, d_in: int, d_out: int, layer: int | None = None, bias: bool = True) -> None:
        put(f"{name}.weight", f"{leaf}.kernel", (d_out, d_in), permutation=(1, 0), layer=layer)
        if bias:
            put(f"{name}.bias", f"{leaf}.bias", (d_out,), layer=layer)

    if config.vision is not None:
        _vision_pieces(config.vision, put, linear)
        d, c = config.feature_size, config.text.hidden_size
        linear("multi_modal_projector.linear_1", "projector.linear_1", d, c, bias=config.projector_bias)
        linear("multi_modal_projector.linear_2", "projector.linear_2", c, c, bias=config.projector_bias)
    _text_pieces(config, put)
    return table


_CLIP_NAMES = {
    "patch": "embeddings.patch_embedding", "position": "embeddings.position_embedding.weight",
    "class": "embeddings.class_embedding", "layers": "encoder.layers", "norm1": "layer_norm1", "norm2": "layer_norm2",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.out_proj"}
_VISION_NAMES = {"clip": _CLIP_NAMES, "siglip": _CLIP_NAMES, "dinov2": {
    "patch": "embeddings.patch_embeddings.projection", "position": "embeddings.position_embeddings",
    "class": "embeddings.cls_token", "layers": "encoder.layer", "norm1": "norm1", "norm2": "norm2",
    "q": "attention.attention.query", "k": "attention.attention.key", "v": "attention.attention.value",
    "out": "attention.output.dense"}}


def _vision_pieces(v: VisionSpec, put: Callable[..., None], linear: Callable[..., None]) -> None:
    tower, names = "vision_tower", _VISION_NAMES[v.family]
    d, p, dinov2 = v.hidden_size, v.patch_size, v.family == "dinov2"

    def norm(name: str, leaf: str, layer: int | None = None) -> None:
        put(f"{name}.weight", f"{leaf}.scale", (d,), layer=layer)
        put(f"{name}.bias", f"{leaf}.bias", (d,), layer=layer)

    put(f"{tower}.{names['patch']}.weight", f"{tower}.patch_embed.kernel", (d, 3, p, p), permutation=(2, 3, 1, 0),
        block=(p * p * 3, d))
    if v.family != "clip":
        put(f"{tower}.{names['patch']}.bias", f"{tower}.patch_embed.bias", (d,))
    positions = (v.num_positions, d)  # DINOv2 has leading dimensions of size 1 here
    put(f"{tower}.{names['position']}", f"{tower}.position_embed", (1, *positions) if dinov2 else positions,
        block=positions)
    if v.has_cls:
        put(f"{tower}.{names['class']}", f"{tower}.class_embed", (1, 1, d) if dinov2 else (d,), block=(d,))
    if v.family == "clip":
        norm(f"{tower}.pre_layrnorm", f"{tower}.pre_norm")
    for i in range(v.num_layers):
        name, leaf = f"{tower}.{names['layers']}.{i}", f"{tower}.layers"
        norm(f"{name}.{names['norm1']}", f"{leaf}.norm1", i)
        norm(f"{name}.{names['norm2']}", f"{leaf}.norm2", i)
        for j, letter in enumerate("qkv"):
            full = f"{name}.{names[letter]}"
            put(f"{full}.weight", f"{leaf}.qkv.kernel", (d, d), permutation=(1, 0), start=(0, j * d), layer=i)
            put(f"{full}.bias", f"{leaf}.qkv.bias", (d,), start=(j * d,), layer=i)
        linear(f"{name}.{names['out']}", f"{leaf}.out", d, d, i)
        linear(f"{name}.mlp.fc1", f"{leaf}.fc1", d, v.intermediate_size, i)
        linear(f"{name}.mlp.fc2", f"{leaf}.fc2", v.intermediate_size, d, i)
        for number in (1, 2) if dinov2 else ():
            put(f"{name}.layer_scale{number}.lambda1", f"{leaf}.scale{number}", (d,), layer=i)


def _text_pieces(config: VlmSpec, put: Callable[..., None]) -> None:
    t, text = config.text, "language_model"
    c = t.hidden_size
    put(f"{text}.embed_tokens.weight", "decoder.embedding", (t.vocab_size, c))
    put(f"{text}.norm.weight", "decoder.norm", (c,))
    if not t.tie_word_embeddings:
        put("lm_head.weight", "decoder.head", (t.vocab_size, c), permutation=(1, 0))
    for i in range(t.num_layers):
        name, leaf = f"{text}.layers.{i}", "decoder.layers"
        put(f"{name}.input_layernorm.weight", f"{leaf}.norm1", (c,), layer=i)
        put(f"{name}.post_attention_layernorm.weight", f"{leaf}.norm2", (c,), layer=i)
        for linear, (d_in, d_out) in t.linear_shapes.items():
            full = f"{name}.{'self_attn' if linear in 'qkvo' else 'mlp'}.{linear}_proj"
            put(f"{full}.weight", f"{leaf}.{linear}", (d_out, d_in), permutation=(1, 0), layer=i)
            if linear in t.biases:
                put(f"{full}.bias", f"{leaf}.{linear}_bias", (d_out,), layer=i)


def never_run(name: str, config: VlmSpec) -> bool:
    """Returns whether this is a tensor that LLaVA checkpoints may hold although the model computes nothing with it."""
    layer = re.match(r"vision_tower\.encoder\.layers?\.(\d+)\.", name)
    return ((layer is not None and int(layer[1]) >= config.tower.num_layers)
            or name.startswith(("vision_tower.post_layernorm.", "vision_tower.head.", "vision_tower.layernorm."))
            or name in ("vision_tower.embeddings.position_ids", "vision_tower.embeddings.mask_token")
            or name.endswith("rotary_emb.inv_freq")
            or (name == "lm_head.weight" and config.text.tie_word_embeddings))


def base_shapes(config: VlmSpec) -> dict[str, PyTree]:
    """Returns the shapes of the frozen base in float32, {"vision_tower", "projector", "decoder"}; allocates nothing.

    A language model alone has the decoder only. A leaf is as large as its pieces together, so that nothing is traced.
    """
    ends: dict[tuple[str, ...], tuple[int, ...]] = {}
    for piece in pieces(config).values():
        end = tuple(a + n for a, n in zip(piece.start, piece.block, strict=True))
        ends[piece.leaf] = tuple(map(max, end, ends.get(piece.leaf, end)))
    return traverse_util.unflatten_dict({leaf: jax.ShapeDtypeStruct(end, jnp.float32) for leaf, end in ends.items()})


def stored_shapes(config: VlmSpec, dtype: DTypeLike, storage: Storage | None = None) -> dict[str, PyTree]:
    """Returns the shapes and dtypes in which the frozen base is held: `dtype`, and float32 for the projector.

    Args:
        storage: that of the decoder's linear layers, as `model.base`; None: `dtype`. A quantised weight is a dict.
    """
    def stored(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> PyTree:
        names = tuple(key.key for key in path)
        if is_linear(names, config) and storage is not None:
            if storage != "bf16":
                return quantised_shapes(leaf.shape[0], config.text.linear_shapes[names[-1]], storage)
            return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if names[0] == "projector" else dtype)

    return jax.tree_util.tree_map_with_path(stored, base_shapes(config))


def is_linear(leaf: tuple[str, ...], config: VlmSpec) -> bool:
    """Returns whether a leaf of the base holds the weights of a linear layer that `model.base` is about."""
    return leaf[:2] == ("decoder", "layers") and leaf[-1] in config.text.linear_shapes


def leaf_at(tree: PyTree, path: tuple[str, ...]) -> PyTree:
    """Returns the leaf, or the subtree, at `path`."""
    for name in path:
        tree = tree[name]
    return tree
