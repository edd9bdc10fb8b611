"""Scores models in the way that `eval.scoring` names: by the answers that they decode, or by teacher forcing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from pilot_jax.data.arrays import Prompts
from pilot_jax.evaluation.answers import Decoder, Examinee, answers
from pilot_jax.evaluation.metrics import scored
from pilot_jax.evaluation.teacher_forced import teacher_forced
from pilot_jax.models.pretrained import PretrainedModel


@dataclasses.dataclass(frozen=True)
class Result:
    """A model's result on its prompts."""

    score: float
    token_accuracy: float | None = None  # mean over prompts of the share of right tokens; None if answers are decoded
    by_kind: Mapping[str, float] = dataclasses.field(default_factory=dict)  # score of the prompts of each kind


def results(model: PretrainedModel, decoder: Decoder, examinees: Sequence[Examinee], metrics: Mapping[str, str],
            width: int, scoring: str = "generate") -> list[Result]:
    """Returns the result of each examinee, scored by its task's metric, exact match if `metrics` has none for the task.

    Args:
        width: number of models that run at once.
        scoring: `EvalConfig.scoring`; with "teacher_forced", the metric of all tasks is exact match.
    """
    if scoring == "teacher_forced":
        forced = teacher_forced(model, examinees, width, decoder.batch_size)
        return [Result(float(one.exact.mean()), float(one.tokens.mean()), {
            kind: float(one.exact[rows].mean()) for kind, rows in rows_of_kinds(e.prompts.kinds).items()})
                for e, one in zip(examinees, forced, strict=True)]
    texts = answers(model, decoder, examinees, width)
    return [_of_texts(metrics.get(e.task, "exact"), got, e.prompts)
            for e, got in zip(examinees, texts, strict=True)]


def _of_texts(metric: str, texts: Sequence[str], prompts: Prompts) -> Result:
    def score(rows: Sequence[int]) -> float:
        return scored(metric, [texts[i] for i in rows], [prompts.references[i] for i in rows])

    return Result(score(range(len(texts))), by_kind={
        kind: score(rows) for kind, rows in rows_of_kinds(prompts.kinds).items()})


def rows_of_kinds(kinds: Sequence[str]) -> dict[str, list[int]]:
    """Returns the numbers of the prompts of each kind, without those of no kind."""
    out: dict[str, list[int]] = {}
    for number, kind in enumerate(kinds):
        if kind:
            out.setdefault(kind, []).append(number)
    return out
