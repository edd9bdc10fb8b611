"""The clients' samples as arrays of a few shapes, and the order in which a client's steps visit them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pilot_jax.data.conversations import Encoded
from pilot_jax.data.features import FeatureRows, concatenate_features


@dataclasses.dataclass(frozen=True)
class Answered:
    """Prompts followed by their reference answers, for teacher forcing: one row for each pair of prompt and reference.

    `rows` holds input_ids and attention_mask, int32 [m, L]; target_positions and target_ids, int32 [m, A], and
    target_weights, float32 [m, A], as in `ClientData.train`. The targets are the tokens of the answer and its end.
    """

    rows: dict[str, np.ndarray]
    prompt: np.ndarray  # int32 [m], ascending: the number of the prompt that each row begins with

    def first(self, count: int) -> Answered:
        """Returns the rows of the first `count` prompts."""
        kept = self.prompt < count
        return Answered({name: array[kept] for name, array in self.rows.items()}, self.prompt[kept])


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A batch of n prompts for generation, padded at the right, and the reference answers of each."""

    input_ids: np.ndarray  # int32 [n, L]
    attention_mask: np.ndarray  # int32 [n, L]
    features: np.ndarray | FeatureRows  # [n, N, D]
    references: tuple[tuple[str, ...], ...]
    answered: Answered | None = None  # only with `eval.scoring: teacher_forced`
    kinds: tuple[str, ...] = ()  # `Sample.kind` of each; empty if it is not known

    def first(self, count: int) -> Prompts:
        """Returns the first `count` prompts. Features that are not in memory are not read."""
        features = self.features
        return Prompts(self.input_ids[:count], self.attention_mask[:count],
                       features.first(count) if isinstance(features, FeatureRows) else features[:count],
                       self.references[:count], None if self.answered is None else self.answered.first(count),
                       self.kinds[:count])


@dataclasses.dataclass(frozen=True)
class ClientData:
    """One client's private data, as token ids and image features.

    `train` holds input_ids and attention_mask, int32 [n, L]; target_positions and target_ids, int32 [n, A], and
    target_weights, float32 [n, A] (the logits at a target position predict the target id; padding has weight 0);
    has_image, float32 [n]; and features [n, N, D]. A is the number of supervised tokens.
    """

    name: str
    task: str
    train: dict[str, Any]  # arrays, or `Rows` and `FeatureRows`, which are read when the client is trained
    evaluation: dict[str, Prompts]  # the prompts of each held-out split

    @property
    def size(self) -> int:
        """n_k, the number of training samples."""
        return len(self.train["input_ids"])

    @property
    def features(self) -> np.ndarray | FeatureRows:
        """H_v of the training samples, [n, N, D]."""
        return self.train["features"]


def round_up(n: int, multiple: int) -> int:
    """Returns n rounded up to a multiple of `multiple`."""
    return -(-n // multiple) * multiple


def training_length(encoded: Sequence[Encoded]) -> tuple[int, int]:
    """Returns (L, A), the largest numbers of tokens and of supervised tokens of a conversation.

    They are rounded up to multiples of 8 and 4.
    """
    return (round_up(max((len(e.input_ids) for e in encoded), default=8), 8),
            round_up(max((int(e.supervised.sum()) for e in encoded), default=4), 4))


def padded_rows(encoded: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of token ids as input_ids and attention_mask, int32 [n, `length`], padded at the end."""
    ids, mask = np.zeros((len(encoded), length), np.int32), np.zeros((len(encoded), length), np.int32)
    for row, item in enumerate(encoded):
        ids[row, :len(item)], mask[row, :len(item)] = item, 1
    return ids, mask


def bucket_shapes(longest: Mapping[str, tuple[int, int]], spread: float) -> dict[str, tuple[int, int]]:
    """Returns the (L, A) to which each client's arrays are padded: the largest of the clients in the same bucket.

    Args:
        longest: each client's own (L, A).
        spread: the largest ratio of two lengths L in one bucket. With 1.2, lengths from 64 to 2,048 make at most twenty
            buckets, and usual tasks make two or three.
    """
    out: dict[str, tuple[int, int]] = {}
    bucket: list[str] = []
    for name in sorted(longest, key=lambda n: (longest[n][0], n)):
        if bucket and longest[name][0] > spread * longest[bucket[0]][0]:
            bucket = []
        bucket.append(name)
        shared = (longest[name][0], max(longest[n][1] for n in bucket))
        out |= dict.fromkeys(bucket, shared)
    return out


def training_arrays(encoded: Sequence[Encoded], has_image: np.ndarray, length: int,
                    answers: int) -> dict[str, np.ndarray]:
    """Returns the arrays of `ClientData.train`, except the features, padded to L = `length` and A = `answers`."""
    n = len(encoded)
    ids, mask = padded_rows([item.input_ids for item in encoded], length)
    positions, targets = np.zeros((n, answers), np.int32), np.zeros((n, answers), np.int32)
    weights = np.zeros((n, answers), np.float32)
    for row, item in enumerate(encoded):
        supervised = np.flatnonzero(item.supervised)
        positions[row, :len(supervised)] = supervised - 1
        targets[row, :len(supervised)] = item.input_ids[supervised]
        weights[row, :len(supervised)] = 1
    return {"input_ids": ids, "attention_mask": mask, "target_positions": positions, "target_ids": targets,
            "target_weights": weights, "has_image": has_image.astype(np.float32)}


def _padded(array: np.ndarray, length: int) -> np.ndarray:
    """Returns an array [n, m] padded with zeros to [n, length]."""
    return np.pad(array, ((0, 0), (0, length - array.shape[1])))


_LENGTHS = ("input_ids", "attention_mask")
_ANSWERS = ("target_positions", "target_ids", "target_weights")


def lengthened(train: Mapping[str, Any], length: int, answers: int) -> dict[str, Any]:
    """Returns training arrays, or rows of `Answered`, padded further to L = `length` and A = `answers`."""
    to = dict.fromkeys(_LENGTHS, length) | dict.fromkeys(_ANSWERS, answers)
    return {name: _padded(array, to[name]) if name in to else array for name, array in train.items()}


def pooled(clients: Sequence[ClientData]) -> ClientData:
    """Returns one client that has the training data of all clients, and no evaluation data."""
    length, answers = (max(c.train[n].shape[1] for c in clients) for n in ("input_ids", "target_ids"))
    parts = [lengthened(c.train, length, answers) for c in clients]
    joint = {n: np.concatenate([p[n] for p in parts]) for n in parts[0] if n != "features"}
    return ClientData("pooled", "all", joint | {"features": concatenate_features([c.features for c in clients])}, {})


def aligned(groups: Sequence[Sequence[ClientData]]) -> list[list[ClientData]]:
    """Returns the clients of several federations, padded so that clients of the same name have arrays of one shape.

    One compiled program then trains a client in all federations.
    """
    lengths: dict[str, list[int]] = {}
    prompt_length = 8
    for client in (c for group in groups for c in group):
        shape = client.train["input_ids"].shape[1], client.train["target_ids"].shape[1]
        lengths[client.name] = [max(a, b) for a, b in zip(shape, lengths.get(client.name, (0, 0)), strict=True)]
        prompt_length = max([prompt_length, *(p.input_ids.shape[1] for p in client.evaluation.values())])

    def padded(client: ClientData) -> ClientData:
        prompts = {split: dataclasses.replace(p, input_ids=_padded(p.input_ids, prompt_length),
                                              attention_mask=_padded(p.attention_mask, prompt_length))
                   for split, p in client.evaluation.items()}
        return dataclasses.replace(client, train=lengthened(client.train, *lengths[client.name]), evaluation=prompts)

    return [[padded(client) for client in group] for group in groups]


def num_steps(size: int, batch_size: int, epochs: int, local_steps: int | None) -> int:
    """Returns S_k, a client's number of steps in a phase: `local_steps` if given, else the steps of all epochs."""
    return local_steps if local_steps is not None else epochs * -(-size // batch_size)


def visiting_order(rng: np.random.Generator, size: int, batch_size: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sample indices of each step, int32 [steps, B], and which of them are no padding, bool [steps, B].

    Each epoch is a new shuffle. Its last batch is padded where samples run out, rather than filled from the next epoch.
    """
    per_epoch = -(-size // batch_size)
    order = np.zeros((-(-steps // per_epoch) * per_epoch, batch_size), np.int32)
    real = np.zeros(order.shape, bool)
    for start in range(0, len(order), per_epoch):
        flat = np.zeros(per_epoch * batch_size, np.int32)
        flat[:size] = rng.permutation(size)
        order[start:start + per_epoch] = flat.reshape(per_epoch, batch_size)
        real[start:start + per_epoch] = (np.arange(per_epoch * batch_size) < size).reshape(per_epoch, batch_size)
    return order[:steps], real[:steps]
