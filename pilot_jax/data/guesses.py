"""Answers that look at no picture and ask no model: what they score is what the score of a model is compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from pilot_jax.data.llava.sample import Sample

GUESSES = ("majority", "question")


def _most_common(answers: Iterable[str]) -> str:
    return Counter(answers).most_common(1)[0][0]  # of several, the first


def guesses(samples: Sequence[Sample], split: str = "test") -> dict[str, list[tuple[Sample, dict[str, str]]]]:
    """Returns, by client, its samples of `split` with two guesses at each; clients that do not train are left out.

    The guess "majority" is the client's own most common training answer, whatever the question. "question" is the most
    common training answer to the same question among all clients of the task, and the former where it is new.
    """
    own: dict[str, list[str]] = {}
    asked: dict[tuple[str, object], list[str]] = {}
    for sample in samples:
        if sample.split == "train":
            answer = sample.turns[-1][1].strip()
            own.setdefault(sample.client, []).append(answer)
            asked.setdefault((sample.task, sample.turns[:-1]), []).append(answer)
    majority = {client: _most_common(answers) for client, answers in own.items()}
    by_question = {question: _most_common(answers) for question, answers in asked.items()}
    out: dict[str, list[tuple[Sample, dict[str, str]]]] = {}
    for sample in samples:
        if sample.split == split and sample.client in majority:
            guess = majority[sample.client]
            out.setdefault(sample.client, []).append((sample, {
                "majority": guess, "question": by_question.get((sample.task, sample.turns[:-1]), guess)}))
    return out
