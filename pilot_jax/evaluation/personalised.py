"""Evaluates personalised models on their own data, on all clients' data, and on what the base model was trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pilot_jax.config import DataConfig
from pilot_jax.data.arrays import ClientData, Prompts
from pilot_jax.data.build import build_prompts, encode_prompts, with_answers
from pilot_jax.data.features import image_features
from pilot_jax.embedded.scenarios import pretraining_samples
from pilot_jax.errors import InputError
from pilot_jax.evaluation.answers import Decoder, Examinee, base_examinee
from pilot_jax.evaluation.results import Result, results
from pilot_jax.federation.roles import Tree
from pilot_jax.federation.state import AnyState, ClientState, Federation, Population
from pilot_jax.models.connector import connector_stage

AT_ONCE = 128  # models whose adapters and prompts are in memory at the same time


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The clients on whose data models are scored, which model answers for each, and how answers are scored."""

    fed: Federation
    clients: tuple[ClientData, ...]  # the K clients with held-out data; also if the federation pools them into one
    model_of_client: tuple[int, ...]  # [K], index of the federation's client whose model answers
    decoder: Decoder
    metrics: Mapping[str, str]  # metric by task; exact match for a task without one
    width: int  # number of models that run at once
    data: DataConfig  # has the template and the limits of prompts
    embedded_base: bool = False  # whether the base is the embedded one, which was trained to caption digit scenes
    scoring: str = "generate"  # `eval.scoring`; with "teacher_forced", all prompts have `answered`


def used_adapters(fed: Federation, state: AnyState) -> dict[str, Tree]:
    """Returns the subtrees that a client's model reads: those that are trained or frozen in the state's stage."""
    return fed.strategy.ownership().read_by_model(state.adapters, state.stage)


def examinee(fed: Federation, index: int, state: AnyState, prompts: Prompts, task: str) -> Examinee:
    """Returns the personalised model of client `index`, with prompts to answer; `task` decides the metric.

    The model has the adapters that the client last received and its local ones. Without training it is the base."""
    if state.stage == "none":
        return base_examinee(fed.model, task, prompts)
    return Examinee(used_adapters(fed, state), connector_stage(state.stage), fed.task_index(index), task, prompts)


def evaluate(evaluation: Evaluation, population: Population | None, split: str = "test") -> dict[str, float]:
    """Returns the score of each client that has `split` samples, by name; with `population` None, of the base model."""
    return evaluate_together([evaluation], [population], split)[0]


def evaluate_together(evaluations: Sequence[Evaluation], populations: Sequence[Population | None],
                      split: str = "test") -> list[dict[str, float]]:
    """Returns what `evaluate` returns, for several federations of the same base, whose models run together."""
    return [{name: one.score for name, one in found.items()}
            for found in results_together(evaluations, populations, split)]


def results_together(evaluations: Sequence[Evaluation], populations: Sequence[Population | None],
                     split: str = "test") -> list[dict[str, Result]]:
    """Returns the result of each client that has `split` samples, by name, for several federations of the same base."""
    pairs = [(number, i) for number, one in enumerate(evaluations) for i, c in enumerate(one.clients)
             if split in c.evaluation]
    out: list[dict[str, Result]] = [{} for _ in evaluations]
    for first in range(0, len(pairs), AT_ONCE):  # limits the memory, since adapters and prompts may be on disk
        block = pairs[first:first + AT_ONCE]
        examinees = []
        for number, i in block:
            one, population = evaluations[number], populations[number]
            model, client = one.model_of_client[i], one.clients[i]
            state = population[model] if population is not None else ClientState({})
            examinees.append(examinee(one.fed, model, state, client.evaluation[split], client.task))
        for (number, i), value in zip(block, _results(evaluations[0], examinees), strict=True):
            out[number][evaluations[number].clients[i].name] = value
    return out


def _results(evaluation: Evaluation, examinees: list[Examinee]) -> list[Result]:
    return results(evaluation.fed.model, evaluation.decoder, examinees, evaluation.metrics, evaluation.width,
                   evaluation.scoring)


def _scores(evaluation: Evaluation, examinees: list[Examinee]) -> list[float]:
    return [one.score for one in _results(evaluation, examinees)]


def mean_score(values: Sequence[float]) -> float | None:
    """Returns the mean, or None if there are no values."""
    return float(np.mean(values)) if len(values) else None


def score_by_task(evaluation: Evaluation, by_client: Mapping[str, float]) -> dict[str, float | None]:
    """Returns the mean score of each task over its clients with a score; None for a task without any."""
    return {t: mean_score([by_client[c.name] for c in evaluation.clients if c.task == t and c.name in by_client])
            for t in evaluation.fed.tasks}


def first_prompts(prompts: Prompts, count: int | None) -> Prompts:
    """Returns the first `count` prompts; all of them with None."""
    return prompts if count is None else prompts.first(count)


def score_matrix(evaluation: Evaluation, population: Population, split: str = "test",
                 count: int | None = None) -> np.ndarray:
    """Returns scores [K, K] of each client's model (row) on each client's `split` samples (column), by their metric.

    Only the first `count` samples of each client are used; all with None. The column of a client that has none
    is nan.

    Raises:
        InputError: no client has samples of this split.
    """
    fed, clients = evaluation.fed, evaluation.clients
    having = [i for i, c in enumerate(clients) if split in c.evaluation]
    if not having:
        raise InputError(f"data.path: no client has {split} samples. Name their split, or train another run with "
                         f"data.hold_out.{split}.")
    examinees = []
    for model in evaluation.model_of_client:
        examinees += [examinee(fed, model, population[model], first_prompts(clients[i].evaluation[split], count),
                               clients[i].task) for i in having]
    out = np.full((len(clients), len(clients)), np.nan)
    out[:, having] = np.asarray(_scores(evaluation, examinees)).reshape(len(clients), -1)
    return out


def base_prompts(evaluation: Evaluation, count: int) -> Prompts:
    """Returns prompts of the embedded base's own training task, brief captions, with digits of the test pool."""
    model, data = evaluation.fed.model, evaluation.data
    samples = pretraining_samples(count, data.digits.seed)
    encoded = encode_prompts(model, evaluation.decoder.tokenizer, samples, data)
    prompts = build_prompts(samples, encoded, image_features(model, samples, data))
    if evaluation.scoring == "teacher_forced":
        prompts = with_answers(model, evaluation.decoder.tokenizer, samples, data, prompts)
    return prompts


def forgetting(evaluations: Sequence[Evaluation], populations: Sequence[Population | None],
               prompts: Sequence[Prompts]) -> list[list[float]]:
    """Returns the exact-match score of every client's model on `base_prompts`, by federation.

    With a `population` of None, a federation's only score is that of the base model."""
    examinees, counts = [], []
    for one, population, own in zip(evaluations, populations, prompts, strict=True):
        states = [ClientState({})] if population is None else list(population)
        examinees += [examinee(one.fed, i, state, own, "base") for i, state in enumerate(states)]
        counts.append(len(states))
    values = _scores(evaluations[0], examinees)
    return [values[sum(counts[:i]):sum(counts[:i + 1])] for i in range(len(counts))]


def evaluation_matrix(evaluation: Evaluation, population: Population, split: str = "test",
                      count: int | None = None) -> dict[str, Any]:
    """Returns `score_matrix`, its means by task and, with the embedded base, the scores on `base_prompts`.

    A score is None where a client, or all clients of a task, have no samples of the split."""
    matrix, clients = score_matrix(evaluation, population, split, count), evaluation.clients
    columns = {t: [i for i, c in enumerate(clients) if c.task == t and split in c.evaluation]
               for t in evaluation.fed.tasks}
    names, captions = [c.name for c in clients], None
    if evaluation.embedded_base:
        prompts = base_prompts(evaluation, count or 48)
        own, base = forgetting([evaluation, evaluation], [population, None], [prompts, prompts])
        captions = {"base": base[0], "clients": [own[model] for model in evaluation.model_of_client]}
    return {"split": split, "clients": names, "tasks": list(evaluation.fed.tasks),
            "scores": [[None if np.isnan(value) else value for value in row] for row in matrix.tolist()],
            "by_task": {name: {t: mean_score(row[of].tolist()) for t, of in columns.items()}
                        for name, row in zip(names, matrix, strict=True)}, "base_captions": captions}
