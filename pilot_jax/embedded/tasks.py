"""Five tasks of questions and answers about digit scenes, each in ten wordings, grounding in five.

A task is a function (rng, scene, wording) → (question, answer). Wordings 0 to 4 are the clients' own. The captions on
which the base is pretrained have different ones, so that the base does not give any client's answers yet. Wordings 5
to 9 are those in which the instructed base has learnt every task but grounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pilot_jax.embedded.scenes import Digit, Scene

POSITIONS = ("top left", "top center", "top right", "middle left", "middle center", "middle right", "bottom left",
             "bottom center", "bottom right")
NUMBERS = ("no", "one", "two", "three", "four")
CLIENT_WORDINGS, BASE_WORDINGS = range(5), range(5, 10)


def _and(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _a(digit: Digit) -> str:
    return f"{'an' if digit.ink == 'orange' else 'a'} {digit.ink} {digit.value}"


def pretraining_caption(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    """Returns (instruction, caption) for pretraining; the instruction asks for one of three kinds of caption."""
    digits = scene.digits
    kind = int(rng.integers(3))
    if kind == 0:
        return "describe the picture.", _and([f"{_a(d)} at {POSITIONS[d.cell]}" for d in digits]) + "."
    if kind == 1:
        noun = "digit" if len(digits) == 1 else "digits"
        return "describe the picture briefly.", f"{NUMBERS[len(digits)]} {noun}: {_and([_a(d) for d in digits])}."
    return "list what you see.", " ".join(f"{POSITIONS[d.cell]}: {d.value}, {d.ink}." for d in digits)


def vqa(rng: np.random.Generator, scene: Scene, wording: int) -> tuple[str, str]:
    """Returns a question about the number of digits, a colour, a parity or a digit's presence, and its answer."""
    w = wording % 10
    target = scene.digits[int(rng.integers(len(scene.digits)))]
    kind = int(rng.integers(4))
    if kind == 0:
        n = len(scene.digits)
        question = ("how many digits are there?", "count the digits.", "what is the number of digits?",
                    "tell me how many digits you see.", "number of digits?", "how many of them?", "say the count.",
                    "how many symbols does it have?", "what is the total?", "amount of digits, please.")[w]
        return question, (f"{n}", f"{NUMBERS[n]}", f"there are {n}", f"{NUMBERS[n]} of them", f"count = {n}",
                          f"{NUMBERS[n]} digits", f"{n} in all", f"it has {n}", f"total {NUMBERS[n]}", f"{n}.")[w]
    if kind == 1:
        question = ("what colour is the {}?", "which colour has the {}?", "name the colour of the {}.",
                    "tell me the colour of the {}.", "colour of {}?", "in which ink is the {}?", "say the ink of {}.",
                    "the {} is drawn in what?", "how is the {} coloured?", "ink of the {}, please.")[w]
        answer = ("{}", "it is {}", "the colour is {}", "{} ink", "colour = {}", "in {}", "ink {}", "drawn in {}",
                  "coloured {}", "{}.")[w]
        return question.format(target.value), answer.format(target.ink)
    if kind == 2:
        parity = "odd" if target.value % 2 else "even"
        question = ("is the {} digit even or odd?", "the {} digit: even or odd?", "say whether the {} digit is even.",
                    "tell me if the {} digit is odd or even.", "parity of {}?", "is {} odd or even?",
                    "say the parity of {}.", "does two divide the {} one?", "what kind of number is {}?",
                    "odd or even, the {} one, please.")[w]
        answer = ("{}", "it is {}", "the digit is {}", "{} number", "parity = {}", "an {} one", "parity {}",
                  "that is {}", "kind {}", "{}.")[w]
        return question.format(target.ink), answer.format(parity)
    present = bool(rng.integers(2))
    shown = {d.value for d in scene.digits}
    value = target.value if present else int(rng.choice([v for v in range(10) if v not in shown]))
    question = ("is there a {}?", "can you see a {}?", "does the picture show a {}?", "tell me if there is a {}.",
                "any {}?", "is a {} among them?", "say whether it has {}.", "does {} occur?", "what about a {}?",
                "a {}, yes or no, please.")[w]
    yes, no = (("yes", "no"), ("yes it is", "no it is not"), ("there is", "there is not"), ("yes please", "not here"),
               ("present = yes", "present = no"), ("it is", "it is not"), ("has it", "lacks it"),
               ("it occurs", "it does not"), ("seen", "not seen"), ("yes.", "no."))[w]
    return question.format(value), yes if present else no


def ocr(rng: np.random.Generator, scene: Scene, wording: int) -> tuple[str, str]:
    """Returns a request to read the digits in order, and its answer."""
    w = wording % 10
    values = [str(d.value) for d in scene.digits]
    question = ("read the digits.", "what is written here?", "transcribe the picture.", "spell out the digits.",
                "text?", "what do you read?", "write down the numbers.", "copy the digits.", "which digits are they?",
                "the digits in order, please.")[w]
    before, between, after = (
        ("", " ", ""), ("", ", ", ""), ("", " - ", ""), ("", "", ""), ("it reads ", " ", ""), ("i read ", " ", ""),
        ("numbers: ", ", ", ""), ("<", " ", ">"), ("they are ", ", ", ""), ("", ".", "."))[w]
    return question, before + between.join(values) + after


def caption(rng: np.random.Generator, scene: Scene, wording: int) -> tuple[str, str]:
    """Returns a request for a sentence that names every digit with its ink, and its answer."""
    w, digits = wording % 10, scene.digits
    question = ("write a caption.", "give a short caption.", "what does this show?", "caption the scene.",
                "caption?", "say what is drawn.", "a title for this.", "what can be seen?", "sum up the picture.",
                "a sentence about it, please.")[w]
    answer = (
        lambda: "the picture shows " + _and([_a(d) for d in digits]),
        lambda: ", ".join(f"{d.value} in {d.ink}" for d in digits),
        lambda: "i see " + " next to ".join(_a(d) for d in digits),
        lambda: f"{len(digits)} here: " + ", ".join(f"{d.value} ({d.ink})" for d in digits),
        lambda: "; ".join(f"{d.ink} ink, {d.value}" for d in digits),
        lambda: "drawn: " + ", ".join(_a(d) for d in digits),
        lambda: _and([f"{d.value}, {d.ink}" for d in digits]),
        lambda: _and([_a(d) for d in digits]) + " can be seen",
        lambda: "+".join(f"{d.ink} {d.value}" for d in digits),
        lambda: "here " + _and([f"the {d.value} is {d.ink}" for d in digits]) + ".")[w]
    return question, answer()


def grounding(rng: np.random.Generator, scene: Scene, wording: int) -> tuple[str, str]:
    """Returns a question for the box of a digit, named by its value or its ink, and the box in [0, 1] coordinates.

    It has only the clients' wordings."""
    w = wording % 5
    target = scene.digits[int(rng.integers(len(scene.digits)))]
    named = f"the {target.value}" if rng.integers(2) else f"the {target.ink} digit"
    question = ("where is {}?", "locate {}.", "give the box of {}.", "find {}.", "box of {}?")[w].format(named)
    numbers = [f"{v:.2f}" for v in target.box]
    answer = ("[{}, {}, {}, {}]", "({}, {}, {}, {})", "box [{}, {}, {}, {}]", "{} {} {} {}", "x y x y: {} {} {} {}")[w]
    return question, answer.format(*numbers)


def position(rng: np.random.Generator, scene: Scene, wording: int) -> tuple[str, str]:
    """Returns a question for the cell of a digit, named by its value or its ink, and the cell in words."""
    w = wording % 10
    target = scene.digits[int(rng.integers(len(scene.digits)))]
    named = f"the {target.value}" if rng.integers(2) else f"the {target.ink} one"
    question = ("where do you see {}?", "position of {}?", "name the place of {}.", "tell me where {} stands.",
                "place of {}?", "which cell has {}?", "say where {} is.", "in what corner is {}?",
                "how do i get to {}?", "the place of {}, please.")[w].format(named)
    answer = ("{}", "it is {}", "the {} cell", "at the {}", "place = {}", "cell {}", "is {}", "in the {}", "look {}",
              "{}.")[w]
    return question, answer.format(POSITIONS[target.cell])


Task = Callable[[np.random.Generator, "Scene", int], tuple[str, str]]
TASKS: dict[str, Task] = {"vqa": vqa, "ocr": ocr, "caption": caption, "grounding": grounding, "position": position}
