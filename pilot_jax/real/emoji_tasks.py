"""Scenario R: tasks on emoji crossed with drawing styles, with one client for each pair, and what chance scores.

`python -m pilot_jax.real.emoji_tasks` prints the numbers of concepts and the scores of answers that ignore pictures.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pilot_jax.config import EmojiConfig, parse_config
from pilot_jax.data.guesses import GUESSES, guesses
from pilot_jax.data.llava.sample import SPLITS, Sample
from pilot_jax.real.emoji import POOLS, STYLES, Concept, Picture, concepts, picture, pool
from pilot_jax.real.emoji_colours import COLOURS

UNCOUNTABLE = ("food", "sweets", "clothing", "money", "mail", "sports equipment", "weather")
FAMILIES = (  # kinds that one may take for another: the wrong kinds of yes/no questions are of the right one's family
    ("mammal", "bird", "reptile", "sea animal", "bug"),
    ("flower", "plant", "fruit", "vegetable", "food", "sweets", "drink"),
    ("building", "landscape", "sky object", "weather"),
    ("land vehicle", "boat", "aircraft"),
    ("clothing", "bag", "sports equipment"),
    ("household item", "electronic device", "tool", "medical or lab item", "musical instrument"),
    ("book or paper", "office item", "money", "mail", "toy or game", "festive item"),
    ("face", "person", "body part"),
)
KINDS = tuple(kind for family in FAMILIES for kind in family)

Question = tuple[str, tuple[str, ...]]  # a question, and the answers that are right, the first of which is trained


def family_of(kind: str) -> tuple[str, ...]:
    """Returns the family that a kind belongs to, itself included; empty if it is in none."""
    return next((family for family in FAMILIES if kind in family), ())


def noun_phrase(kind: str, colour: str = "") -> str:
    """Returns a kind as the noun of a sentence, with a colour if one is given: "an orange fruit", "food"."""
    text = f"{colour} {kind}".strip()
    return text if kind in UNCOUNTABLE else f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


# -- tasks: each says which pictures it can ask about, and asks about a list of them -----------------------------------


def _kind(chosen: Sequence[Picture]) -> list[Question]:
    return [("Which kind of thing is this?", one.concept.kinds) for one in chosen]


def _colour(chosen: Sequence[Picture]) -> list[Question]:
    return [("Which colour is most of it?", one.colours) for one in chosen]


def _name(chosen: Sequence[Picture]) -> list[Question]:
    return [("What is this?", (one.concept.name, *one.concept.names)) for one in chosen]


def _describe(chosen: Sequence[Picture]) -> list[Question]:
    return [("Describe it in a few words.", tuple(
        noun_phrase(kind, colour) for kind in one.concept.kinds for colour in one.colours)) for one in chosen]


def _yesno(chosen: Sequence[Picture]) -> list[Question]:
    """Asks about kinds and colours in turn; half of the questions of each are answered by yes."""
    kinds = _asked([one.concept.kinds for one in chosen[::2]], KINDS)
    colours = _asked([one.colours for one in chosen[1::2]], COLOURS)
    out: list[Question] = []
    for number in range(len(chosen)):
        asked, yes = (kinds, colours)[number % 2][number // 2]
        question = f"Is most of it {asked}?" if number % 2 else f"Is this {noun_phrase(asked)}?"
        out.append((question, ("yes",) if yes else ("no",)))
    return out


def _asked(right: Sequence[tuple[str, ...]], names: tuple[str, ...]) -> dict[int, tuple[str, bool]]:
    """Returns what each picture is asked for and whether it is so, given what is right for each of all names.

    Pictures are paired, and both of a pair are asked for what the first is. So each question has as many pictures of
    which it is true as others, and does not tell its answer. The second is of the first's family where one is left.
    """
    left, out = list(range(len(right))), dict[int, tuple[str, bool]]()
    while left:
        first = left.pop(0)
        asked = right[first][0]
        out[first] = asked, True
        family = family_of(asked)
        others = sorted((i for i in left if asked not in right[i]), key=lambda i: right[i][0] not in family)
        if others:
            left.remove(others[0])
            out[others[0]] = asked, False
        elif left:  # the same is right for all that are left
            other = left.pop(0)
            out[other] = next(name for name in names if name not in right[other]), False
    return out


TASKS: dict[str, Callable[[Sequence[Picture]], list[Question]]] = {
    "kind": _kind, "colour": _colour, "describe": _describe, "yesno": _yesno, "name": _name}


def askable(task: str, pool_name: str, style: str) -> list[Concept]:
    """Returns the concepts of a pool about whose picture in a style a task can ask."""
    need_kind, need_colour = task in ("kind", "describe", "yesno"), task in ("colour", "describe", "yesno")
    return [c for c in pool(pool_name) if (c.kinds or not need_kind) and (c.colours[style] or not need_colour)]


# -- samples -----------------------------------------------------------------------------------------------------------


def _drawn(rng: np.random.Generator, candidates: list[Concept], count: int) -> list[Concept]:
    """Returns `count` concepts in random order; none is drawn again before all were."""
    order: list[int] = []
    while len(order) < count:
        order += rng.permutation(len(candidates)).tolist()
    return [candidates[i] for i in order[:count]]


def client_samples(task: str, style: str, split: str, count: int, seed: int) -> list[Sample]:
    """Returns the samples of client `{task}_{style}` in a split; they depend on nothing but the arguments."""
    client = f"{task}_{style}"
    rng = np.random.default_rng([seed, *f"{client}/{split}".encode()])
    chosen = [picture(concept, style) for concept in _drawn(rng, askable(task, split, style), count)]
    samples = []
    for number, (one, (question, right)) in enumerate(zip(chosen, TASKS[task](chosen), strict=True)):
        samples.append(Sample(
            id=f"{client}-{split}-{number:05d}", image=one.image,
            turns=(("human", f"<image>\n{question}"), ("gpt", right[0])), task=task, client=client, split=split,
            source=f"emoji:{client}/{split}[{number}]", answers=right if len(right) > 1 else ()))
    return samples


def emoji_samples(settings: EmojiConfig) -> Iterator[Sample]:
    """Yields the samples of all clients: each task of the section in each of its styles."""
    sizes = {"train": settings.train, "validation": settings.validation, "test": settings.test}
    for task in settings.tasks:
        for style in settings.styles:
            for split in SPLITS:
                yield from client_samples(task, style, split, sizes[split], settings.seed)


# -- what chance scores ------------------------------------------------------------------------------------------------


def chance_scores(samples: Sequence[Sample]) -> dict[str, tuple[float, float]]:
    """Returns by task the scores on the test split of `data.guesses.guesses`: "majority" and "question"."""
    found, out = guesses(samples), dict[str, tuple[float, float]]()
    for task in dict.fromkeys(s.task for s in samples):
        tests = [one for own in found.values() for one in own if one[0].task == task]
        majority, question = (float(np.mean([guess[way] in s.references for s, guess in tests])) for way in GUESSES)
        out[task] = majority, question
    return out


def summary(seeds: int = 5) -> str:
    """Returns the tables that the documentation shows, as Markdown: concepts by kind and pool, and chance scores."""
    every = concepts()
    counts = Counter(((c.kinds or ("(no kind)",))[0], c.pool) for c in every)
    lines = [f"| kind | {' | '.join(POOLS)} |", "|---|" + "---:|" * len(POOLS)]
    for kind in sorted({kind for kind, _ in counts}, key=lambda k: (k == "(no kind)", k)):
        lines.append(f"| {kind} | {' | '.join(str(counts[kind, p]) for p in POOLS)} |")
    lines.append(f"| all {len(every)} | {' | '.join(str(len(pool(p))) for p in POOLS)} |")
    lines += ["", f"| task | {' | '.join(f'{p}, pictures' for p in POOLS)} | majority | question alone |",
              "|---|" + "---:|" * (len(POOLS) + 2)]
    settings = parse_config({"data": {"emoji": {"tasks": list(TASKS)}}}, "emoji_tasks").data.emoji
    runs = [chance_scores(list(emoji_samples(settings.model_copy(update={"seed": seed})))) for seed in range(seeds)]
    for task in TASKS:
        able = [str(sum(len(askable(task, p, style)) for style in STYLES)) for p in POOLS]
        means = [f"{np.mean([run[task][i] for run in runs]):.3f}" for i in range(2)]
        lines.append(f"| {task} | {' | '.join([*able, *means])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prints concepts by kind and pool, and the scores of chance, by task.")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds of which the scores are the mean")
    print(summary(parser.parse_args().seeds))
