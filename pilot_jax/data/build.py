"""From samples to every client's data: encoded, sorted into clients, padded to few shapes."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pilot_jax.config import DataConfig
from pilot_jax.data.arrays import ClientData, Prompts, _round_up, _training_arrays, bucket_shapes, training_length
from pilot_jax.data.conversations import Encoded, encode
from pilot_jax.data.features import FeatureRows, Features
from pilot_jax.data.llava.sample import Sample
from pilot_jax.errors import InputError
from pilot_jax.storage import kept

if TYPE_CHECKING:
    from pilot_jax.models.pretrained import PretrainedModel

logger = logging.getLogger("pilot_jax")


def encode_prompts(model: PretrainedModel, tokenizer, samples: list[Sample], data: DataConfig) -> list[np.ndarray]:
    """Token ids of each conversation up to its last answer.

    Raises:
        InputError: a prompt is longer than `data.max_length`: cut, it would ask something else.
    """
    n_image, prompts = model.config.num_image_tokens, []
    for sample in samples:
        ids = encode(tokenizer, sample.turns[:-1], data.template, n_image).input_ids
        if len(ids) > data.max_length:
            raise InputError(f"{sample.source}: the prompt has {len(ids)} tokens, data.max_length is "
                             f"{data.max_length}. Shorten it or raise the limit.")
        prompts.append(ids)
    return prompts


def build_prompts(samples: list[Sample], encoded: list[np.ndarray], features: np.ndarray | FeatureRows,
                  length: int | None = None) -> Prompts:
    """Prompts padded to a multiple of 8, or to `length`."""
    length = _round_up(max(len(e) for e in encoded), 8) if length is None else length
    ids, mask = np.zeros((len(samples), length), np.int32), np.zeros((len(samples), length), np.int32)
    for row, item in enumerate(encoded):
        ids[row, :len(item)], mask[row, :len(item)] = item, 1
    return Prompts(ids, mask, features, tuple(s.references for s in samples))


def encode_samples(model: PretrainedModel, tokenizer, samples: list[Sample], data: DataConfig) -> list[Encoded]:
    """Each conversation with its answers marked, no longer than `data.max_length`; says how many answers were cut.

    Raises:
        InputError: the limit would cut an image, or leave a sample without an answer.
    """
    encoded = []
    for sample in samples:
        try:
            item = encode(tokenizer, sample.turns, data.template, model.config.num_image_tokens, data.max_length)
        except InputError as error:
            raise InputError(f"{sample.source}: {error}") from None
        if not item.supervised.any():
            raise InputError(f"{sample.source}: no answer token within data.max_length ({data.max_length}). "
                             "Shorten the sample or raise the limit.")
        encoded.append(item)
    cut = [sample.source for sample, item in zip(samples, encoded, strict=True) if item.cut]
    if cut:
        logger.warning("data.max_length: %d cuts the answers of %d of %d samples (first: %s).", data.max_length,
                       len(cut), len(samples), cut[0])
    return encoded


def build_clients(model: PretrainedModel, tokenizer, samples: list[Sample], data: DataConfig,
                  length_spread: float, folder: Path | None = None) -> list[ClientData]:
    """Every client's data, ordered by client name; images are not read yet. Clients of like lengths share L and A, so
    that few programs train them all and none is padded far. With `folder` the arrays lie there, not in memory.

    Raises:
        InputError: a client without training samples or with several tasks; a sample that is too long or has
            nothing to learn from.
    """
    samples = sorted(samples, key=lambda s: (s.client, s.split))  # a client's split is then one slice of all features
    train_rows = [i for i, s in enumerate(samples) if s.split == "train"]
    asked_rows = [i for i, s in enumerate(samples) if s.split != "train"]
    encoded = dict(zip(train_rows, encode_samples(model, tokenizer, [samples[i] for i in train_rows], data),
                       strict=True))
    asked = dict(zip(asked_rows, encode_prompts(model, tokenizer, [samples[i] for i in asked_rows], data),
                     strict=True))
    features = Features(model, samples, data, None if folder is None else folder / "features")
    prompt_length = _round_up(max((len(ids) for ids in asked.values()), default=8), 8)

    rows_of: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        rows_of.setdefault(sample.client, []).append(i)
    shapes = bucket_shapes({name: training_length([encoded[i] for i in rows if i in encoded])
                            for name, rows in rows_of.items()}, length_spread)
    clients = []
    for name in sorted(rows_of):
        rows, (length, answers) = rows_of[name], shapes[name]
        tasks = sorted({samples[i].task for i in rows})
        if len(tasks) != 1:
            raise InputError(f"client {name!r} has samples of several tasks ({', '.join(tasks)}). "
                             "Pilot gives each client one task: split it into one client per task.")
        mine = [i for i in rows if samples[i].split == "train"]
        if not mine:
            raise InputError(f"client {name!r} has no training sample. Give it some or remove it from data.path.")
        has_image = np.asarray([samples[i].image is not None for i in mine])
        train: dict[str, Any] = _training_arrays([encoded.pop(i) for i in mine], has_image, length, answers)
        if folder is not None:
            train = {key: kept(folder / f"{key}-{length}-{answers}", array) for key, array in train.items()}
        evaluation = {}
        for split in ("validation", "test"):
            chosen = [i for i in rows if samples[i].split == split]
            if chosen:
                evaluation[split] = build_prompts([samples[i] for i in chosen], [asked[i] for i in chosen],
                                                  features.rows(chosen), prompt_length)
        clients.append(ClientData(name, tasks[0], train | {"features": features.rows(mine)}, evaluation))
    return clients


def partition(samples: list[Sample], how: str, clients: int | None, alpha: float, seed: int) -> list[Sample]:
    """The samples with `client` filled in, as `data.partition` asks.

    given: as the data say (every sample needs `client`). equal, dirichlet: each task's samples of each split are
    shuffled and dealt to clients/T clients, in equal or Dirichlet(alpha) shares of at least one sample.

    Raises:
        InputError: a sample without client, or clients that do not divide among the tasks.
    """
    if how == "given":
        for sample in samples:
            if not sample.client:
                raise InputError(f"{sample.source}: client: missing. Name it, or set data.partition: equal.")
        return samples
    tasks = sorted({s.task for s in samples})
    if clients is None or clients % len(tasks):
        raise InputError(f"federation.clients: {clients} must be a multiple of the {len(tasks)} tasks "
                         f"({', '.join(tasks)}) with data.partition: {how}.")
    per_task = clients // len(tasks)
    out = []
    for index, task in enumerate(tasks):
        rng = np.random.default_rng([seed, index])
        shares = np.full(per_task, 1.0 / per_task) if how == "equal" else rng.dirichlet(np.full(per_task, alpha))
        for split in ("train", "validation", "test"):
            mine = [s for s in samples if s.task == task and s.split == split]
            if not mine:
                continue
            if len(mine) < per_task:
                raise InputError(f"data.path: task {task!r} has {len(mine)} {split} samples for {per_task} clients.")
            # Evaluation splits are dealt evenly: a score from three samples says nothing.
            split_shares = shares if split == "train" else np.full(per_task, 1.0 / per_task)
            counts = 1 + np.floor(split_shares * (len(mine) - per_task)).astype(int)
            counts[np.argmax(split_shares)] += len(mine) - counts.sum()
            order = rng.permutation(len(mine))
            owner = np.repeat(np.arange(per_task), counts)
            out += [dataclasses.replace(mine[i], client=f"{task}_{k}") for i, k in zip(order, owner, strict=True)]
    return out
