"""Reads a DINOv2 tower from an ONNX file, as Hugging Face's `Dinov2Model` has it: config and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pilot_jax.errors import InputError

PREFIX = "backbone."  # of the tower's tensors


def read_dinov2(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the content of `config.json`, and the tensors by Hugging Face's names, of the tower in an ONNX file.

    The exporter keeps the names of most tensors, but not those of the matrices of linear layers. Each of these is found
    by the bias that is added to its product.

    Raises:
        InputError: the package onnx is missing, or the file is damaged or holds no such tower.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise InputError(f"{file}: reading an .onnx file needs the package onnx. Install it: pip install "
                         "'onnx>=1.16'") from None
    try:
        graph = onnx.load(str(file)).graph
        values = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        tensors = {name.removeprefix(PREFIX): value for name, value in values.items() if name.startswith(PREFIX)}
        tensors |= _matrices(graph, values) | _positions(values, tensors["embeddings.cls_token"].shape[-1])
        return _config(tensors), tensors
    except Exception as error:  # protobuf raises its own kinds, and a strange graph leads anywhere
        raise InputError(f"{file}: not a DINOv2 tower that this package can read ({type(error).__name__}: {error}). "
                         "Fetch it again.") from None


def _matrices(graph: Any, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the weights [d_out, d_in] of the linear layers."""
    maker, out = {name: node for node in graph.node for name in node.output}, {}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for bias, product in (node.input, reversed(node.input)):
            named = bias in values and bias.startswith(PREFIX) and bias.endswith(".bias")
            if named and product in maker and maker[product].op_type == "MatMul":
                matrix, = (name for name in maker[product].input if name in values)
                out[bias.removeprefix(PREFIX).removesuffix("bias") + "weight"] = values[matrix].T
    return out


def _positions(values: Mapping[str, np.ndarray], width: int) -> dict[str, np.ndarray]:
    """Returns the positions [1, 1 + side², D], of which the exporter has made two tensors without names."""
    unnamed = [v for k, v in values.items() if not k.startswith(PREFIX) and v.ndim in (3, 4)]
    first, = (v for v in unnamed if v.shape == (1, 1, width))
    grid, = (v for v in unnamed if v.ndim == 3 and v.shape[0] == 1 and v.shape[1] > 1 and v.shape[2] == width)
    return {"embeddings.position_embeddings": np.concatenate([first, grid], axis=1)}


def _config(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns what the tensors' shapes say; heads of 64 features and the rest are the same for all of DINOv2."""
    width, _, patch, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
    layers = sum(name.endswith("layer_scale1.lambda1") for name in tensors)
    side = round((tensors["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    return {"model_type": "dinov2", "hidden_size": width, "num_hidden_layers": layers, "patch_size": patch,
            "num_attention_heads": width // 64, "image_size": side * patch, "num_channels": 3, "hidden_act": "gelu",
            "mlp_ratio": tensors["encoder.layer.0.mlp.fc1.weight"].shape[0] // width, "layer_norm_eps": 1e-6,
            "layerscale_value": 1.0, "qkv_bias": True, "use_swiglu_ffn": False, "use_mask_token": False}
