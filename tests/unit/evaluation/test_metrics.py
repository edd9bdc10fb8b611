"""Tests the metrics against published worked examples and values of independent implementations."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pilot_jax.errors import InputError
from pilot_jax.evaluation.metrics import METRICS, box_iou, check_metrics, cider, edit_distance
from pilot_jax.evaluation.vqa import normalize


def score(name, answer, *references):
    return METRICS[name]([answer], [references])


def test_exact():
    assert score("exact", " It  is Red", "it is red") == 1 and score("exact", "red", "blue") == 0
    assert score("exact", "two", "2", "two") == 1  # one matching reference is enough


def test_iou():
    assert box_iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)  # 1 shared of 4 + 4 − 1
    assert score("iou", "[0.0, 0.0, 1.0, 1.0]", "box 0 0 1 0.6") == 1
    assert score("iou", "[0.0, 0.0, 1.0, 1.0]", "0 0 1 0.4") == 0 and score("iou", "none", "0 0 1 1") == 0


@pytest.mark.parametrize(("agree", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy(agree, expected):
    """The values the VQA challenge publishes for its leave-one-out average over ten annotators."""
    assert score("vqa", "yes", *["Yes."] * agree, *["no"] * (10 - agree)) == pytest.approx(expected)


@pytest.mark.parametrize(("raw", "expected"), [
    ("The Dog", "dog"), ("two", "2"), ("1,000.5", "1000.5"), ("U.S.", "us"), ("dont", "don't"), ("its", "its"),
    ("red/blue", "red blue"), ("10:30 a.m.", "10:30 am"), ("it's  \n an\tapple!", "it's apple"), ("none", "0")])
def test_vqa_normalisation(raw, expected):
    """By the evaluation rules of visualqa.org: case, full stops, number words, articles, contractions, punctuation."""
    assert normalize(raw) == expected


def test_vqa_single_reference_counts_as_agreement():
    assert score("vqa", "a cat", "Cat") == 1


def test_rouge_l():
    """Lin (2004), §3: these answers score 3/4 and 2/4 against "police killed the gunman"."""
    assert score("rouge_l", "police kill the gunman", "police killed the gunman") == pytest.approx(0.75)
    assert score("rouge_l", "the gunman kill police", "police killed the gunman") == pytest.approx(0.5)


def test_bleu():
    """Papineni et al. (2002), candidate 1 of example 1, with the value NLTK's documentation gives for it."""
    references = ["It is a guide to action that ensures that the military will forever heed Party commands",
                  "It is the guiding principle which guarantees the military forces always being under the command of "
                  "the Party", "It is the practical guide for the army always to heed the directions of the party"]
    candidate = "It is a guide to action which ensures that the military always obeys the commands of the party"
    assert score("bleu", candidate, *references) == pytest.approx(0.5045666840058485)


@pytest.mark.parametrize(("a", "b", "distance"), [("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2)])
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == distance  # the textbook's examples


def test_anls():
    """Biten et al. (2019), eq. 1: the score is 1 − NL, or 0 if NL ≥ 0.5; the best reference counts."""
    assert score("anls", "Coca Cola", "coca-cola", "pepsi") == pytest.approx(1 - 1 / 9)
    assert score("anls", "abcd", "abxy") == 0 and score("anls", "abcde", "abxye") == pytest.approx(0.6)


# CIDEr-D from an implementation of the formulas of Vedantam et al. (2015), §4 and §4.1, that shared no code with
# pycocoevalcap: pilot_jax/evaluation/cider.py as of commit 29e642a. It agreed with pycocoevalcap 1.2 on all of these.
CIDER = [
    (["A red cat, sits!", "two dogs run", "Nobody here", ""],
     [["a red cat sits on the mat", "The cat: red."], ["Two dogs run by the blue house."],
      ["nobody is here at this time", "no one"], ["an empty answer"]], 1.937353262640228),
    (["a cat"], [["a cat"]], 0.0),  # in a corpus of one sample, every n-gram has the weight log(1) = 0
    (["a b c d", "a b c d"], [["a b c d"], ["e"]], 5.0),
    (["ω έα", "x"], [["Ω έα"], ["", "y"]], 2.5),
    (["a", "b"], [[""], ["!"]], 0.0),  # no reference has a word
]


@pytest.mark.parametrize(("answers", "references", "expected"), CIDER)
def test_cider(answers, references, expected):
    assert cider(answers, references) == pytest.approx(expected, rel=1e-12)


def test_cider_on_random_sentences():
    """Twelve random sentences with one to four references each; the expected value has the same origin as `CIDER`."""
    rng = random.Random(0)
    words = ["a", "cat", "dog", "sits", "on", "the", "mat", "red", "blue", "runs", "fast", "house"]

    def sentence():
        return " ".join(rng.choices(words, k=rng.randint(3, 9)))

    answers = [sentence() for _ in range(12)]
    references = [[sentence() for _ in range(rng.randint(1, 4))] for _ in range(12)]
    references[0][0] = answers[0]
    assert cider(answers, references) == pytest.approx(1.356260291783678, rel=1e-12)


def test_corpus_metrics_are_perfect_on_copies():
    texts = ["a red cat sits on the mat", "two dogs run by the blue house", "nobody is here at this time"]
    copies = [[t] for t in texts]
    assert METRICS["bleu"](texts, copies) == pytest.approx(1) and METRICS["cider"](texts, copies) == pytest.approx(10)


def test_a_metric_without_its_library_is_refused(monkeypatch):
    monkeypatch.setattr("pilot_jax.evaluation.metrics.find_spec", lambda name: None)
    check_metrics(["exact", "vqa", "anls", "iou"])
    for name, package in (("bleu", "sacrebleu"), ("rouge_l", "rouge-score"), ("cider", "pycocoevalcap")):
        with pytest.raises(InputError, match=f"{name} needs .*extra 'scores'.* pip install {package}$"):
            check_metrics([name])
    assert np.isfinite(METRICS["exact"](["a"], [["a"]]))
