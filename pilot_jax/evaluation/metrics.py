"""Metrics, by name, that score n answers against their references; higher is better.

A metric takes n answers and, for each of them, one or several references. It returns the mean over the samples, or the
corpus score where it is defined on a corpus (BLEU, CIDEr). All metrics lie in [0, 1], except CIDEr, which lies in
[0, 10]. `metric` adds one of your own.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import math
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from pilot_jax.errors import InputError
from pilot_jax.evaluation.vqa import vqa_accuracy
from pilot_jax.words import counted

References = Sequence[Sequence[str]]
Metric = Callable[[Sequence[str], References], float]


def _best(score: Callable[[str, str], float], answers: Sequence[str], references: References) -> float:
    """Returns the mean over samples of the best score against any of the sample's references."""
    return float(np.mean([max(score(a, r) for r in refs) for a, refs in zip(answers, references, strict=True)]))


def exact(answer: str, reference: str) -> float:
    """Returns 1 if both are equal after lower-casing and folding white space, else 0."""
    return float(" ".join(answer.lower().split()) == " ".join(reference.lower().split()))


def parse_box(text: str) -> tuple[float, float, float, float] | None:
    """Returns the first four numbers of a text as (x0, y0, x1, y1), or None if it has fewer."""
    numbers = re.findall(r"\d+(?:\.\d+)?", text)
    if len(numbers) < 4:
        return None
    x0, y0, x1, y1 = (float(n) for n in numbers[:4])
    return x0, y0, x1, y1


def box_iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Returns the intersection over union of two boxes (x0, y0, x1, y1); 0 if one is empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0.0) * max(height, 0.0)
    area = sum(max(x1 - x0, 0.0) * max(y1 - y0, 0.0) for x0, y0, x1, y1 in (a, b))
    return overlap / (area - overlap) if area > overlap else 0.0


def iou(answer: str, reference: str) -> float:
    """Returns 1 if the boxes have IoU ≥ 0.5, the usual accuracy of referring-expression grounding, else 0."""
    a, b = parse_box(answer), parse_box(reference)
    return float(a is not None and b is not None and box_iou(a, b) >= 0.5)


def edit_distance(a: str, b: str) -> int:
    """Returns Levenshtein's distance: the insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def anls(answer: str, reference: str) -> float:
    """Returns the normalised Levenshtein similarity, or 0 where it is at most one half.

    Biten et al. (2019), arXiv 1905.13648, eq. 1.
    """
    a, b = " ".join(answer.lower().split()), " ".join(reference.lower().split())
    distance = edit_distance(a, b) / max(len(a), len(b), 1)
    return 1.0 - distance if distance < 0.5 else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """Returns the F-measure of the longest common subsequence (Lin, 2004), by `rouge-score`, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False).score(reference, answer)["rougeL"].fmeasure


def bleu(answers: Sequence[str], references: References) -> float:
    """Returns corpus BLEU-4 (Papineni et al., 2002), by `sacrebleu` with its defaults, divided by 100."""
    from sacrebleu.metrics import BLEU

    most = max(len(refs) for refs in references)
    streams: list[list[Any]] = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    return BLEU().corpus_score(list(answers), streams).score / 100


def _words(text: str) -> str:
    """Returns the lower-cased words of a text, joined by blanks."""
    return " ".join(re.findall(r"\w+", text.lower()))


def cider(answers: Sequence[str], references: References) -> float:
    """Returns corpus CIDEr-D (Vedantam et al., 2015, arXiv 1411.5726), by `pycocoevalcap`, on lower-cased words.

    The n-grams are weighted by how rare they are among the references of the given corpus. So scores of different
    corpora cannot be compared, and a corpus of one sample scores 0. COCO's Java tokenizer is not used.
    """
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer(n=4, sigma=6.0)  # the paper's n-gram length and the width of its length penalty
    for answer, refs in zip(answers, references, strict=True):
        scorer += (_words(answer), [_words(ref) for ref in refs])
    if not any(ref for refs in scorer.crefs for ref in refs):  # the library fails if no reference has a word
        return 0.0
    return float(scorer.compute_score()[0])


def _mean_best(score: Callable[[str, str], float]) -> Metric:
    return lambda answers, references: _best(score, answers, references)


METRICS: dict[str, Metric] = {
    "exact": _mean_best(exact), "iou": _mean_best(iou), "anls": _mean_best(anls), "rouge_l": _mean_best(rouge_l),
    "vqa": vqa_accuracy, "bleu": bleu, "cider": cider,
}
# (module, package to install) that a metric needs; all are in the extra `scores`.
_NEEDS = {"bleu": ("sacrebleu", "sacrebleu"), "rouge_l": ("rouge_score", "rouge-score"),
          "cider": ("pycocoevalcap", "pycocoevalcap")}


_OF_CORPORA = {"bleu", "cider"}  # defined on all answers together, so that a single one has no score of its own
_PACKAGED, ENTRY_POINTS = frozenset(METRICS), "pilot_jax.metrics"  # the group in which installed packages name theirs


def metric(name: str, *, corpus: bool = False) -> Callable[[Callable[..., float]], Callable[..., float]]:
    """Returns a decorator that registers a function as a metric, under a name that `eval.metrics` can then have.

    The function takes (answer, reference) and returns the score of one answer; of several references, the best counts.
    With `corpus`, it takes all answers of a client and, for each, its references, and returns their score. A function
    registered under the same name before is replaced.

    Raises:
        ValueError: the name is that of one of the package's metrics.
    """
    if name in _PACKAGED:
        raise ValueError(f"the package has a metric {name!r}: choose another name")

    def register(score: Callable[..., float]) -> Callable[..., float]:
        METRICS[name] = score if corpus else _mean_best(score)
        (_OF_CORPORA.add if corpus else _OF_CORPORA.discard)(name)
        return score

    return register


def scores_single_answers(name: str) -> bool:
    """Returns whether a metric says something about one answer alone."""
    return name not in _OF_CORPORA


def scored(name: str, answers: Sequence[str], references: References) -> float:
    """Returns the score of answers by the metric `name`.

    Raises:
        InputError: the metric is not known in this process, or is not a finite number.
    """
    check_metrics([name])
    score = METRICS[name](answers, references)
    try:
        score = float(score)
        if not math.isfinite(score):
            raise ValueError
    except (TypeError, ValueError):
        raise InputError(f"eval.metrics: {name} returned {score!r} for {counted(len(answers), 'answer')}. A metric "
                         "returns a finite number.") from None
    return score


def check_metrics(names: Sequence[str]) -> None:
    """Checks, before anything is trained, that the given metrics are known and their libraries installed.

    A metric of an installed package is imported here. A name alone imports nothing else: a config may come from
    somebody else.

    Raises:
        InputError: a metric is not known, or its library is missing; the message says what to do.
    """
    for name in names:
        for point in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name) if name not in METRICS else ():
            metric(name)(point.load())
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, 1, 0.6)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(METRICS)}."
            raise InputError(f"eval.metrics: {name!r} is not a metric. {hint} For your own, name the module that "
                             "registers it: --use MODULE (in Python: import it).")
        if name in _NEEDS and find_spec(_NEEDS[name][0]) is None:
            raise InputError(f"eval.metrics: {name} needs a library that is not installed (it is in the extra "
                             f"'scores'). Run: pip install {_NEEDS[name][1]}")
