"""Scores models by teacher forcing: whether they would decode the reference answers greedily, without decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from pilot_jax.data.arrays import Answered, Prompts, lengthened
from pilot_jax.data.features import FeatureRows
from pilot_jax.errors import InputError
from pilot_jax.evaluation.answers import Examinee, in_batches
from pilot_jax.models.pretrained import PretrainedModel
from pilot_jax.models.vlm import Vlm, variables
from pilot_jax.programs import KeptJit


@dataclasses.dataclass(frozen=True)
class Forced:
    """A model's results on n prompts, each the best over the prompt's references."""

    exact: np.ndarray  # bool [n]: whether greedy decoding gives a reference, its end token included
    tokens: np.ndarray  # float32 [n]: share of a reference's tokens that are the most probable ones


@partial(KeptJit, static=("module", "stage"))
def right_tokens(module: Vlm, base: Mapping[str, PyTree], adapters: Mapping[str, PyTree], rows: Mapping[str, jax.Array],
                 task_index: jax.Array, *, stage: str) -> tuple[jax.Array, jax.Array]:
    """Returns whether a row's targets are all the most probable tokens, bool [K, B], and the share that are, float32.

    K models share one base. Logits are computed at the target positions only.

    Args:
        adapters: leaves [K, …].
        rows: the arrays of `Answered.rows`, [K, B, …], and features [K, B, N, D].
        task_index: int32 [K], each model's own task, for the connector.
        stage: the connector's stage: "plain", "stage1" or "stage2".
    """
    def one(own: PyTree, batch: Mapping[str, jax.Array], task: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, _ = module.apply(variables(base, own), batch, stage, task, method="target_logits")
        right, weights = jnp.argmax(logits, axis=-1) == batch["target_ids"], batch["target_weights"]
        share = jnp.sum(right * weights, axis=-1) / jnp.maximum(jnp.sum(weights, axis=-1), 1)
        return jnp.all(right | (weights == 0), axis=-1), share

    return jax.vmap(one)(adapters, rows, task_index)


def teacher_forced(model: PretrainedModel, examinees: Sequence[Examinee], width: int, batch_size: int) -> list[Forced]:
    """Returns every examinee's results on its prompts, which must have `answered`.

    Args:
        width: number of models that run at once, over the `clients` axis of the base model's mesh.
        batch_size: number of rows of a model that run at once.
    """
    answered = [_answered(one.prompts) for one in examinees]
    longest = [max(one.rows[name].shape[1] for one in answered) for name in ("input_ids", "target_ids")]
    rows = [lengthened(own.rows, *longest) | {"features": _features(one.prompts, own.prompt)}
            for one, own in zip(examinees, answered, strict=True)]
    module = model.module.clone(kernel="own")  # as decoding does; others are for training alone

    def program(stage: str, adapters: PyTree, batch: Mapping[str, jax.Array], tasks: jax.Array, _: np.ndarray) -> Any:
        return right_tokens(module, model.base, adapters, batch, tasks, stage=stage)

    found = in_batches(model, examinees, rows, program, width, batch_size)
    return [Forced(*(_best(values, own.prompt) for values in pair)) for pair, own in zip(found, answered, strict=True)]


def _answered(prompts: Prompts) -> Answered:
    if prompts.answered is None:
        raise ValueError("The prompts have no `answered`: see `data.build.with_answers`.")
    return prompts.answered


def _features(prompts: Prompts, rows: np.ndarray) -> np.ndarray | FeatureRows:
    features = prompts.features
    return features.take(rows) if isinstance(features, FeatureRows) else features[rows]


def _best(values: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """Returns the largest of the values [m] of each prompt, [n]; `prompt` is `Answered.prompt`."""
    return np.maximum.reduceat(values, np.flatnonzero(np.diff(prompt, prepend=-1)))


def check_scoring(scoring: str, metrics: Mapping[str, str], tasks: Sequence[str]) -> None:
    """Checks, before anything is trained, that every task has a metric that `eval.scoring` can compute.

    Raises:
        InputError: a task has another metric than exact, and nothing is decoded.
    """
    for task in tasks if scoring == "teacher_forced" else ():
        if (metric := metrics.get(task, "exact")) != "exact":
            raise InputError(f"eval.metrics: {task} has {metric}, but eval.scoring: teacher_forced decodes no text and "
                             f"computes exact alone. Set eval.metrics: {{{task}: exact}}, or eval.scoring: generate.")
