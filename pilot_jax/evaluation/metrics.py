"""Scores of a client's answers against their references, by name. Higher is better.

A metric takes n answers and, for each, its references (one or several), and returns one number: the mean over the
samples, or the corpus score where the metric is defined on a corpus (BLEU, CIDEr). All lie in [0, 1] but CIDEr, which
goes to 10.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from pilot_jax.errors import InputError
from pilot_jax.evaluation.cider import cider
from pilot_jax.evaluation.vqa import vqa_accuracy

References = Sequence[Sequence[str]]


def _best(score: Callable[[str, str], float], answers: Sequence[str], references: References) -> float:
    """Mean over samples of the best score against any reference."""
    return float(np.mean([max(score(a, r) for r in refs) for a, refs in zip(answers, references, strict=True)]))


def exact(answer: str, reference: str) -> float:
    """1 if equal after lower-casing and folding white space."""
    return float(" ".join(answer.lower().split()) == " ".join(reference.lower().split()))


def parse_box(text: str) -> tuple[float, float, float, float] | None:
    """The first four numbers of a text as (x0, y0, x1, y1), or None."""
    numbers = re.findall(r"\d+(?:\.\d+)?", text)
    if len(numbers) < 4:
        return None
    x0, y0, x1, y1 = (float(n) for n in numbers[:4])
    return x0, y0, x1, y1


def box_iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of (x0, y0, x1, y1) boxes; 0 for an empty one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0.0) * max(height, 0.0)
    area = sum(max(x1 - x0, 0.0) * max(y1 - y0, 0.0) for x0, y0, x1, y1 in (a, b))
    return overlap / (area - overlap) if area > overlap else 0.0


def iou(answer: str, reference: str) -> float:
    """1 if the boxes overlap by IoU ≥ 0.5 (the usual accuracy of referring-expression grounding)."""
    a, b = parse_box(answer), parse_box(reference)
    return float(a is not None and b is not None and box_iou(a, b) >= 0.5)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def anls(answer: str, reference: str) -> float:
    """Normalised Levenshtein similarity, 0 below one half (Biten et al., 2019, arXiv 1905.13648, eq. 1)."""
    a, b = " ".join(answer.lower().split()), " ".join(reference.lower().split())
    distance = edit_distance(a, b) / max(len(a), len(b), 1)
    return 1.0 - distance if distance < 0.5 else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """F-measure of the longest common subsequence (Lin, 2004), by `rouge-score`, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False).score(reference, answer)["rougeL"].fmeasure


def bleu(answers: Sequence[str], references: References) -> float:
    """Corpus BLEU-4 (Papineni et al., 2002) by `sacrebleu`, its defaults, divided by 100."""
    from sacrebleu.metrics import BLEU

    most = max(len(refs) for refs in references)
    streams: Any = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    return BLEU().corpus_score(list(answers), streams).score / 100


def _mean_best(score: Callable[[str, str], float]) -> Callable[[Sequence[str], References], float]:
    return lambda answers, references: _best(score, answers, references)


METRICS: dict[str, Callable[[Sequence[str], References], float]] = {
    "exact": _mean_best(exact), "iou": _mean_best(iou), "anls": _mean_best(anls), "rouge_l": _mean_best(rouge_l),
    "vqa": vqa_accuracy, "bleu": bleu, "cider": cider,
}
_NEEDS = {"bleu": "sacrebleu", "rouge_l": "rouge_score"}


def check_metrics(names: Sequence[str]) -> None:
    """Refuse a metric whose library is not installed, before anything is trained."""
    for name in names:
        if name in _NEEDS and find_spec(_NEEDS[name]) is None:
            raise InputError(f"eval.metrics: {name} needs the extra 'scores'. Run: pip install 'pilot-jax[scores]'")
