"""Checks a LLaVA-format data set and reports all of its problems at once."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pilot_jax.config import DataConfig, LimitsConfig
from pilot_jax.data.conversations import encode
from pilot_jax.data.images import check_shape, read_image
from pilot_jax.data.llava.reading import find_image_root, read_entries
from pilot_jax.data.llava.sample import Sample, parse_sample
from pilot_jax.errors import InputError

if TYPE_CHECKING:
    from pilot_jax.models.pretrained import PretrainedModel


@dataclasses.dataclass(frozen=True)
class Report:
    """The findings on a data set: `errors` would stop a run, `warnings` would not."""

    counts: dict[tuple[str, str, str], int]  # number of samples of each (task, client, split)
    length_unit: str  # "tokens" or "characters"
    lengths: list[tuple[int, int, int]]  # histogram of the samples' lengths: (from, to, number of samples)
    errors: list[str]
    warnings: list[str]


def _histogram(lengths: list[int], bins: int = 8) -> list[tuple[int, int, int]]:
    """Returns (from, to, count) of each bin of a histogram; both bounds belong to the bin."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    edges = np.unique(np.linspace(low, high + 1, bins + 1).astype(int))
    counts, _ = np.histogram(lengths, edges)
    return [(int(a), int(b) - 1, int(n)) for a, b, n in zip(edges, edges[1:], counts, strict=False)]


def _fingerprint(sample: Sample, limits: LimitsConfig) -> str:
    """Returns a hash that two samples share if they have the same image and the same conversation."""
    digest = hashlib.sha256(repr(sample.turns).encode())
    if isinstance(sample.image, Path):
        digest.update(sample.image.read_bytes())
    elif sample.image is not None:
        digest.update(read_image(sample, limits).tobytes())
    return digest.hexdigest()


def _duplicates(samples: list[Sample], limits: LimitsConfig) -> list[str]:
    """Returns warnings about samples that occur in several splits or at several clients."""
    same: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        same[_fingerprint(sample, limits)].append(sample)
    out = []
    for what, key in (("splits, so the scores on held-out data are too high", "split"),
                      ("clients, so their data are not private", "client")):
        shared = [group for group in same.values() if len({getattr(s, key) for s in group}) > 1]
        if shared:
            first = shared[0]
            out.append(f"{len(shared)} samples occur in several {what} (first: {first[0].source} and "
                       f"{first[1].source})")
    return out


def _client_errors(samples: list[Sample]) -> list[str]:
    """Returns errors about clients with several tasks or without a training sample."""
    tasks: dict[str, set[str]] = defaultdict(set)
    trained = {s.client for s in samples if s.split == "train"}
    for sample in samples:
        tasks[sample.client].add(sample.task)
    several = [f"client {c!r} has samples of several tasks ({', '.join(sorted(t))}); a client must have one"
               for c, t in sorted(tasks.items()) if c and len(t) > 1]
    return several + [f"client {c!r} has no training sample" for c in sorted(tasks) if c and c not in trained]


def check_data(path: str | Path, data: DataConfig, model: PretrainedModel | None = None) -> Report:
    """Reads a data set as a run would, images included, and returns a report of its problems.

    Args:
        model: a model whose tokenizer measures lengths in tokens and finds answers that `data.max_length` cuts. None:
            lengths are in characters.

    Raises:
        InputError: `path` holds no data file, or a file cannot be parsed at all.
    """
    root = find_image_root(path, data.image_root)
    samples, lengths = list[Sample](), list[int]()
    errors, warnings, cut = list[str](), list[str](), list[str]()
    tokenizer = None if model is None else model.tokenizer()
    for entry in read_entries(path, data.file_names, data.limits):
        try:
            sample = parse_sample(entry, root, data.limits)
            if sample.image is not None:
                side = 336 if model is None else model.config.tower.image_size
                check_shape(sample, read_image(sample, data.limits), data.image_fit, data.limits, side)
            if model is None or tokenizer is None:
                lengths.append(sum(len(text) for _, text in sample.turns))
            else:
                whole = encode(tokenizer, sample.turns, data.template, model.config.num_image_tokens)
                lengths.append(len(whole.input_ids))
                cut += [sample.source] if lengths[-1] > data.max_length else []
            samples.append(sample)
        except InputError as error:
            errors.append(str(error))
    if cut:
        warnings.append(f"{len(cut)} samples are longer than data.max_length ({data.max_length}) and lose the end of "
                        f"their answers (first: {cut[0]})")
    warnings += _duplicates(samples, data.limits)
    errors += _client_errors(samples)
    if not samples and not errors:
        errors.append(f"{path}: holds no sample.")
    counts = Counter((s.task, s.client, s.split) for s in samples)
    return Report(dict(sorted(counts.items())), "characters" if model is None else "tokens", _histogram(lengths),
                  errors, warnings)
