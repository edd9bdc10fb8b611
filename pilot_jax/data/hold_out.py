"""Holds out shares of the clients' training samples for validation and test, by a hash of what they show and ask."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter

from pilot_jax.config import HoldOutConfig
from pilot_jax.data.images import image_identity
from pilot_jax.data.llava.sample import Sample
from pilot_jax.errors import InputError


def held_out(samples: list[Sample], shares: HoldOutConfig) -> list[Sample]:
    """Returns the samples with a part of the training samples in the splits validation and test.

    Samples with the same image, or of those without one with the same prompt, are in the same split. A hash of image or
    prompt decides which, so that it stays when other samples are added. A client that would be without a split then
    gets one more image or prompt in it, if it has enough of them to keep one in each split. A client that has samples
    of a split in the data keeps them alone.

    Raises:
        InputError: every client has such a split in the data already, or an image cannot be read.
    """
    wanted = {split: share for split, share in (("test", shares.test), ("validation", shares.validation)) if share}
    if not wanted or not samples:
        return samples
    named = {(sample.client, sample.split) for sample in samples}
    open_splits = {sample.client: [split for split in wanted if (sample.client, split) not in named]
                   for sample in samples}
    for split in wanted:
        if not any(split in splits for splits in open_splits.values()):
            raise InputError(f"data.hold_out.{split}: every client has {split} samples in the data already. Remove the "
                             "key.")
    keys = [_key(sample) if sample.split == "train" and open_splits[sample.client] else b"" for sample in samples]
    groups: dict[str, set[bytes]] = {}
    for sample, key in zip(samples, keys, strict=True):
        if key:
            groups.setdefault(sample.client, set()).add(key)
    table = _Splits(groups, open_splits, wanted)
    return [dataclasses.replace(sample, split=table.split(sample.client, key)) if key else sample
            for sample, key in zip(samples, keys, strict=True)]


def _key(sample: Sample) -> bytes:
    """Returns a hash of the sample's image or, without one, of its prompt; as a number, it is uniformly distributed."""
    if sample.image is None:
        return hashlib.sha256(repr(sample.turns[:-1]).encode()).digest()
    try:
        return hashlib.sha256(image_identity(sample)).digest()
    except OSError as error:
        raise InputError(f"{sample.source}: image: cannot be read ({error.strerror or error}). Replace the file or "
                         "remove the entry.") from None


class _Splits:
    """The split of each group of samples, which have one image or one prompt.

    Args:
        groups: the keys of each client's groups.
        open_splits: the splits that each client can get.
        shares: the share of the groups in each of these splits.
    """

    def __init__(self, groups: dict[str, set[bytes]], open_splits: dict[str, list[str]],
                 shares: dict[str, float]) -> None:
        self._groups, self._open = groups, open_splits
        self._owners: dict[bytes, list[str]] = {}
        for client, keys in groups.items():
            for key in keys:
                self._owners.setdefault(key, []).append(client)
        self._split = {key: self._by_hash(key, shares) for key in self._owners}
        self._counts = {client: Counter(self.split(client, key) for key in keys) for client, keys in groups.items()}
        for split in ("train", *shares):
            for client in sorted(groups):
                if not self._counts[client][split] and split in ("train", *self._open[client]):
                    self._give(client, split)

    @staticmethod
    def _by_hash(key: bytes, shares: dict[str, float]) -> str:
        place = int.from_bytes(key) / 2 ** (8 * len(key))
        for split, share in shares.items():
            if place < share:
                return split
            place -= share
        return "train"

    def split(self, client: str, key: bytes) -> str:
        """Returns the split of one of the client's groups."""
        split = self._split[key]
        return split if split in self._open[client] else "train"

    def _give(self, client: str, split: str) -> None:
        """Moves a group of the client into `split`, by which no client may lose its last group of another split.

        The test split may take the last group for validation, which then gets another one if there are enough. Groups
        of this client alone come first, and then those whose hashes are nearest to the split's. If there is none that
        may be moved, a client still gets a group for training.
        """
        order = sorted(self._groups[client], reverse=split == "train")
        order = sorted(order, key=lambda key: len(self._owners[key]))
        key = next((key for key in order if all(
            self._counts[owner][before] > 1 or (split, before) == ("test", "validation")
            for owner, before, _ in self._changes(key, split))), None)
        if key is None and split == "train":
            key = order[0]
        if key is not None:
            for owner, before, after in self._changes(key, split):
                self._counts[owner][before] -= 1
                self._counts[owner][after] += 1
            self._split[key] = split

    def _changes(self, key: bytes, split: str) -> list[tuple[str, str, str]]:
        """Returns (client, split before, split after) of each client for which a group would change its split."""
        changes = [(owner, self.split(owner, key), split if split in self._open[owner] else "train")
                   for owner in self._owners[key]]
        return [change for change in changes if change[1] != change[2]]
