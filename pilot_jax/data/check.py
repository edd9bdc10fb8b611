"""Checks a data set as a run would, and reports all of its problems at once."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pilot_jax.config import DataConfig, LimitsConfig
from pilot_jax.data.build import encode_prompt, encode_sample, refuse_images
from pilot_jax.data.conversations import TEMPLATES, TOKENIZER, check_system, encode, stop_tokens
from pilot_jax.data.division import check_client_count, client_faults, divided, missing_splits, splits_of
from pilot_jax.data.images import check_image_fit, check_shape, read_image
from pilot_jax.data.llava.reading import find_image_root, read_entries
from pilot_jax.data.llava.sample import Entry, Sample, parse_sample
from pilot_jax.errors import InputError
from pilot_jax.words import agree

if TYPE_CHECKING:
    from pilot_jax.models.pretrained import PretrainedModel


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run's config says of its data outside of the section `data`."""

    clients: int | None = None  # federation.clients
    seed: int = 0  # system.seed
    takes_images: bool = True  # whether the base has a vision tower
    every: int = 0  # eval.every


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
            out.append(f"{agree(len(shared), 'sample', 'occurs', 'occur')} in several {what} (first: "
                       f"{first[0].source} and {first[1].source})")
    return out


def _oddities(entries: list[Entry], samples: list[Sample]) -> list[str]:
    """Returns warnings about what a run takes as it is: equal ids, empty answers, and tasks that only files name."""
    out = []
    first: dict[str, Sample] = {}
    again = [(first[s.id], s) for s in samples if first.setdefault(s.id, s) is not s]
    if again:
        out.append(f"{agree(len(again), 'sample', 'has', 'have')} the id of another one (first: {again[0][0].id!r} of "
                   f"{again[0][0].source} and {again[0][1].source})")
    empty = [s.source for s in samples if not all(text.strip() for text in (s.turns[-1][1], *s.answers))]
    if empty:
        out.append(f"{agree(len(empty), 'sample', 'has', 'have')} an empty answer, of which a model learns to say "
                   f"nothing (first: {empty[0]})")
    unnamed = [e for e in entries if isinstance(e.value, dict) and not e.value.get("task")]
    if unnamed and len(unnamed) < len(entries):  # if none does, files are meant to name tasks
        tasks = ", ".join(sorted({e.task for e in unnamed}))
        out.append(f"{agree(len(unnamed), 'sample', 'names no task and gets', 'name no task and get')} that of "
                   f"{'its' if len(unnamed) == 1 else 'their'} file's name: {tasks} (first: {unnamed[0].where})")
    return out


def _encoding_errors(samples: list[Sample], data: DataConfig, model: PretrainedModel) -> list[str]:
    """Returns errors about samples that cannot be encoded as a run would encode them, by their splits.

    Raises:
        InputError: the tokenizer lacks the template's stop token.
    """
    tokenizer, errors = model.tokenizer(), list[str]()
    stop_tokens(tokenizer, data.template)
    for sample in samples:
        try:
            (encode_sample if sample.split == "train" else encode_prompt)(model, tokenizer, sample, data)
        except InputError as error:
            errors.append(str(error))
    return errors




def _sample(entry: Entry, root: Path, data: DataConfig, side: int, takes_images: bool) -> Sample:
    """Returns the sample of an entry, after reading its image and checking what does not depend on its split.

    Raises:
        InputError: a run would refuse the entry.
    """
    sample = parse_sample(entry, root, data.limits)
    refuse_images([sample], takes_images)
    if sample.image is not None:
        check_shape(sample, read_image(sample, data.limits), data.image_fit, data.limits, side)
    try:
        check_system(sample.turns, data.template)
    except InputError as error:
        raise InputError(f"{sample.source}: {error}") from None
    return sample


def _lengths(samples: list[Sample], data: DataConfig, model: PretrainedModel | None) -> list[int]:
    """Returns the samples' numbers of tokens; without a model, of characters."""
    if model is None:
        return [sum(len(text) for _, text in sample.turns) for sample in samples]
    tokenizer, count = model.tokenizer(), model.config.num_image_tokens
    return [len(encode(tokenizer, sample.turns, data.template, count).input_ids) for sample in samples]


def _read(path: str | Path, data: DataConfig, model: PretrainedModel | None,
          takes_images: bool) -> tuple[list[Sample], list[Entry], list[str]]:
    """Returns the samples that can be read, with their images; all entries; and why each of the others cannot be.

    Of what an entry says, the task alone is kept."""
    root = find_image_root(path, data.image_root)
    has_tower = model is None or model.config.vision is not None
    side = 336 if model is None or not has_tower else model.config.tower.image_size
    samples, entries, errors = list[Sample](), list[Entry](), list[str]()
    for entry in read_entries(path, data.file_names, data.limits):
        try:
            samples.append(_sample(entry, root, data, side, takes_images and has_tower))
        except InputError as error:
            errors.append(str(error))
        entries.append(dataclasses.replace(entry, value={"task": entry.value.get("task")})
                       if isinstance(entry.value, dict) else entry)
    return samples, entries, errors


def _too_long(samples: Sequence[Sample], lengths: Sequence[int], limit: int) -> list[str]:
    """Returns a warning about the samples of more than `limit` tokens; none if there are no lengths."""
    cut = [s.source for s, length in zip(samples, lengths, strict=False) if length > limit]
    if not cut:
        return []
    return [f"{agree(len(cut), 'sample', 'is', 'are')} longer than data.max_length ({limit}) and "
            f"{'loses the end of its answer' if len(cut) == 1 else 'lose the end of their answers'} (first: {cut[0]})"]


def check_data(path: str | Path, data: DataConfig, model: PretrainedModel | None = None,
               settings: Settings = Settings()) -> Report:
    """Reads a data set as a run would, images included, and returns a report of its problems.

    Args:
        model: a model whose tokenizer measures lengths in tokens and finds samples that are too long for
            `data.max_length`. None: lengths are in characters, and nothing is too long.
        settings: what the run's config says outside of the section `data`.

    Raises:
        InputError: `path` holds no data file, or a file cannot be parsed at all, or the template cannot be used.
    """
    if data.template not in (*TEMPLATES, TOKENIZER):
        raise InputError(f"data.template: {data.template!r} is not known. Use one of "
                         f"{', '.join([*TEMPLATES, TOKENIZER])}.")
    check_image_fit(data.image_fit)
    samples, entries, errors = _read(path, data, model, settings.takes_images)
    if not entries:
        errors.append(f"{path}: holds no sample.")
    warnings = _oddities(entries, samples)
    try:
        samples = divided(samples, data, settings.clients, settings.seed)
        check_client_count(data, settings.clients, len({s.client for s in samples}))
    except InputError as error:
        errors.append(str(error))
    faults = client_faults([s for s in samples if s.client])
    unencodable = [] if model is None else _encoding_errors(samples, data, model)
    lengths = [] if unencodable else _lengths(samples, data, model)
    if model is not None:
        warnings += _too_long(samples, lengths, data.max_length)
    warnings += _duplicates(samples, data.limits) + missing_splits(splits_of(samples), settings.every)
    counts = Counter((s.task, s.client, s.split) for s in samples)
    return Report(dict(sorted(counts.items())), "characters" if model is None else "tokens", _histogram(lengths),
                  errors + faults + unencodable, warnings)
