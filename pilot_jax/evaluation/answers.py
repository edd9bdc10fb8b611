"""Every client's own model answers prompts: batched decoding of several models at once."""

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
from pilot_jax.models.pretrained import PretrainedModel
from pilot_jax.parallel.mesh import mesh_of
from pilot_jax.parallel.processes import here, over_clients, to_host


@dataclasses.dataclass(frozen=True)
class Examinee:
    """One client's model and the prompts it must answer. `adapters` hold just what `stage` uses."""

    adapters: dict[str, Any]
    stage: str  # plain | stage1 | stage2
    task_index: int
    task: str
    prompts: Prompts


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How a model's tokens are chosen, and what turns them into text."""

    tokenizer: Any
    how: Decoding
    batch_size: int
    seed: int = 0

    def text(self, tokens: np.ndarray) -> str:
        """The tokens before the first stop token, as text."""
        ends = np.flatnonzero(np.isin(tokens, self.how.stop_ids))
        tokens = tokens[:ends[0]] if len(ends) else tokens
        return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True).strip()


def make_decoder(tokenizer: Any, template: str, config: EvalConfig, seed: int = 0) -> Decoder:
    """As `eval` asks: answers end where `template` ends them."""
    how = Decoding(config.max_new_tokens, stop_tokens(tokenizer, template), config.temperature, config.top_p)
    return Decoder(tokenizer, how, config.batch_size, seed)


def _answers_of_group(model: PretrainedModel, decoder: Decoder, group: list[Examinee], width: int) -> list[list[str]]:
    """Answers of examinees that share a stage, `width` models at a time; short groups are padded by repetition."""
    out: list[list[str]] = []
    mesh = mesh_of(model.base)
    on_this_process = here(mesh, width)  # only these prompts are read
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
            # A prompt's randomness depends on its place among its client's prompts, not on who is decoded beside it.
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
    """Array `name` of the prompts number `take` of every model, [width, len(take), …].

    A model with fewer prompts gets its last one again. Zeros stand for models that do not lie on this process's
    devices, and for those that only fill up the width.
    """
    first = getattr(examinees[0].prompts, name)
    out = np.zeros((len(on_this_process), len(take), *first.shape[1:]), first.dtype)
    if name == "attention_mask":
        out[len(examinees):, :, 0] = 1  # so that models that fill up the width give finite numbers
    for k, examinee in enumerate(examinees):
        if on_this_process[k]:
            out[k] = getattr(examinee.prompts, name)[np.minimum(take, len(examinee.prompts.references) - 1)]
    return out


def answers(model: PretrainedModel, decoder: Decoder, examinees: list[Examinee], width: int) -> list[list[str]]:
    """Every examinee's answers to its prompts, in order.

    Args:
        width: models that are decoded at once, over the `clients` axis of the mesh on which the base lies.
    """
    out: list[list[str]] = [[] for _ in examinees]
    kinds = [(e.stage, *sorted(e.adapters)) for e in examinees]  # the base has no LoRA, and is "plain" as FedAvg's are
    for kind in sorted(set(kinds)):
        indices = [i for i, own in enumerate(kinds) if own == kind]
        group = [examinees[i] for i in indices]
        for i, texts in zip(indices, _answers_of_group(model, decoder, group, width), strict=True):
            out[i] = texts
    return out


def scores(model: PretrainedModel, decoder: Decoder, examinees: list[Examinee], metrics: Mapping[str, str],
           width: int) -> list[float]:
    """Score of each examinee, by its task's metric (exact match where `metrics` names none)."""
    texts = answers(model, decoder, examinees, width)
    return [METRICS[metrics.get(e.task, "exact")](got, e.prompts.references)
            for e, got in zip(examinees, texts, strict=True)]


def base_examinee(model: PretrainedModel, task: str, prompts: Prompts) -> Examinee:
    """The untouched base model."""
    return Examinee({"projector": model.base["projector"]}, "plain", 0, task, prompts)
