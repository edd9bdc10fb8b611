"""VQA accuracy (Antol et al., 2015, arXiv 1505.00468): agreement with ten annotators, after normalisation."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

_NUMBERS = {word: str(i) for i, word in enumerate(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
# Annotators drop apostrophes. Contractions whose bare form is a word of its own (its, were, well) are not listed.
_CONTRACTED = """
    ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't
    shouldn't wasn't weren't wouldn't could've might've should've would've he'd he's i'm i've it'd it'll let's
    she's somebody's someone's something's that's there's they'd they'll they're they've we've what's
    what're when's where's who's who'd who'll why's won't y'all you'd you'll you're you've"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}


def normalize(answer: str) -> str:
    """Returns an answer as the VQA challenge compares it (the evaluation rules of visualqa.org).

    The result is in lower case, without articles, with digits for number words and apostrophes in contractions. Decimal
    points, apostrophes and colons stay. Other full stops, and commas between digits, are removed. All other punctuation
    becomes a blank.
    """
    text = answer.lower().replace("\n", " ").replace("\t", " ").strip()
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text)
    text = re.sub(r"[^\w\s':.]|_", " ", text)
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Returns the mean over samples, and over the annotators left out, of min(matches among the others / 3, 1).

    A sample with a single reference counts as ten annotators who agree.
    """
    scores = []
    for answer, given in zip(answers, references, strict=True):
        given = [normalize(g) for g in (list(given) * 10 if len(given) == 1 else given)]
        hits = np.asarray([g == normalize(answer) for g in given])
        scores.append(float(np.mean(np.minimum((hits.sum() - hits) / 3, 1))))
    return float(np.mean(scores))
