"""Products with weights that are stored in 8 or 4 bits, by qwix (the extra `quant`), or divided among devices.

A quantised weight W [d_in, d_out] is {"scale": float32 [blocks, d_out], and "qvalue": int8 [d_in, d_out], or "packed":
uint8 [d_in/2, d_out], in whose row i the lower four bits are row 2i and the upper four row 2i + 1}. `BLOCK` rows of a
column (in int8, all rows) share a scale. The plain formulas (tests/unit/kernels/test_quantised.py compares with them in
float64):

    dequantised(W) = level[q] * repeat(scale, d_in / blocks, axis=0)
    product(x, W)  = x @ dequantised(W)

In int8 the levels are the integers, and the scale is the column's largest magnitude / 127.5. In nf4 they are the 16
quantiles of NormalFloat4 (Dettmers et al., 2023, arXiv 2305.14314, appendix E), and the scale is the largest magnitude
of the block. They are packed here, because XLA widens JAX's uint4 to a byte where a loop over layers cuts it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from pilot_jax.errors import InputError

Scheme = Literal["int8", "nf4"]
SCHEMES: tuple[Scheme, ...] = ("int8", "nf4")
BLOCK = 64  # rows that share a scale in nf4, as in the paper; the largest common divisor with d_in


@partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["whole"])
@dataclasses.dataclass(frozen=True)
class Stored:
    """A weight [d_in, d_out] that is formed when a product needs it, and again in the backward pass.

    It is neither differentiated nor stored for the backward pass, which would hold the formed weights of all layers."""

    arrays: dict[str, Any]  # of a quantised weight; or {"array": the weight}
    whole: tuple[tuple[str, NamedSharding], ...] = ()  # where a product needs each array: gathered over `fsdp`


# One layer's weight: an array, or what it is formed from.
Kernel = Float[Array, "d_in _d_out"] | Stored


def qwix() -> ModuleType:
    """Returns the library qwix.

    Raises:
        InputError: it is not installed.
    """
    try:
        import qwix as library
    except ImportError:
        raise InputError("model.base: int8 and nf4 need qwix, which is not installed (it is in the extra 'quant'). "
                         "Run: pip install qwix. Or set model.base=bf16.") from None
    return library


def is_quantised(weight: Any) -> bool:
    """Whether a weight of the base is a quantised one."""
    return isinstance(weight, Mapping)


def quantised(weight: Float[Array, "d_in d_out"], scheme: Scheme) -> dict[str, Array]:
    """Returns the quantised weight.

    Raises:
        InputError: qwix is not installed, or d_in is odd, in nf4.
    """
    block = math.gcd(BLOCK, weight.shape[0])
    if scheme == "nf4" and weight.shape[0] % 2:
        raise InputError(f"model.base: nf4 packs pairs of inputs, and a linear layer has {weight.shape[0]}. Set "
                         "model.base=int8.")
    tiles, qtype = ({}, jnp.int8) if scheme == "int8" else ({0: block}, "nf4")
    array = qwix().quantize(weight.astype(jnp.float32), qtype, channelwise_axes=[1], tiled_axes=tiles)
    if scheme == "int8":
        return {"qvalue": array.qvalue, "scale": array.scale}
    pairs = array.qvalue.astype(jnp.uint8).reshape(-1, 2, weight.shape[1])
    return {"packed": pairs[:, 0] | pairs[:, 1] << 4, "scale": array.scale}


def quantised_shapes(layers: int, shape: tuple[int, int], scheme: Scheme) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a quantised weight [d_in, d_out] of all layers; nothing is allocated."""
    one = jax.eval_shape(lambda w: quantised(w, scheme), jax.ShapeDtypeStruct(shape, jnp.float32))
    return {name: jax.ShapeDtypeStruct((layers, *leaf.shape), leaf.dtype) for name, leaf in one.items()}


def dequantised(weight: Mapping[str, Array]) -> Float32[Array, "d_in d_out"]:
    """Returns the weight of one layer."""
    library, scale = qwix(), weight["scale"]
    if "qvalue" in weight:
        return library.dequantize(library.QArray(weight["qvalue"], scale, None, jnp.int8))
    packed = weight["packed"]
    d_out, d_in = packed.shape[1], 2 * len(packed)
    rows = jnp.stack([packed & 15, packed >> 4], axis=1).reshape(len(scale), d_in // len(scale), d_out)

    def of_row(row: Array, scale: Array) -> Array:
        return library.dequantize(library.QArray(row, scale, None, "nf4"))

    # qwix flattens what it looks up. Row by row, that leaves a matrix that is divided among devices where it is.
    return jax.vmap(jax.vmap(of_row, in_axes=(0, None)))(rows, scale).reshape(d_in, d_out)


def formed(weight: Stored, dtype: DTypeLike) -> Float[Array, "d_in d_out"]:
    """Returns the weight in `dtype`, gathered and dequantised."""
    whole = dict(weight.whole)
    arrays = {name: jax.lax.with_sharding_constraint(array, whole[name]) if name in whole else array
              for name, array in weight.arrays.items()}
    return (arrays["array"] if "array" in arrays else dequantised(arrays)).astype(dtype)


def product(x: Float[Array, "tokens d_in"], weight: Kernel) -> Float[Array, "tokens _d_out"]:
    """Returns x·W in x's dtype, for a weight of either kind."""
    return _product(x, weight) if isinstance(weight, Stored) else x @ weight


@jax.custom_vjp
def _product(x: jax.Array, weight: Stored) -> jax.Array:
    return x @ formed(weight, x.dtype)


def _forward(x: jax.Array, weight: Stored) -> tuple[jax.Array, Stored]:
    return _product(x, weight), weight


def _backward(weight: Stored, g: jax.Array) -> tuple[jax.Array, None]:
    return g @ formed(weight, g.dtype).T, None


_product.defvjp(_forward, _backward)
