"""Scores models in the way that `eval.scoring` names: by the answers that they decode, or by teacher forcing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from pilot_jax.evaluation.answers import Decoder, Examinee, answers
from pilot_jax.evaluation.metrics import METRICS
from pilot_jax.evaluation.teacher_forced import teacher_forced
from pilot_jax.models.pretrained import PretrainedModel


@dataclasses.dataclass(frozen=True)
class Result:
    """A model's result on its prompts."""

    score: float
    token_accuracy: float | None = None  # mean over prompts of the share of right tokens; None if answers are decoded


def results(model: PretrainedModel, decoder: Decoder, examinees: Sequence[Examinee], metrics: Mapping[str, str],
            width: int, scoring: str = "generate") -> list[Result]:
    """Returns the result of each examinee, scored by its task's metric, exact match if `metrics` has none for the task.

    Args:
        width: number of models that run at once.
        scoring: `EvalConfig.scoring`; with "teacher_forced", the metric of all tasks is exact match.
    """
    if scoring == "teacher_forced":
        return [Result(float(one.exact.mean()), float(one.tokens.mean()))
                for one in teacher_forced(model, examinees, width, decoder.batch_size)]
    texts = answers(model, decoder, examinees, width)
    return [Result(METRICS[metrics.get(e.task, "exact")](got, e.prompts.references))
            for e, got in zip(examinees, texts, strict=True)]
