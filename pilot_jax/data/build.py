"""Builds every client's data from its samples: encodes them and pads them to a few shapes."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pilot_jax.cache import AS_ARRAYS, Cache
from pilot_jax.config import DataConfig
from pilot_jax.data.arrays import (
    Answered,
    ClientData,
    Prompts,
    bucket_shapes,
    padded_rows,
    round_up,
    training_arrays,
    training_length,
)
from pilot_jax.data.conversations import IMAGE, TOKENIZER, Encoded, encode
from pilot_jax.data.division import client_faults
from pilot_jax.data.features import LEAST_ON_DEVICE, FeatureRows, Features
from pilot_jax.data.llava.sample import Sample
from pilot_jax.data.llava.turns import Turns
from pilot_jax.data.tokenizer import remembered_by
from pilot_jax.errors import InputError
from pilot_jax.storage import append_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pilot_jax.models.pretrained import PretrainedModel

logger = logging.getLogger("pilot_jax")


def refuse_images(samples: Sequence[Sample], takes_images: bool) -> None:
    """Refuses samples with an image unless the model takes images, which a language model alone does not, and samples
    with `<image>` in their text but without an image.

    Raises:
        InputError: there is one; the message names the first.
    """
    for sample in samples:
        marked = any(IMAGE in text for _, text in sample.turns)
        if not takes_images and (marked or sample.image is not None):
            raise InputError(f"{sample.source}: image: the model is a language model alone, which takes no images. "
                             "Leave samples with images out, or give model.parts.vision and model.parts.projector.")
        if marked and sample.image is None:
            raise InputError(f"{sample.source} has {IMAGE}, but there is no image. Give one, or remove {IMAGE}.")


def encode_prompt(model: PretrainedModel, tokenizer: PreTrainedTokenizerFast, sample: Sample,
                  data: DataConfig) -> np.ndarray:
    """Returns the token ids, int32 [length], of a conversation without its last answer.

    Raises:
        InputError: the prompt is longer than `data.max_length`. It is not cut, because it would then ask something
            else. Or it has a token that the model does not know, or the template cannot form it.
    """
    ids = _encode(model, tokenizer, sample, sample.turns[:-1], data).input_ids
    if len(ids) > data.max_length:
        raise InputError(f"{sample.source}: the prompt has {len(ids)} tokens, data.max_length is "
                         f"{data.max_length}. Shorten it or raise the limit.")
    return ids


def encode_prompts(model: PretrainedModel, tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample],
                   data: DataConfig) -> list[np.ndarray]:
    """Returns the token ids, int32 [length], of each conversation without its last answer.

    Raises:
        InputError: see `encode_prompt`; or a sample has an image, which the model does not take.
    """
    refuse_images(samples, model.config.vision is not None)

    def computed() -> dict[str, np.ndarray]:
        rows = [encode_prompt(model, tokenizer, sample, data) for sample in samples]
        return {"ids": _joined(rows), "lengths": np.asarray([len(row) for row in rows], np.int64)}

    found = remembered_by(tokenizer, _key("prompts", model, samples, data), AS_ARRAYS, computed)
    return _split(found["ids"], found["lengths"])


def _key(what: str, model: PretrainedModel, samples: Sequence[Sample], data: DataConfig) -> str | None:
    """Returns a text of all that the token ids of samples depend on, but for the tokenizer.

    None: they depend on more. A checkpoint's chat template is a program that may ask for the date, as Llama 3's does.
    """
    if data.template == TOKENIZER:
        return None
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr((sample.turns, sample.references)).encode())
    config = model.config
    return (f"{what} {digest.hexdigest()} {data.template} {data.max_length} {config.num_image_tokens} "
            f"{config.image_token_id} {config.text.vocab_size}")


def _joined(rows: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(rows) if rows else np.zeros(0, np.int32)


def _split(joined: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(joined, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _encode(model: PretrainedModel, tokenizer: PreTrainedTokenizerFast, sample: Sample, turns: Turns,
            data: DataConfig, max_length: int | None = None) -> Encoded:
    """Returns the encoded turns of a sample; an error names the sample."""
    try:
        item = encode(tokenizer, turns, data.template, model.config.num_image_tokens, max_length)
    except InputError as error:
        raise InputError(f"{sample.source}: {error}") from None
    _check_ids(sample, item.input_ids, model, tokenizer)
    return item


def _check_ids(sample: Sample, ids: np.ndarray, model: PretrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuses token ids without a row in the model's embedding, except that of image tokens, which need none.

    Raises:
        InputError: there are some.
    """
    size = model.config.text.vocab_size
    unknown = ids[(ids >= size) & (ids != model.config.image_token_id)]
    if len(unknown):
        raise InputError(f"{sample.source}: the tokenizer gives {tokenizer.convert_ids_to_tokens(int(unknown[0]))!r} "
                         f"the id {unknown[0]}, and the model has {size} tokens. Fetch tokenizer and model again, from "
                         "one checkpoint.")


def build_prompts(samples: Sequence[Sample], encoded: Sequence[np.ndarray], features: np.ndarray | FeatureRows,
                  length: int | None = None) -> Prompts:
    """Returns the prompts as arrays, padded to `length`, or by default to a multiple of 8."""
    length = round_up(max(len(e) for e in encoded), 8) if length is None else length
    return Prompts(*padded_rows(encoded, length), features, tuple(s.references for s in samples),
                   kinds=tuple(s.kind for s in samples))


def with_answers(model: PretrainedModel, tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample],
                 data: DataConfig, prompts: Prompts) -> Prompts:
    """Returns the prompts of `samples` with `answered`, in which the last answers are encoded as in training.

    Raises:
        InputError: a prompt with an answer is longer than `data.max_length`. It is not cut, because an answer without
            its end would be easier. Or it has a token that the model does not know.
    """
    found = remembered_by(tokenizer, _key("answers", model, samples, data), AS_ARRAYS,
                          lambda: _answered(model, tokenizer, samples, data, prompts))
    number = found.pop("prompt")
    return dataclasses.replace(prompts, answered=Answered(found, number))


def _answered(model: PretrainedModel, tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample],
              data: DataConfig, prompts: Prompts) -> dict[str, np.ndarray]:
    """Returns the training arrays of all references, and as `prompt` the number of the prompt of each."""
    encoded, numbers = list[Encoded](), list[int]()
    for number, sample in enumerate(samples):
        prompt = prompts.input_ids[number][prompts.attention_mask[number] > 0]
        for reference in dict.fromkeys(sample.references):
            turns = (*sample.turns[:-1], ("gpt", reference))
            item = _encode(model, tokenizer, sample, turns, data)
            if len(item.input_ids) > data.max_length:
                raise InputError(f"{sample.source}: the prompt and its answer have {len(item.input_ids)} tokens, "
                                 f"data.max_length is {data.max_length}. Shorten them or raise the limit.")
            # Earlier answers belong to the prompt. A token that spans the prompt's end belongs to the answer.
            same = np.cumprod(item.input_ids[:len(prompt)] == prompt[:len(item.input_ids)]).sum()
            encoded.append(dataclasses.replace(
                item, supervised=item.supervised & (np.arange(len(item.input_ids)) >= same)))
            numbers.append(number)
    rows = training_arrays(encoded, np.zeros(len(encoded)), *training_length(encoded))
    del rows["has_image"]  # the losses alone read it
    return rows | {"prompt": np.asarray(numbers, np.int32)}


def clients_with_answers(model: PretrainedModel, tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample],
                         data: DataConfig, clients: Sequence[ClientData]) -> list[ClientData]:
    """Returns the clients that `build_clients` made of the samples, with `answered` in all of their prompts.

    Raises:
        InputError: see `with_answers`.
    """
    of: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        of.setdefault((sample.client, sample.split), []).append(sample)
    return [dataclasses.replace(client, evaluation={
        split: with_answers(model, tokenizer, of[client.name, split], data, prompts)
        for split, prompts in client.evaluation.items()}) for client in clients]


def encode_sample(model: PretrainedModel, tokenizer: PreTrainedTokenizerFast, sample: Sample,
                  data: DataConfig) -> Encoded:
    """Returns a conversation's token ids with its answers marked, cut to `data.max_length`.

    Raises:
        InputError: the limit would cut an image, or leave the sample without an answer token, or a token is not one of
            the model's, or the template cannot form the conversation.
    """
    item = _encode(model, tokenizer, sample, sample.turns, data, data.max_length)
    if not item.supervised.any():
        raise InputError(f"{sample.source}: no answer token within data.max_length ({data.max_length}). "
                         "Shorten the sample or raise the limit.")
    return item


def encode_samples(model: PretrainedModel, tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample],
                   data: DataConfig) -> list[Encoded]:
    """Returns each conversation's token ids with its answers marked, cut to `data.max_length`.

    A warning is logged that says how many answers were cut.

    Raises:
        InputError: see `encode_sample`; or a sample has an image, which the model does not take.
    """
    refuse_images(samples, model.config.vision is not None)

    def computed() -> dict[str, np.ndarray]:
        items = [encode_sample(model, tokenizer, sample, data) for sample in samples]
        return {"ids": _joined([item.input_ids for item in items]),
                "supervised": _joined([item.supervised for item in items]),
                "lengths": np.asarray([len(item.input_ids) for item in items], np.int64),
                "cut": np.asarray([item.cut for item in items], np.int64)}

    found = remembered_by(tokenizer, _key("samples", model, samples, data), AS_ARRAYS, computed)
    ids, supervised = (_split(found[name], found["lengths"]) for name in ("ids", "supervised"))
    encoded = list(map(Encoded, ids, supervised, found["cut"].tolist()))
    cut = [sample.source for sample, item in zip(samples, encoded, strict=True) if item.cut]
    if cut:
        logger.warning("data.max_length: %d cuts the answers of %d of %d samples (first: %s).", data.max_length,
                       len(cut), len(samples), cut[0])
    return encoded


def build_clients(model: PretrainedModel, tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample],
                  data: DataConfig, length_spread: float, folder: Path | None = None, kept: Cache | None = None,
                  elsewhere: Mapping[str, tuple[int, int]] | None = None) -> list[ClientData]:
    """Returns every client's data, ordered by the clients' names. No image is read yet.

    Clients with samples of similar lengths share L and A, so that few programs train all of them, with little padding.

    Args:
        length_spread: see `bucket_shapes`.
        folder: the folder in which the training arrays and the features are stored; None: in memory.
        kept: a cache in which features are looked up before they are computed, and kept.
        elsewhere: (L, A) of clients whose data are on other machines, so that arrays have the shapes that they would
            have with all data in one place.

    Raises:
        InputError: a client has no training sample or several tasks, or a sample is too long or has no answer token.
    """
    samples = sorted(samples, key=lambda s: (s.client, s.split))  # each client's split is one slice of the features
    rows_by_client = _rows_by_client(samples)
    is_train = [sample.split == "train" for sample in samples]
    train_rows = [i for i, train in enumerate(is_train) if train]
    prompt_rows = [i for i, train in enumerate(is_train) if not train]
    encoded = dict(zip(train_rows, encode_samples(model, tokenizer, [samples[i] for i in train_rows], data),
                       strict=True))
    prompts = dict(zip(prompt_rows, encode_prompts(model, tokenizer, [samples[i] for i in prompt_rows], data),
                       strict=True))
    features = Features(model, samples, data, None if folder is None else folder / "features", kept,
                        LEAST_ON_DEVICE)
    prompt_length = round_up(max((len(ids) for ids in prompts.values()), default=8), 8)
    longest = {name: training_length([encoded[i] for i in rows if is_train[i]])
               for name, rows in rows_by_client.items()}
    shapes = bucket_shapes({**(elsewhere or {}), **longest}, length_spread)
    clients = []
    for name, rows in rows_by_client.items():
        own = [i for i in rows if is_train[i]]
        has_image = np.asarray([samples[i].image is not None for i in own])
        train: dict[str, Any] = training_arrays([encoded.pop(i) for i in own], has_image, *shapes[name])
        if folder is not None:
            length, answers = shapes[name]
            train = {key: append_rows(folder / f"{key}-{length}-{answers}", array) for key, array in train.items()}
        train["features"] = features.rows(own)
        clients.append(ClientData(name, samples[own[0]].task, train,
                                  _evaluation_prompts(samples, rows, prompts, features, prompt_length)))
    return clients


def _rows_by_client(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Returns the indices of each client's samples, in the order of `samples`.

    Raises:
        InputError: a client has several tasks, or no training sample.
    """
    for fault in client_faults(samples):
        raise InputError(fault)
    rows_by_client: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        rows_by_client.setdefault(sample.client, []).append(i)
    return rows_by_client


def _evaluation_prompts(samples: Sequence[Sample], rows: Sequence[int], prompts: Mapping[int, np.ndarray],
                        features: Features, length: int) -> dict[str, Prompts]:
    """Returns the prompts of each held-out split of a client, whose samples are `rows`; empty splits are left out."""
    out = {}
    for split in ("validation", "test"):
        if own := [i for i in rows if samples[i].split == split]:
            out[split] = build_prompts([samples[i] for i in own], [prompts[i] for i in own], features.rows(own), length)
    return out
