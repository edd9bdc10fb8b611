"""Tests of answers that look at no picture, and of their scores, on samples counted by hand."""

from __future__ import annotations

import pytest

from pilot_jax.data.guesses import guesses
from pilot_jax.data.llava.sample import Sample
from pilot_jax.evaluation.scores import guessed_scores


def sample(client, split, question, answer, answers=(), task="t"):
    return Sample("", None, (("human", question), ("gpt", answer)), task, client, split, "", answers)


SAMPLES = [
    sample("a", "train", "colour?", "red"), sample("a", "train", "colour?", "blue"),
    sample("a", "train", "how many?", "2"), sample("a", "train", "shape?", "red"),
    sample("b", "train", "colour?", "blue"), sample("b", "train", "colour?", "blue "),
    sample("b", "train", "size?", "big"),
    sample("c", "train", "colour?", "green", task="other"),
    sample("a", "test", "colour?", "Blue"), sample("a", "test", "how many?", "2"), sample("a", "test", "new?", "red"),
    sample("a", "validation", "colour?", "red"),
    sample("b", "test", "size?", "small", ("large", "big")), sample("b", "test", "colour?", "red"),
    sample("c", "test", "colour?", "green", task="other"), sample("stranger", "test", "colour?", "blue")]


def test_guesses_are_the_most_common_answers():
    """a says red in two of four answers, b blue; of a task's four answers to "colour?", three are blue."""
    found = guesses(SAMPLES)
    assert list(found) == ["a", "b", "c"]
    assert [guess for _, guess in found["a"]] == [
        {"majority": "red", "question": "blue"}, {"majority": "red", "question": "2"},
        {"majority": "red", "question": "red"}]
    assert [guess["question"] for _, guess in found["b"]] == ["big", "blue"]
    assert found["c"][0][1] == {"majority": "green", "question": "green"}
    assert [s.split for s, _ in guesses(SAMPLES, "validation")["a"]] == ["validation"]


def test_their_scores():
    """By each task's metric; of several references, one is enough."""
    assert guessed_scores(SAMPLES, {}, "test") == {
        "majority": {"a": pytest.approx(1 / 3), "b": 0.0, "c": 1.0},
        "question": {"a": 1.0, "b": 0.5, "c": 1.0}}
    assert guessed_scores(SAMPLES, {"t": "anls"}, "validation") == {"majority": {"a": 1.0}, "question": {"a": 0.0}}


def test_the_last_answer_counts_in_a_conversation():
    turns = (("human", "colour?"), ("gpt", "red"), ("human", "and size?"), ("gpt", "big"))
    train, held = (Sample("", None, turns, "t", "a", split, "") for split in ("train", "test"))
    assert guesses([train, held])["a"][0][1] == {"majority": "big", "question": "big"}
