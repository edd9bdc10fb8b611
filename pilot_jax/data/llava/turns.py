"""Checks the conversation of an entry: LLaVA's `conversations`, or `messages` as OpenAI and TRL write them."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from pilot_jax.config import LimitsConfig
from pilot_jax.errors import InputError

IMAGE = "<image>"
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}  # by the role of a message
Turns = tuple[tuple[str, str], ...]  # (speaker, text); speakers are "system", only at the start, "human" and "gpt"


def checked_text(where: str, key: str, value: str, limits: LimitsConfig) -> str:
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


def checked_turns(where: str, raw: Mapping[str, Any], limits: LimitsConfig) -> tuple[Turns, list[object]]:
    """Returns an entry's turns, and the images in the parts of its messages, None for a part without an image.

    Turns alternate between human and gpt and end in gpt; a system turn may come first. `<image>` marks an image.

    Raises:
        InputError: the entry has no conversation, or it is wrong; the message names the turn.
    """
    if raw.get("prompt") is not None or raw.get("completion") is not None:
        raw = _with_messages(where, raw)
    if raw.get("messages") is None:
        return _alternating(where, "conversations", "from", _said(where, raw.get("conversations"), limits)), []
    if raw.get("conversations") is not None:
        raise InputError(f"{where}: the entry has both messages and conversations. Remove one of them.")
    said, images = _messages(where, raw["messages"], limits)
    if not images and not any(IMAGE in text for _, text in said) and (raw.get("image") or raw.get("images")):
        # As TRL does with images that no message places.
        first = next((i for i, (role, _) in enumerate(said) if role == "user"), None)
        said = [(role, f"{IMAGE}\n{text}" if i == first else text) for i, (role, text) in enumerate(said)]
    turns = _alternating(where, "messages", "role", said)
    return tuple((SPEAKERS[role], text) for role, text in turns), images


def _with_messages(where: str, raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns an entry of TRL's `prompt` and `completion`, which are both texts or both lists of messages, with
    `messages` instead."""
    if other := next((key for key in ("messages", "conversations") if raw.get(key) is not None), None):
        raise InputError(f"{where}: the entry has both prompt or completion and {other}. Remove one of them.")
    prompt, completion = raw.get("prompt"), raw.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    elif isinstance(prompt, list) and isinstance(completion, list):
        messages = [*prompt, *completion]
    else:
        raise InputError(f"{where}: prompt, completion: expected two texts, or two lists of {{role, content}}.")
    return {**raw, "messages": messages}


def _said(where: str, raw: object, limits: LimitsConfig) -> list[tuple[object, str]]:
    """Returns (from, value) of every turn of `conversations`."""
    if not isinstance(raw, list) or not raw:
        raise InputError(f"{where}: conversations: expected a non-empty list of {{from, value}}; or, "
                         "under the key messages, of {{role, content}}.")
    said = list[tuple[object, str]]()
    for number, turn in enumerate(raw):
        key = f"conversations[{number}]"
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise InputError(f"{where}: {key}: expected {{from, value}} with a text value.")
        said.append((turn.get("from"), checked_text(where, key, turn["value"], limits)))
    return said


def _messages(where: str, raw: object, limits: LimitsConfig) -> tuple[list[tuple[object, str]], list[object]]:
    """Returns (role, text) of every message, and the images in the parts of all of them."""
    if not isinstance(raw, list) or not raw:
        raise InputError(f"{where}: messages: expected a non-empty list of {{role, content}}.")
    said, images = list[tuple[object, str]](), list[object]()
    for number, message in enumerate(raw):
        key = f"messages[{number}]"
        message = message if isinstance(message, dict) else {}
        content = message.get("content")
        if not isinstance(content, str | list):
            raise InputError(f"{where}: {key}: expected {{role, content}} with a text or a list of parts as content.")
        texts = [content] if isinstance(content, str) else [
            _part(where, f"{key}.content[{i}]", part, images) for i, part in enumerate(content)]
        said.append((message.get("role"), checked_text(where, key, "\n".join(texts), limits)))
    return said, images


def _part(where: str, key: str, part: object, images: list[object]) -> str:
    """Returns the text of a part of a message, `<image>` for an image, which is added to `images`."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind not in ("text", "image", "image_url"):
        raise InputError(f"{where}: {key}: type {reprlib.repr(kind)}, expected text, image or image_url.")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise InputError(f"{where}: {key}: expected a text under the key text.")
        return str(part["text"])
    # The keys of chat templates of transformers. Tables have all keys in every part, null where there is none.
    given = [part[k] for k in ("image", "image_url", "url", "path") if part.get(k) is not None]
    given = [one["url"] if isinstance(one, dict) and isinstance(one.get("url"), str) else one for one in given]
    if len(given) > 1 or (kind == "image_url" and not given):
        raise InputError(f"{where}: {key}: expected one image, under the key {kind}.")
    images.append(given[0] if given else None)
    return IMAGE


def _alternating(where: str, key: str, by: str, said: list[tuple[Any, str]]) -> Turns:
    """Returns the turns, after checking who speaks: alternately human and gpt, or user and assistant.

    A system turn may come before them, and the last one must be an answer."""
    human, answer = ("human", "gpt") if key == "conversations" else ("user", "assistant")
    start = 1 if said[0][0] == "system" else 0
    for number, (speaker, _) in enumerate(said[start:]):
        expected = (human, answer)[number % 2]
        if speaker != expected:
            raise InputError(f"{where}: {key}[{number + start}].{by}: {reprlib.repr(speaker)}, expected "
                             f"{expected!r}. Turns must alternate, starting with {human}; before them, a system turn "
                             "may stand.")
    if len(said) == start or said[-1][0] != answer:
        raise InputError(f"{where}: {key}: the last turn must be an answer ({by}: {answer}).")
    return tuple(said)
