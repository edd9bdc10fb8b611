"""Samples that a program passes to a run in Python, instead of files that `data.path` names."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pilot_jax.config import DataConfig
from pilot_jax.data.images import image_identity
from pilot_jax.data.llava.reading import find_image_root, read_samples
from pilot_jax.data.llava.sample import SPLITS, Entry, Sample, checked_name, parse_sample
from pilot_jax.data.llava.tables import tables_rows
from pilot_jax.errors import InputError
from pilot_jax.words import counted

Partition = Callable[[list[Sample]], Sequence[str]]
PREFIX = "python:"  # in `data.path`, before the checksum of samples that were given in Python


@dataclasses.dataclass(frozen=True)
class Data:
    """A run's samples, given in Python.

    The run is resumed and restored with the same data, so keep what they are made from.

    Args:
        source: an iterable, such as a list or a generator, of entries or of `Sample` objects; a `datasets.Dataset` or
            `DatasetDict`; a dict of these by split; or the path of a data file or folder. Entries are dicts as in
            LLaVA's files, with `conversations` or `messages`. Their `image` is a path, an image of PIL, or the bytes of
            an image file. Paths start from `data.image_root`; without it, from the working directory.
        partition: a function from the list of all samples to a list of the names of their clients. None: samples name
            their clients, or `data.partition` divides them.
    """

    source: Any
    partition: Partition | None = None

    def __post_init__(self) -> None:
        if isinstance(self.source, Iterator):  # which can be read once only, and a run may be restored later
            object.__setattr__(self, "source", list(self.source))

    def samples(self, data: DataConfig) -> list[Sample]:
        """Returns the checked samples, with the clients of the partition.

        Raises:
            InputError: a sample is wrong, or there is none, or the partition does not return a client for each.
        """
        if isinstance(self.source, str | Path):
            samples = read_samples(self.source, data.image_root, data.file_names, data.limits)
        else:
            root = None if data.image_root is None else find_image_root("", data.image_root)
            samples = [parse_sample(entry, root, data.limits) for entry in _entries(self.source)]
        if not samples:
            raise InputError("data: no sample was given.")
        return samples if self.partition is None else _partitioned(samples, self.partition)


def as_data(data: Any) -> Data:
    """Returns what a program passes as data as an object of `Data`."""
    return data if isinstance(data, Data) else Data(data)


def _entries(source: Any, split: str = "train") -> Iterator[Entry]:
    """Yields the raw samples of what a program has passed."""
    datasets = sys.modules.get("datasets")  # imported already if the source is one of its tables
    if datasets is not None and isinstance(source, datasets.Dataset | datasets.DatasetDict):
        tables = source if isinstance(source, datasets.DatasetDict) else {"": source}
        for where, value, own_split in tables_rows(tables, "data"):
            yield Entry(where, value, "", "", own_split or split)
    elif isinstance(source, Mapping):
        if unknown := [key for key in source if key not in SPLITS]:
            raise InputError(f"data: {unknown[0]!r} is not a split ({', '.join(SPLITS)}). Give a list of entries, or a "
                             "dict of lists by split.")
        for key, part in source.items():
            yield from _entries(part, key)
    elif isinstance(source, Iterable) and not isinstance(source, bytes):
        for number, value in enumerate(source):
            where = f"data[{number}]" if split == "train" else f"data ({split})[{number}]"
            yield (Entry(value.source or where, _as_entry(value), "", "", split) if isinstance(value, Sample)
                   else Entry(where, value, "", "", split))
    else:
        raise InputError(f"data: a {type(source).__name__} has no entries. Give a list of dicts or samples, a "
                         "generator of them, a datasets.Dataset, or a path.")


def _as_entry(sample: Sample) -> dict[str, Any]:
    """Returns a sample as the entry of which it would be made, so that it is checked as others are."""
    return {"id": sample.id, "image": sample.image, "task": sample.task, "client": sample.client,
            "split": sample.split, "answers": list(sample.answers), "kind": sample.kind,
            "conversations": [{"from": who, "value": text} for who, text in sample.turns]}


def _partitioned(samples: list[Sample], partition: Partition) -> list[Sample]:
    """Returns the samples with the clients that the function names."""
    names = partition(list(samples))
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise InputError(f"partition: it returned a {type(names).__name__}. Return a list with a client's name for "
                         "each sample.")
    names = list(names)
    if len(names) != len(samples):
        raise InputError(f"partition: it returned {counted(len(names), 'client')} for "
                         f"{counted(len(samples), 'sample')}. Return a client's name for each sample.")
    clients = [checked_name(sample.source, "client", name) for sample, name in zip(samples, names, strict=True)]
    return [dataclasses.replace(s, client=client) for s, client in zip(samples, clients, strict=True)]


def samples_sha256(samples: Sequence[Sample]) -> str:
    """Returns a SHA-256 of everything in the samples, images included, but their ids and paths.

    Raises:
        InputError: the file of an image cannot be read.
    """
    digest = hashlib.sha256()
    for sample in samples:
        texts = [sample.turns, sample.task, sample.client, sample.split, sample.answers, sample.kind]
        digest.update(json.dumps(texts).encode())
        try:
            digest.update(image_identity(sample))
        except OSError as error:
            raise InputError(f"{sample.source}: image: cannot be read ({error.strerror or error}). Replace the file or "
                             "remove the entry.") from None
    return digest.hexdigest()
