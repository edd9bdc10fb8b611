"""Writes a checkpoint with changed weights, one tensor at a time: LoRA added to it, and another projector.

The files of the base are read again, so that what is not changed stays as it is, to the bit, and no second copy of the
model is in memory.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from pilot_jax.config import ModelConfig
from pilot_jax.errors import InputError
from pilot_jax.files import LateTensor, stream_safetensors
from pilot_jax.models.checkpoints import stock
from pilot_jax.models.checkpoints.gguf import is_gguf
from pilot_jax.models.checkpoints.parts import part_sources
from pilot_jax.models.checkpoints.peft import MODULES
from pilot_jax.models.checkpoints.reading import FLOATS, Source, open_tensors, safetensors_files
from pilot_jax.models.checkpoints.tensor_names import canonical_name, never_run, stock_name
from pilot_jax.models.packaged import model_directory
from pilot_jax.models.spec import VlmSpec

Change = Callable[[np.ndarray], np.ndarray]  # from a tensor of the base, float32, to the one that is written


@dataclasses.dataclass(frozen=True)
class Form:
    """The form in which the tensors of several files are written."""

    name: Callable[[str, str], str | None]  # from a tensor's name in its file and its canonical one; None: left out
    dtype: str | None = None  # of all tensors; None: each keeps its own
    rows: int | None = None  # size of the vocabulary, filled up with mean rows; None: the base's


def _added(value: np.ndarray, a: np.ndarray, b: np.ndarray, factor: float) -> np.ndarray:
    return value + np.float32(factor) * (b @ a)


def changes(lora: Mapping[str, PyTree], factor: float, projector: Mapping[str, PyTree] | None) -> dict[str, Change]:
    """Returns the changes that LoRA and a projector make, by the canonical names of the tensors.

    Args:
        lora: {"layers": {target: {"a": [layers, R, d_in], "b": [layers, d_out, R]}}}; W becomes W + factor·B·A.
        factor: α/r.
        projector: the connector's projector, which takes the place of the base's; None: the base's stays.
    """
    out: dict[str, Change] = {}
    for target, pair in lora["layers"].items():
        for i, (a, b) in enumerate(zip(np.asarray(pair["a"], np.float32), np.asarray(pair["b"], np.float32),
                                       strict=True)):
            name = f"language_model.layers.{i}.{MODULES[target]}.weight"
            out[name] = partial(_added, a=a, b=b, factor=factor)
    for layer, leaves in (projector or {}).items():
        for leaf, value in leaves.items():
            theirs = np.asarray(value, np.float32).T if leaf == "kernel" else np.asarray(value, np.float32)
            name = f"multi_modal_projector.{layer}.{'weight' if leaf == 'kernel' else 'bias'}"
            out[name] = partial(lambda _, new: new, new=theirs)
    return out


def _filled_up(value: np.ndarray, rows: int) -> np.ndarray:
    """Returns [V, C] as [rows, C]. Mean rows, whose logits are never the largest, stand for tokens that are unknown."""
    mean = np.mean(value, axis=0, keepdims=True, dtype=np.float32)
    return np.concatenate([value, np.repeat(mean, rows - len(value), axis=0).astype(value.dtype)])


def _made(read: Callable[[], np.ndarray], change: Change | None, rows: int | None, dtype: str, where: str
          ) -> np.ndarray:
    """Returns a tensor as it is written.

    Raises:
        InputError: it has values that `dtype` cannot hold.
    """
    value = read()
    if change is not None:
        value = change(value.astype(np.float32))
    if rows is not None:
        value = _filled_up(value, rows)
    if value.dtype.name == dtype:
        return value
    with np.errstate(over="ignore"):
        out = value.astype(jnp.dtype(dtype))
    if not np.isfinite(out).all():
        raise InputError(f"{where}: with the adapters, it holds values that {dtype} cannot hold. The adapters have "
                         "diverged, or the base needs a wider type. Nothing was written.")
    return out


def write_merged(folder: Path, sources: Sequence[Source], changed: Mapping[str, Change], form: Form) -> None:
    """Writes the tensors of several files into as many files of a folder, and their index if there are several.

    Args:
        sources: the files of a checkpoint that `reading.load_tensors` reads, so that no tensor is missing.
        changed: the tensors that are changed, by their canonical names.

    Raises:
        InputError: a tensor has values that its dtype cannot hold.
    """
    index: dict[str, str] = {}
    total, found = 0, set[str]()
    for number, source in enumerate(sources, 1):
        file = "model.safetensors" if len(sources) == 1 else f"model-{number:05d}-of-{len(sources):05d}.safetensors"
        opened, late = open_tensors(source.file), dict[str, LateTensor]()
        for key, shape in opened.shapes().items():
            canonical, dtype = source.rename(key), opened.dtype(key)
            name = None if canonical is None else form.name(key, canonical)
            if name is None or canonical is None or (form.dtype is not None and dtype not in FLOATS):
                continue
            found.add(canonical)
            rows = form.rows if canonical in ("language_model.embed_tokens.weight", "lm_head.weight") else None
            dtype = form.dtype or dtype
            make = partial(_made, partial(opened.read, key), changed.get(canonical), rows, dtype,
                           f"{source.file}: {key}")
            late[name] = LateTensor(shape if rows is None else (rows, *shape[1:]), dtype, make)
            total += late[name].nbytes
        stream_safetensors(folder / file, late, {"format": "pt"})
        index |= dict.fromkeys(late, file)
    assert set(changed) <= found, sorted(set(changed) - found)  # the base was loaded from these files
    if len(sources) > 1:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


def write_checkpoint(folder: Path, model: ModelConfig, spec: VlmSpec, changed: Mapping[str, Change]) -> None:
    """Writes a base model with changed weights as a stock checkpoint: weights, config, tokenizer, image processor.

    Args:
        folder: an existing, empty folder.
        spec: the base's shapes.
        changed: the changed tensors, by their canonical names; see `changes`.

    Raises:
        InputError: a tensor has values that its dtype cannot hold.
    """
    parts = model.parts
    if parts is None:
        directory = model_directory(model.path)
        stock.copy_side_files(directory, folder)
        sources = [Source(file, canonical_name) for file in safetensors_files(directory)]
        return write_merged(folder, sources, changed, Form(lambda key, _: key))
    vision, language, projector = (None if path is None else Path(path).expanduser()
                                   for path in (parts.vision, parts.language, parts.projector))
    assert language is not None
    sources = part_sources(vision, language, projector)
    opened, first = open_tensors(sources[0].file), "model.embed_tokens.weight"
    dtype = opened.dtype(first if first in opened.shapes() else next(iter(opened.shapes())))
    if vision is None:
        stock.write_language_files(language, folder, dtype)
        return write_merged(folder, sources, changed, Form(lambda key, _: key, dtype if is_gguf(language) else None))
    rows = stock.write_part_files(vision, language, spec, parts.feature_layer, dtype, folder)

    def name(key: str, canonical: str) -> str | None:
        unused = never_run(canonical, spec) and not canonical.startswith("vision_tower.")
        return None if unused else stock_name(canonical, spec.tower.family)

    return write_merged(folder, sources, changed, Form(name, dtype, rows))
