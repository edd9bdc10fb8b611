"""Reads checkpoints into arrays on their devices, one tensor at a time.

The names and shapes in all files are checked before the first tensor is read: every tensor of the model is there, and
every other one is known to be unused in LLaVA. Then each tensor is written into its block of its leaf, in the leaf's
dtype. A large leaf is on its devices from the start, so that host memory holds little more than the file that is being
read. A small one is put there when it is complete, which needs no compiled program.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import PyTree

from pilot_jax.errors import InputError
from pilot_jax.files import SAFETENSORS, without_duplicates
from pilot_jax.kernels.quantised import Scheme, is_quantised, quantised, qwix
from pilot_jax.models.checkpoints.gguf import GgufFile, is_gguf, open_gguf
from pilot_jax.models.checkpoints.hf_config import read_vlm_config
from pilot_jax.models.checkpoints.tensor_names import (
    Piece,
    Storage,
    canonical_name,
    leaf_at,
    never_run,
    pieces,
    stored_shapes,
)
from pilot_jax.models.spec import VlmSpec
from pilot_jax.parallel.processes import from_host
from pilot_jax.programs import KeptJit

SMALL = 16 * 2**20  # bytes of a leaf that is assembled in the host's memory
FLOATS = ("float16", "bfloat16", "float32", "float64")  # dtypes of tensors that are read
# A function from a leaf's path and shape to its sharding, or to None for the default device.
Place = Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding | None]


@dataclasses.dataclass(frozen=True)
class Source:
    """One file of tensors. Its `rename` returns a tensor's canonical name, or None for a tensor that is not used."""

    file: Path
    rename: Callable[[str], str | None]


def safetensors_files(directory: Path) -> list[Path]:
    """Returns the directory's safetensors files, of which there must be at least one."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise InputError(f"{directory}: no *.safetensors file. Pickled weights are not read: convert them with "
                         "transformers' save_pretrained(..., safe_serialization=True).")
    return files


def _check_header(file: Path) -> None:
    """Raises a ValueError if a name occurs twice in a safetensors file, which its library does not notice."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        json.loads(opened.read(size), object_pairs_hook=without_duplicates)


class _SafetensorsFile:
    """A `.safetensors` file, opened for reading."""

    def __init__(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._handle = safe_open(file, framework="np")
            _check_header(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{file}: not a readable safetensors file ({error}). Fetch it again.") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {k: tuple(self._handle.get_slice(k).get_shape()) for k in self._handle.keys()}  # noqa: SIM118

    def dtype(self, key: str) -> str:
        kind = self._handle.get_slice(key).get_dtype()
        return next((ours for ours, theirs in SAFETENSORS.items() if theirs == kind), kind)

    def read(self, key: str) -> np.ndarray:
        return self._handle.get_tensor(key)


class _TorchFile:
    """A `.bin` file, which only torch can read; it is read in the mode that runs no code from the file."""

    def __init__(self, file: Path) -> None:
        try:
            import torch
        except ImportError:
            raise InputError(f"{file}: reading a .bin file needs torch. Install torch, or give a .safetensors "
                             "file.") from None
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds, pickle's among them
            raise InputError(f"{file}: torch cannot load it safely ({str(error).splitlines()[0]}). Give a .safetensors "
                             "file.") from None
        if not isinstance(loaded, dict) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
            raise InputError(f"{file}: expected a mapping from names to tensors. Give LLaVA's mm_projector.bin.")
        self._tensors = loaded

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {k: tuple(v.shape) for k, v in self._tensors.items()}

    def dtype(self, key: str) -> str:
        return str(self._tensors[key].dtype).removeprefix("torch.")

    def read(self, key: str) -> np.ndarray:
        tensor = self._tensors[key]
        if tensor.dtype.itemsize == 2:  # bfloat16, which torch cannot hand to NumPy; float32 holds it exactly
            tensor = tensor.float()
        return tensor.numpy()


def open_tensors(file: Path) -> _SafetensorsFile | _TorchFile | GgufFile:
    """Opens a `.bin`, `.gguf` or `.safetensors` file; of the last two, no tensor is read yet."""
    if is_gguf(file):
        return open_gguf(file)
    return _TorchFile(file) if file.suffix == ".bin" else _SafetensorsFile(file)


def _shown(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check_names(sources: list[Source], config: VlmSpec) -> None:
    """Checks that the files have every tensor of the model exactly once and in its shape, and no unknown tensor.

    Raises:
        InputError: they do not.
    """
    table, found, unread = pieces(config), dict[str, Path](), list[str]()
    for source in sources:
        for key, shape in open_tensors(source.file).shapes().items():
            name = source.rename(key)
            if name is None or (name not in table and never_run(name, config)):
                continue
            if name not in table:
                unread.append(key)
                continue
            if name in found:
                raise InputError(f"{source.file}: {key} is also in {found[name]}. Remove the outdated file.")
            found[name] = source.file
            if shape != table[name].shape:
                raise InputError(f"{source.file}: {key} has shape {shape}, config.json asks for {table[name].shape}. "
                                 "Fetch config.json and the weights again, from one checkpoint.")
    folder = ", ".join(dict.fromkeys(str(s.file.parent) for s in sources))
    missing = sorted(set(table) - set(found))
    if missing:
        raise InputError(f"{folder}: {len(missing)} tensors are missing: {_shown(missing)}. "
                         "The checkpoint is incomplete. Fetch it again.")
    if unread:
        raise InputError(f"{folder}: {len(unread)} tensors belong to no part of the model that config.json describes: "
                         f"{_shown(sorted(unread))}. Fetch config.json and the weights again, from one checkpoint.")


@partial(KeptJit, donate=("leaf",), static=("permutation", "block"))
def _insert(leaf: jax.Array, tensor: jax.Array, start: tuple[jax.Array, ...], *, permutation: tuple[int, ...],
            block: tuple[int, ...]) -> jax.Array:
    """Writes a tensor, transposed and cast, into one block of a leaf, on the leaf's device and in its memory."""
    tensor = tensor.transpose(permutation).reshape(block).astype(leaf.dtype)
    return jax.lax.dynamic_update_slice(leaf, tensor, start)


@partial(KeptJit, donate=("leaf",), static=("permutation", "scheme"))
def _insert_quantised(leaf: dict[str, jax.Array], tensor: jax.Array, layer: jax.Array, *,
                      permutation: tuple[int, ...], scheme: Scheme) -> dict[str, jax.Array]:
    """Writes a tensor, transposed and quantised, into one layer of a quantised weight."""
    one = quantised(tensor.transpose(permutation), scheme)
    return {name: jax.lax.dynamic_update_slice(array, one[name][None], (layer, 0, 0)) for name, array in leaf.items()}


def _check_values(source: Source, key: str, tensor: np.ndarray, kind: jnp.dtype) -> None:
    """Checks that a tensor holds numbers that the dtype `kind` can hold.

    Raises:
        InputError: it does not.
    """
    if tensor.dtype.name not in FLOATS:
        raise InputError(f"{source.file}: {key} holds {tensor.dtype} values, expected {', '.join(FLOATS)}. Quantised "
                         "weights are not read: fetch the checkpoint in one of these types.")
    if not np.isfinite(tensor).all():
        raise InputError(f"{source.file}: {key} holds NaN or Inf. The checkpoint is broken. Fetch it again.")
    largest = float(max(tensor.max(), -tensor.min())) if tensor.size else 0.0
    if largest > float(jnp.finfo(kind).max):
        raise InputError(f"{source.file}: {key} holds {largest:g}, which {kind} cannot hold. The checkpoint is broken, "
                         "or model.dtype is too narrow for it.")


def _tensors(sources: list[Source], config: VlmSpec, dtype: str) -> Iterator[tuple[Piece, np.ndarray]]:
    """Yields each tensor with its piece, file by file: one is closed before the next.

    Raises:
        InputError: a tensor holds values that the leaf cannot hold.
    """
    table = pieces(config)
    for source in sources:
        tensors = open_tensors(source.file)
        for key in tensors.shapes():
            name = source.rename(key)
            if name not in table:
                continue
            piece, tensor = table[name], tensors.read(key)
            kind = jnp.dtype("float32" if piece.leaf[0] == "projector" else dtype)
            _check_values(source, key, tensor, kind)
            yield piece, tensor


def load_tensors(sources: list[Source], config: VlmSpec, dtype: str = "float32", place: Place | None = None,
                 storage: Storage | None = None) -> dict[str, PyTree]:
    """Returns {"vision_tower", "projector", "decoder"}, trees of JAX arrays in `dtype`; the projector is in float32.

    Of a language model alone, it returns {"decoder"}.

    Args:
        place: a function from a leaf's path and shape to its sharding; None: all leaves on the default device.
        storage: that of the decoder's linear layers, as `model.base`; None: `dtype`. Of what is quantised, one tensor
            at a time is held in floating point.

    Raises:
        InputError: a file cannot be read, or a tensor is missing, unknown, of another shape or type, or not finite; or
            `storage` needs a library that is not installed.
    """
    if storage in ("int8", "nf4"):
        qwix()
    _check_names(sources, config)
    shapes = stored_shapes(config, dtype, storage)
    leaves: dict[tuple[str, ...], PyTree] = {}
    for piece, tensor in _tensors(sources, config, dtype):
        if piece.leaf not in leaves:
            leaves[piece.leaf] = _zeros(leaf_at(shapes, piece.leaf), piece.leaf, place)
        leaf = leaves[piece.leaf]
        if is_quantised(leaf):
            leaves[piece.leaf] = _insert_quantised(leaf, tensor, piece.start[0], permutation=piece.permutation,
                                                   scheme=cast(Scheme, storage))
        elif isinstance(leaf, np.ndarray):
            piece.of_leaf(leaf)[:] = tensor.transpose(piece.permutation).reshape(piece.block)
        else:
            leaves[piece.leaf] = _insert(leaf, tensor, piece.start, permutation=piece.permutation, block=piece.block)
    return traverse_util.unflatten_dict({path: _on_devices(leaf, path, place) for path, leaf in leaves.items()})


def _zeros(shapes: PyTree, path: tuple[str, ...], place: Place | None) -> PyTree:
    """Returns zeros of a leaf's shape and dtype, or of both arrays of a quantised weight, where `place` puts them.

    A small leaf is a NumPy array.
    """
    if is_quantised(shapes):
        return {name: _on_devices(_zeros(shape, (*path, name), place), (*path, name), place)
                for name, shape in shapes.items()}
    if math.prod(shapes.shape) * jnp.dtype(shapes.dtype).itemsize <= SMALL:
        return np.zeros(shapes.shape, shapes.dtype)
    return jnp.zeros(shapes.shape, shapes.dtype, device=None if place is None else place(path, shapes.shape))


def _on_devices(leaf: PyTree, path: tuple[str, ...], place: Place | None) -> PyTree:
    """Returns a NumPy array where `place` puts it; anything else is there already."""
    if not isinstance(leaf, np.ndarray):
        return leaf
    sharding = None if place is None else place(path, leaf.shape)
    return jax.device_put(leaf) if sharding is None else from_host(leaf, sharding)


def load_base(directory: str | Path, dtype: str = "float32", place: Place | None = None,
              storage: Storage | None = None) -> tuple[VlmSpec, dict[str, PyTree]]:
    """Returns the shapes and the frozen weights of a Hugging Face LLaVA directory; see `load_tensors`."""
    directory = Path(directory)
    config = read_vlm_config(directory)
    sources = [Source(file, canonical_name) for file in safetensors_files(directory)]
    return config, load_tensors(sources, config, dtype, place, storage)
