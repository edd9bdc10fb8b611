"""Checks a LLaVA-format sample: `id`, `image`, `conversations`, `answers`, `task`, `client`, `split`, `kind`."""

from __future__ import annotations

import dataclasses
import io
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from pilot_jax.config import LimitsConfig
from pilot_jax.errors import InputError

MOST_NAME = 80  # bytes of a task's or client's name, which becomes up to three times as long as a file name
LIMITS = LimitsConfig()
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """An encoded image in a row of a table; it is read when it is needed."""

    table: Any  # datasets.Dataset
    row: int

    def open(self) -> io.BytesIO:
        """Returns the encoded image as an open file."""
        return io.BytesIO(self.table[self.row]["image"]["bytes"])


@dataclasses.dataclass(frozen=True)
class DrawnImage:
    """A generated image, which is drawn when it is needed."""

    name: str  # differs for images that differ
    draw: Callable[[], Image.Image]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A checked sample: a conversation, with or without an image."""

    id: str
    image: Path | Image.Image | StoredImage | DrawnImage | None  # None: text only
    turns: tuple[tuple[str, str], ...]  # ("human" | "gpt", text), alternating, ending in "gpt"
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


def _text(where: str, key: str, value: str, limits: LimitsConfig) -> str:
    """Returns `value`, after checking that it is not too long and that it can be encoded as UTF-8."""
    if len(value) > limits.text_characters:
        raise InputError(f"{where}: {key}: {len(value)} characters, data.limits.text_characters is "
                         f"{limits.text_characters}. Shorten the text or raise the limit.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {key}: a lone surrogate (half a character) at {error.start}. Correct "
                         "the text.") from None
    return value


def _turns(where: str, raw: object, limits: LimitsConfig) -> tuple[tuple[str, str], ...]:
    """Returns the checked turns of `conversations` as (who, text): alternating, the first human, the last an answer."""
    if not isinstance(raw, list) or not raw:
        raise InputError(f"{where}: conversations: expected a non-empty list of {{from, value}}.")
    turns = []
    for number, turn in enumerate(raw):
        expected = ("human", "gpt")[number % 2]
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise InputError(f"{where}: conversations[{number}]: expected {{from, value}} with a text value.")
        if turn.get("from") != expected:
            raise InputError(f"{where}: conversations[{number}].from: {reprlib.repr(turn.get('from'))}, expected "
                             f"{expected!r}. Turns must alternate, starting with human.")
        turns.append((expected, _text(where, f"conversations[{number}]", turn["value"], limits)))
    if turns[-1][0] != "gpt":
        raise InputError(f"{where}: conversations: the last turn must be an answer (from: gpt).")
    return tuple(turns)


def _image(where: str, name: object, image_root: Path, limits: LimitsConfig) -> Path | StoredImage:
    """Returns the image, after checking that its file exists inside `image_root`."""
    if isinstance(name, StoredImage):
        return name
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{where}: image: {name!r} must be a path inside data.image_root ({image_root}).")
    image = image_root / name
    try:
        exists = image.is_file()
        inside = limits.follow_links or image.resolve().is_relative_to(image_root.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a name that is too long, or links in a circle
        raise InputError(f"{where}: image: {name!r} cannot be a file ({error}).") from None
    if not exists:
        raise InputError(f"{where}: image: {image} does not exist. Correct the entry or set data.image_root.")
    if not inside:
        raise InputError(f"{where}: image: {image} is a link out of data.image_root ({image_root}). If that is "
                         "right, set data.limits.follow_links: true.")
    return image


def _name(where: str, key: str, value: object) -> str:
    """Returns the checked name of a task, client or kind, which terminals show and which may be part of file names."""
    if value is not None and (not isinstance(value, str | int) or isinstance(value, bool)):
        raise InputError(f"{where}: {key}: {value!r} must be a text.")
    name = "" if value is None else str(value)
    if not name.isprintable() or len(name.encode()) > MOST_NAME:
        raise InputError(f"{where}: {key}: {name[:MOST_NAME]!a} has control characters, or more than {MOST_NAME} "
                         "bytes. Choose another name.")
    return name


def parse_sample(entry: Entry, image_root: Path, limits: LimitsConfig = LIMITS) -> Sample:
    """Returns the checked sample.

    Args:
        image_root: the folder from which the samples' image paths start.

    Raises:
        InputError: something is wrong with the sample; the message names file, entry and key.
    """
    where, raw = entry.where, entry.value
    if not isinstance(raw, dict):
        raise InputError(f"{where}: expected an object with id, image and conversations.")
    turns = _turns(where, raw.get("conversations"), limits)
    image = None if raw.get("image") is None else _image(where, raw["image"], image_root, limits)
    marks = [who for who, value in turns for _ in range(value.count("<image>"))]
    if image is not None and marks != ["human"]:
        raise InputError(f"{where}: conversations: <image> must stand once, in a human turn.")
    if image is None and marks:
        raise InputError(f"{where}: the conversation has <image> but the entry has no image. Add the key image, or "
                         "remove <image>.")
    split = raw.get("split") or entry.split
    if not isinstance(split, str) or split not in SPLITS:
        raise InputError(f"{where}: split: {reprlib.repr(split)}, expected one of {', '.join(SPLITS)}.")
    named = {key: _name(where, key, raw.get(key)) or _name(where, key, getattr(entry, key))
             for key in ("task", "client")}
    answers = raw.get("answers") or []
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise InputError(f"{where}: answers: expected a list of texts, the references of the last answer.")
    answers = [_text(where, "answers", a, limits) for a in answers]
    sample_id = raw.get("id")
    if sample_id is not None and not isinstance(sample_id, str | int):
        raise InputError(f"{where}: id: {reprlib.repr(sample_id)} must be a text or a number.")
    return Sample(where if sample_id is None else str(sample_id), image, turns, named["task"], named["client"], split,
                  where, tuple(answers), _name(where, "kind", raw.get("kind")))
