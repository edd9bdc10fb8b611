"""Scores the models with which a run ends: the common one, each client's own, and each client's after fine-tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pilot_jax.data.guesses import GUESSES, guesses
from pilot_jax.data.llava.sample import Sample
from pilot_jax.evaluation.finetune import Finetuned, common_models
from pilot_jax.evaluation.metrics import scored
from pilot_jax.evaluation.personalised import Evaluation, mean_score, results_together, score_by_task
from pilot_jax.evaluation.results import Result
from pilot_jax.federation.state import Population, State

ByClient = dict[str, float]  # score of each client that has samples of the split, by name


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores on the clients' own held-out data."""

    common: ByClient | None  # of the server's current model; None where clients have parts of their own
    own: ByClient  # of the clients' final models, which the run saves
    finetuned: ByClient | None  # of the clients' models after fine-tuning; None without it
    token_accuracy: ByClient | None = None  # of the clients' final models; None if answers are decoded
    by_kind: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)  # of these, by client and kind


def final_scores(evaluations: Sequence[Evaluation], states: Sequence[State], tuned: Sequence[Finetuned | None],
                 split: str = "test") -> list[Scores]:
    """Returns the scores of several federations of the same base, whose models run together.

    Args:
        states: after the last round.
        tuned: the results of `finetune` from these states.
    """
    asked: list[tuple[Evaluation, Population]] = []
    places = [_ask(asked, *one) for one in zip(evaluations, states, tuned, strict=True)]
    found = results_together([one for one, _ in asked], [models for _, models in asked], split) if asked else []
    return [_scores(*(None if place is None else found[place] for place in three)) for three in places]


def _scores(common: Mapping[str, Result] | None, own: Mapping[str, Result] | None,
            finetuned: Mapping[str, Result] | None) -> Scores:
    of = [None if found is None else {name: one.score for name, one in found.items()}
          for found in (common, own, finetuned)]
    shares = {name: one.token_accuracy for name, one in (own or {}).items() if one.token_accuracy is not None}
    return Scores(of[0], of[1] or {}, of[2], shares or None, {name: one.by_kind for name, one in (own or {}).items()})


def _ask(asked: list[tuple[Evaluation, Population]], evaluation: Evaluation, state: State,
         tuned: Finetuned | None) -> tuple[int | None, int, int | None]:
    """Appends the models of a federation that are to be scored, each of them once, to `asked`.

    Returns: where its common models, the clients' own and the fine-tuned ones are in `asked`."""
    keeps_tuned, first = tuned is not None and evaluation.fed.strategy.finetunes, len(asked)
    if not keeps_tuned:
        asked.append((evaluation, state.population))
    common = common_models(evaluation.fed, state)
    if common is None:
        in_common = None
    elif not keeps_tuned and all(a is b for a, b in zip(common, state.population, strict=True)):
        in_common = first  # every client has the server's current model
    else:
        in_common = len(asked)
        asked.append((evaluation, common))
    if tuned is None:
        return in_common, first, None
    asked.append((dataclasses.replace(evaluation, fed=tuned.fed, model_of_client=tuple(range(len(tuned.population)))),
                  tuned.population))
    after = len(asked) - 1
    return in_common, after if keeps_tuned else first, after


def score_keys(evaluation: Evaluation, name: str, by_client: Mapping[str, float] | None,
               mean: str | None = None) -> dict[str, Any]:
    """Returns a score as `summary.json` has it: the mean over clients under the key `mean` (default: `name`), by task
    and by client; three times None if there is no score."""
    return {mean or name: None if by_client is None else mean_score(list(by_client.values())),
            f"{name}_by_task": None if by_client is None else score_by_task(evaluation, by_client),
            f"{name}_by_client": None if by_client is None else dict(by_client)}


def score_record(evaluation: Evaluation, scores: Scores) -> dict[str, Any]:
    """Returns the scores of a federation as `summary.json` has them."""
    return {**score_keys(evaluation, "score", scores.own, "score_mean"),
            **score_keys(evaluation, "score_common", scores.common),
            **score_keys(evaluation, "score_finetuned", scores.finetuned),
            **score_keys(evaluation, "token_accuracy", scores.token_accuracy),
            "score_by_kind": score_by_kind(evaluation, scores.by_kind)}


def score_by_kind(evaluation: Evaluation, by_client: Mapping[str, Mapping[str, float]],
                  ) -> dict[str, dict[str, float]] | None:
    """Returns, for each task and each kind of question in it, the mean score over the clients that have this kind.

    Args:
        by_client: score by client and kind.

    Returns: None if no sample has a kind."""
    out: dict[str, dict[str, float]] = {}
    for task in evaluation.fed.tasks:
        own = [by_client[c.name] for c in evaluation.clients if c.task == task and c.name in by_client]
        if kinds := sorted({kind for scores in own for kind in scores}):
            out[task] = {kind: float(np.mean([scores[kind] for scores in own if kind in scores])) for kind in kinds}
    return out or None


def guessed_scores(samples: Sequence[Sample], metrics: Mapping[str, str], split: str) -> dict[str, dict[str, float]]:
    """Returns the scores of each kind of guess in `data.guesses.guesses`, by client.

    Args:
        metrics: the metric of a task; exact match for a task without one.
    """
    found = guesses(samples, split)
    return {way: {client: scored(metrics.get(own[0][0].task, "exact"), [guess[way] for _, guess in own],
                                 [sample.references for sample, _ in own]) for client, own in sorted(found.items())}
            for way in GUESSES}
