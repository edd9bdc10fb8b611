"""Personalised evaluation: each client's own model answers its own held-out prompts."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pilot_jax.config import EvalConfig
from pilot_jax.data.batches import Prompts
from pilot_jax.evaluation.scores import METRICS
from pilot_jax.models.generate import greedy
from pilot_jax.models.pretrained import PretrainedModel


@dataclasses.dataclass(frozen=True)
class Examinee:
    """One client's model and the prompts it must answer. `adapters` hold just what `stage` uses."""

    adapters: dict[str, Any]
    stage: str  # plain | stage1 | stage2
    task_index: int
    task: str
    prompts: Prompts


def decode_text(tokenizer, tokens: np.ndarray) -> str:
    tokens = tokens.tolist()
    if tokenizer.eos_token_id in tokens:
        tokens = tokens[:tokens.index(tokenizer.eos_token_id)]
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


def _answers_of_group(model: PretrainedModel, tokenizer, group: list[Examinee], config: EvalConfig,
                      width: int) -> list[list[str]]:
    """Answers of examinees that share a stage, `width` models at a time; short groups are padded by repetition."""
    out: list[list[str]] = []
    for start in range(0, len(group), width):
        members = group[start:start + width]
        padded = members + members[:1] * (width - len(members))
        adapters = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves]),
                                *[e.adapters for e in padded])
        tasks = jnp.asarray([e.task_index for e in padded], jnp.int32)
        longest = max(len(e.prompts.answers) for e in members)
        rows: list[list[str]] = [[] for _ in members]
        for first in range(0, longest, config.batch_size):
            take = np.arange(first, first + config.batch_size)
            batch = {
                name: jnp.asarray(np.stack([getattr(e.prompts, name)[np.minimum(take, len(e.prompts.answers) - 1)]
                                            for e in padded]))
                for name in ("input_ids", "attention_mask", "features")}
            tokens = np.asarray(greedy(model.module, model.base, adapters, batch, tasks, stage=members[0].stage,
                                       max_new_tokens=config.max_new_tokens, eos_id=tokenizer.eos_token_id))
            for k, examinee in enumerate(members):
                rows[k] += [decode_text(tokenizer, t)
                            for t, i in zip(tokens[k], take, strict=True) if i < len(examinee.prompts.answers)]
        out += rows
    return out


def answers(model: PretrainedModel, tokenizer, examinees: list[Examinee], config: EvalConfig,
            width: int) -> list[list[str]]:
    """Every examinee's answers to its prompts, in order. Greedy; `width` models are decoded at once."""
    out: list[list[str]] = [[] for _ in examinees]
    for stage in sorted({e.stage for e in examinees}):
        indices = [i for i, e in enumerate(examinees) if e.stage == stage]
        group = [examinees[i] for i in indices]
        for i, texts in zip(indices, _answers_of_group(model, tokenizer, group, config, width), strict=True):
            out[i] = texts
    return out


def scores(model: PretrainedModel, tokenizer, examinees: list[Examinee], config: EvalConfig,
           width: int) -> list[float]:
    """Mean score of each examinee, by its task's metric."""
    texts = answers(model, tokenizer, examinees, config, width)
    return [float(np.mean([METRICS[config.metrics.get(e.task, "exact")](a, r)
                           for a, r in zip(got, e.prompts.answers, strict=True)]))
            for e, got in zip(examinees, texts, strict=True)]


def base_examinee(model: PretrainedModel, task: str, prompts: Prompts) -> Examinee:
    """The untouched base model."""
    return Examinee({"projector": model.base["projector"]}, "plain", 0, task, prompts)
