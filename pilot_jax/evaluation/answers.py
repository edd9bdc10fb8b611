"""Decodes the answers of several clients' models to their prompts at once, in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pilot_jax.config import EvalConfig
from pilot_jax.data.arrays import Prompts
from pilot_jax.data.conversations import stop_tokens
from pilot_jax.data.features import compute_features
from pilot_jax.evaluation.metrics import METRICS
from pilot_jax.models.generate import Decoding, generate
from pilot_jax.models.pretrained import PretrainedModel, plain_connector
from pilot_jax.parallel.mesh import mesh_of
from pilot_jax.parallel.processes import is_on_this_process, over_clients, to_host


@dataclasses.dataclass(frozen=True)
class Examinee:
    """One client's model and the prompts that it must answer."""

    adapters: dict[str, Any]  # only the subtrees that the model reads in `stage`
    stage: str  # plain | stage1 | stage2
    task_index: int
    task: str
    prompts: Prompts


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The tokenizer and the settings with which answers are decoded."""

    tokenizer: Any
    how: Decoding
    batch_size: int
    seed: int = 0

    def text(self, tokens: np.ndarray) -> str:
        """Returns the tokens before the first stop token as text."""
        ends = np.flatnonzero(np.isin(tokens, self.how.stop_ids))
        tokens = tokens[:ends[0]] if len(ends) else tokens
        return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True).strip()


def make_decoder(tokenizer: Any, template: str, config: EvalConfig, seed: int = 0) -> Decoder:
    """Returns a decoder with the settings of the section `eval`; answers end at the stop token of `template`."""
    how = Decoding(config.max_new_tokens, stop_tokens(tokenizer, template), config.temperature, config.top_p)
    return Decoder(tokenizer, how, config.batch_size, seed)


def _answers_of_group(model: PretrainedModel, decoder: Decoder, group: list[Examinee], width: int) -> list[list[str]]:
    """Returns the answers of examinees of the same stage, `width` models at a time.

    The last models are padded to `width` by repeating one of them, and a model's last prompt is repeated likewise."""
    out: list[list[str]] = []
    mesh = mesh_of(model.base)
    on_this_process = is_on_this_process(mesh, width)  # only these prompts are read
    compute_features([e.prompts.features for e in group], width)
    for start in range(0, len(group), width):
        members = group[start:start + width]
        padded = members + members[:1] * (width - len(members))
        adapters = over_clients(jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]),
                                             *[e.adapters for e in padded]), mesh)
        tasks = over_clients(np.asarray([e.task_index for e in padded], np.int32), mesh)
        longest = max(len(e.prompts.references) for e in members)
        rows: list[list[str]] = [[] for _ in members]
        rows_at_once = min(decoder.batch_size, longest)
        for first in range(0, longest, rows_at_once):
            take = np.arange(first, first + rows_at_once)
            batch = over_clients({name: _prompts(name, members, on_this_process, take)
                                  for name in ("input_ids", "attention_mask", "features")}, mesh)
            # The random key depends on the prompt's index only, not on the models that are decoded at the same time.
            keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(decoder.seed)))(take)
            prompts = batch | {"keys": jnp.broadcast_to(keys, (width, len(take)))}
            tokens = to_host(generate(model.module, model.base, adapters, prompts, tasks, stage=members[0].stage,
                                      how=decoder.how))
            for k, examinee in enumerate(members):
                rows[k] += [decoder.text(t)
                            for t, i in zip(tokens[k], take, strict=True) if i < len(examinee.prompts.references)]
        out += rows
    return out


def _prompts(name: str, examinees: list[Examinee], on_this_process: list[bool], take: np.ndarray) -> np.ndarray:
    """Returns the array `name` of the prompts with the indices `take` of every model, [width, len(take), …].

    The last prompt of a model with fewer prompts is repeated. Rows of models that are not on this process's devices,
    or that only fill up the width, are zeros.
    """
    first = getattr(examinees[0].prompts, name)
    out = np.zeros((len(on_this_process), len(take), *first.shape[1:]), first.dtype)
    if name == "attention_mask":
        out[len(examinees):, :, 0] = 1  # so that rows that only fill up the width have finite results
    for k, examinee in enumerate(examinees):
        if on_this_process[k]:
            out[k] = getattr(examinee.prompts, name)[np.minimum(take, len(examinee.prompts.references) - 1)]
    return out


def answers(model: PretrainedModel, decoder: Decoder, examinees: list[Examinee], width: int) -> list[list[str]]:
    """Returns every examinee's answers to its prompts, in order.

    Args:
        width: number of models that are decoded at once, over the `clients` axis of the base model's mesh.
    """
    out: list[list[str]] = [[] for _ in examinees]
    kinds = [(e.stage, *sorted(e.adapters)) for e in examinees]  # "plain" is FedAvg's stage and also the base model's
    for kind in sorted(set(kinds)):
        indices = [i for i, own in enumerate(kinds) if own == kind]
        group = [examinees[i] for i in indices]
        for i, texts in zip(indices, _answers_of_group(model, decoder, group, width), strict=True):
            out[i] = texts
    return out


def scores(model: PretrainedModel, decoder: Decoder, examinees: list[Examinee], metrics: Mapping[str, str],
           width: int) -> list[float]:
    """Returns the score of each examinee, by its task's metric (exact match if `metrics` has none for the task)."""
    texts = answers(model, decoder, examinees, width)
    return [METRICS[metrics.get(e.task, "exact")](got, e.prompts.references)
            for e, got in zip(examinees, texts, strict=True)]


def base_examinee(model: PretrainedModel, task: str, prompts: Prompts) -> Examinee:
    """Returns the base model without training, with prompts to answer."""
    return Examinee(plain_connector(model.base), "plain", 0, task, prompts)
