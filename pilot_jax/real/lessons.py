"""The questions and answers on which a real base is trained: pictures of the base pool, asked about in many wordings.

No question here is one of scenario R's (`emoji_tasks`), so that what a base scores there is what it does on wordings
that it has never seen, about things that it has never seen. No lesson is answered in the form of the task `describe`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from pilot_jax.real.emoji import Picture
from pilot_jax.real.emoji_colours import COLOURS
from pilot_jax.real.emoji_tasks import KINDS, family_of, noun_phrase

TEMPLATE = "chatml_short"  # the conversation template of training
# Wordings by lesson. {a} and {b} stand for a word, or two, that the question names.
WORDINGS = {
    "name": ("What do you see?", "What is in the picture?", "Name the thing shown here.", "What is it called?",
             "What does the image show?", "Give the name of this thing."),
    "picture": ("Describe the picture briefly.", "Write a short caption.", "Give a brief description of the image.",
                "What is shown, and in which colour?"),
    "kind": ("What kind of thing is shown?", "What type of thing is in the picture?", "Name the category of this.",
             "To which group of things does this belong?", "What sort of thing do you see?", "Classify the picture.",
             "What category is it?", "Say in general what this is.", "Which class of objects is it from?"),
    "colour": ("What is the main colour?", "What color is it mostly?", "Name the dominant colour.",
               "What colour do you see most?", "What is its color?", "In which colour is it drawn for the most part?",
               "The largest part of the picture has which colour?", "Tell me its main color."),
    "is_kind": ("Do you see {a} here?", "Does the picture show {a}?", "Would you call it {a}?",
                "Is {a} shown in the picture?", "Answer yes or no: is it {a}?", "Could one say that this is {a}?"),
    "is_colour": ("Is it mostly {a}?", "Is {a} its main colour?", "Is the largest part {a}?",
                  "Answer yes or no: is it {a}?", "Would you say that it is {a}?"),
    "is_name": ("Is it called {a}?", "Is this the right name for it: {a}?", "Does it show this: {a}?"),
    "which": ("Is it {a} or {b}?", "Which of these is it: {a}, {b}?", "Choose one: {a} or {b}?",
              "What fits better, {a} or {b}?"),
    "keywords": ("List three words that go with this.", "Give three keywords.", "Which words belong to the picture?"),
    "german": ("Was ist das?", "Was zeigt das Bild?", "Wie heißt das auf Deutsch?", "What is this in German?",
               "What is the German word for it?"),
    "french": ("Qu'est-ce que c'est ?", "Que montre l'image ?", "What is this in French?",
               "What is the French word for it?"),
}
YES_NO = ("no", "yes")

Lesson = tuple[str, str]  # a question and its answer
Made = tuple[dict[str, str], str]  # the words of a question, and its answer


def _one(rng: np.random.Generator, choices: tuple[str, ...] | list[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _other_kind(rng: np.random.Generator, kinds: tuple[str, ...]) -> str:
    """Returns a kind that a picture is not, in half of all cases of the same family."""
    near = [kind for kind in family_of(kinds[0]) if kind not in kinds]
    return _one(rng, near if near and rng.random() < 0.5 else [kind for kind in KINDS if kind not in kinds])


def _name(rng: np.random.Generator, picture: Picture, others: list[str]) -> Made | None:
    return {}, picture.concept.name


def _picture(rng: np.random.Generator, picture: Picture, others: list[str]) -> Made | None:
    if not picture.colours:
        return {}, picture.concept.name
    return {}, f"{picture.concept.name}, {picture.colours[0]}"


def _kind(rng: np.random.Generator, picture: Picture, others: list[str]) -> Made | None:
    return ({}, picture.concept.kinds[0]) if picture.concept.kinds else None


def _colour(rng: np.random.Generator, picture: Picture, others: list[str]) -> Made | None:
    return ({}, picture.colours[0]) if picture.colours else None


def _is_kind(rng: np.random.Generator, picture: Picture, others: list[str]) -> Made | None:
    kinds, yes = picture.concept.kinds, int(rng.integers(2))
    if not kinds:
        return None
    return {"a": noun_phrase(kinds[0] if yes else _other_kind(rng, kinds))}, YES_NO[yes]


def _is_colour(rng: np.random.Generator, picture: Picture, others: list[str]) -> Made | None:
    yes = int(rng.integers(2))
    if not picture.colours:
        return None
    wrong = [colour for colour in COLOURS if colour not in picture.colours]
    return {"a": picture.colours[0] if yes else _one(rng, wrong)}, YES_NO[yes]


def _is_name(rng: np.random.Generator, picture: Picture, others: list[str]) -> Made | None:
    yes = int(rng.integers(2))
    return {"a": picture.concept.name if yes else _one(rng, others)}, YES_NO[yes]


def _which(rng: np.random.Generator, picture: Picture, others: list[str]) -> Made | None:
    """Asks about kinds, colours or names, in either order."""
    pairs = [(picture.concept.name, _one(rng, others))]
    if picture.concept.kinds:
        pairs.append((noun_phrase(picture.concept.kinds[0]), noun_phrase(_other_kind(rng, picture.concept.kinds))))
    if picture.colours:
        pairs.append((picture.colours[0], _one(rng, [c for c in COLOURS if c not in picture.colours])))
    right, wrong = pairs[int(rng.integers(len(pairs)))]
    a, b = (right, wrong) if rng.random() < 0.5 else (wrong, right)
    return {"a": a, "b": b}, right


def _keywords(rng: np.random.Generator, picture: Picture, others: list[str]) -> Made | None:
    words = picture.concept.keywords
    if len(words) < 3:
        return None
    return {}, ", ".join(words[i] for i in sorted(rng.permutation(len(words))[:3]))


def _translated(language: str) -> Callable[..., Made | None]:
    def lesson(rng: np.random.Generator, picture: Picture, others: list[str]) -> Made | None:
        name = picture.concept.translations.get(language)
        return ({}, name) if name else None

    return lesson


_MAKERS: dict[str, Callable[..., Made | None]] = {
    "name": _name, "picture": _picture, "kind": _kind, "colour": _colour, "is_kind": _is_kind, "is_colour": _is_colour,
    "is_name": _is_name, "which": _which, "keywords": _keywords, "german": _translated("de"),
    "french": _translated("fr")}

# How often each lesson is drawn, by stage. The first, of the projector alone, is on names and descriptions.
STAGES = {
    "projector": {"name": 2, "picture": 2, "kind": 2, "colour": 1},
    "instructions": {"kind": 6, "colour": 4, "name": 2, "picture": 1, "is_kind": 3, "is_colour": 3, "is_name": 1,
                     "which": 3, "keywords": 1, "german": 1, "french": 1},
    "review": {"kind": 6, "colour": 4, "name": 1, "picture": 1, "is_kind": 6, "is_colour": 6, "is_name": 1,
               "which": 6, "keywords": 1, "german": 1, "french": 1},
}

# Questions without a picture. The untrained language model's own answers to them are repeated in the last stage, so
# that it does not answer in the words of the other lessons. None is asked by a check of a base.
PLAIN = tuple(
    wording.format(thing) for wording, things in (
        ("What is {}?", ("a bridge", "the moon", "a library", "snow", "a doctor", "a violin", "gravity", "bread")),
        ("What is the capital of {}?", ("Italy", "Japan", "Canada", "Egypt", "Brazil", "Norway", "India", "Kenya")),
        ("Where is {}?", ("the Eiffel Tower", "Mount Everest", "the Sahara", "Berlin", "the Amazon", "Hawaii")),
        ("Write one short sentence about {}.", ("rain", "a garden", "winter", "a teacher", "music", "the sea")),
        ("Name three {}.", ("rivers", "colours", "animals", "sports", "planets", "languages", "fruits", "tools")),
        ("Why do {}?", ("birds sing", "people sleep", "leaves fall", "we laugh", "ships float", "bees dance")),
        ("How do I {}?", ("boil an egg", "write a letter", "plant a tree", "learn to swim", "save money")),
        ("Who {}?", ("was Mozart", "wrote Hamlet", "was Marie Curie", "painted the Mona Lisa", "was Einstein")),
        ("Is {}?", ("water wet", "the sun a star", "a tomato a fruit", "seven an even number", "ice warm")),
        ("Explain {} in simple words.", ("a magnet", "the seasons", "a computer", "money", "photosynthesis")),
    ) for thing in things)


def lessons(rng: np.random.Generator, picture: Picture, stage: str, names: list[str]) -> Iterator[Lesson]:
    """Yields lessons about a picture without end, drawn by the weights of a stage of `STAGES`, in random wordings.

    Args:
        names: names of things, from which wrong ones are drawn.
    """
    weights = STAGES[stage]
    share = np.array(list(weights.values())) / sum(weights.values())
    others = [name for name in names if name not in (picture.concept.name, *picture.concept.names)]
    while True:
        lesson = list(weights)[int(rng.choice(len(weights), p=share))]
        made = _MAKERS[lesson](rng, picture, others)
        if made is not None:
            words, answer = made
            yield _one(rng, WORDINGS[lesson]).format(**words), answer
