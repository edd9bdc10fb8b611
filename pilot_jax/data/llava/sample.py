"""Checks a sample: `id`, `image`, `conversations` or `messages`, `answers`, `task`, `client`, `split`, `kind`."""

from __future__ import annotations

import dataclasses
import reprlib
from pathlib import Path

from pilot_jax.config import LimitsConfig
from pilot_jax.data.llava.image_field import LIMITS, AnyImage, checked_image, only_image
from pilot_jax.data.llava.turns import IMAGE, Turns, checked_text, checked_turns
from pilot_jax.errors import InputError

MOST_NAME = 80  # bytes of a task's or client's name, which becomes up to three times as long as a file name
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A checked sample: a conversation, with or without an image."""

    id: str
    image: AnyImage | None  # None: text only
    turns: Turns  # ("human" | "gpt", text), alternating, ending in "gpt"; before them, ("system", text) may stand
    task: str
    client: str
    split: str
    source: str  # file and entry, for messages
    answers: tuple[str, ...] = ()  # reference answers, such as VQA's ten; empty: the last turn is the only one
    kind: str = ""  # kind of question within its task, for which scores are reported separately; "": none

    @property
    def references(self) -> tuple[str, ...]:
        """The reference answers, against which a model's answer is scored."""
        return self.answers or (self.turns[-1][1].strip(),)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A raw sample, with the task, client and split from its file's name, which apply where the sample names none."""

    where: str  # file and entry, for messages
    value: object
    task: str
    client: str
    split: str


def checked_name(where: str, key: str, value: object) -> str:
    """Returns the checked name of a task, client or kind, which terminals show and which may be part of file names."""
    if value is not None and (not isinstance(value, str | int) or isinstance(value, bool)):
        raise InputError(f"{where}: {key}: {value!r} must be a text.")
    name = "" if value is None else str(value)
    if not name.isprintable() or len(name.encode()) > MOST_NAME:
        raise InputError(f"{where}: {key}: {name[:MOST_NAME]!a} has control characters, or more than {MOST_NAME} "
                         "bytes. Choose another name.")
    return name


def parse_sample(entry: Entry, image_root: Path | None, limits: LimitsConfig = LIMITS) -> Sample:
    """Returns the checked sample.

    Args:
        image_root: the folder from which the samples' image paths start; None: they are any paths of this machine.

    Raises:
        InputError: something is wrong with the sample; the message names file, entry and key.
    """
    where, raw = entry.where, entry.value
    if not isinstance(raw, dict):
        raise InputError(f"{where}: expected an object with id, image and conversations or messages.")
    turns, parts = checked_turns(where, raw, limits)
    named_image = only_image(where, raw, parts)
    image = None if named_image is None else checked_image(where, named_image, image_root, limits)
    marks = [who for who, value in turns for _ in range(value.count(IMAGE))]
    if image is not None and marks != ["human"]:
        raise InputError(f"{where}: conversations: <image> must stand once, in a human turn.")
    if image is None and marks:
        raise InputError(f"{where}: the conversation has <image> but the entry has no image. Add the key image, or "
                         "remove <image>.")
    split = raw.get("split") or entry.split
    if not isinstance(split, str) or split not in SPLITS:
        raise InputError(f"{where}: split: {reprlib.repr(split)}, expected one of {', '.join(SPLITS)}.")
    named = {key: checked_name(where, key, raw.get(key)) or checked_name(where, key, getattr(entry, key))
             for key in ("task", "client")}
    if not named["task"]:
        raise InputError(f"{where}: task: missing. Name the sample's task.")
    answers = raw.get("answers") or []
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise InputError(f"{where}: answers: expected a list of texts, the references of the last answer.")
    answers = [checked_text(where, "answers", a, limits) for a in answers]
    sample_id = raw.get("id")
    if sample_id is not None and not isinstance(sample_id, str | int):
        raise InputError(f"{where}: id: {reprlib.repr(sample_id)} must be a text or a number.")
    return Sample(where if sample_id is None else str(sample_id), image, turns, named["task"], named["client"], split,
                  where, tuple(answers), checked_name(where, "kind", raw.get("kind")))
