"""From a LLaVA conversation to token ids with answer-only supervision."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from pilot_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IMAGE = "<image>"


@dataclasses.dataclass(frozen=True)
class Template:
    """`system` + for each exchange: `user` + question + `assistant` + " " + answer + end token."""

    system: str
    user: str
    assistant: str


TEMPLATES = {
    # Vicuna v1.1, what LLaVA-1.5 and the paper train with.
    "vicuna_v1": Template(
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. ", "USER: ", " ASSISTANT:"),
    # The same turns without the system sentence: short, for the embedded base.
    "vicuna_short": Template("", "USER: ", " ASSISTANT:"),
}


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One conversation. `supervised[i]` says that token i belongs to an answer (its end token included)."""

    input_ids: np.ndarray  # int32 [L], image tokens expanded
    supervised: np.ndarray  # bool [L]


def _render(turns: tuple[tuple[str, str], ...], template: Template, num_image_tokens: int,
            end: str) -> tuple[str, list[tuple[int, int]]]:
    """The whole conversation as text, and the character spans of its answers.

    A last human turn without an answer ends in the assistant's cue: a prompt for generation.
    """
    text, spans = template.system, []
    for speaker, value in turns:
        if speaker == "human":
            if IMAGE in value:  # LLaVA's convention: the image opens its turn, whatever place the author gave it
                value = f"{IMAGE * num_image_tokens}\n{value.replace(IMAGE, '').strip()}"
            text += template.user + value + template.assistant
        else:
            start = len(text)
            text += f" {value.strip()}{end}"
            spans.append((start, len(text)))
    return text, spans


def encode(tokenizer: PreTrainedTokenizerFast, turns: tuple[tuple[str, str], ...], template: str,
           num_image_tokens: int) -> Encoded:
    """Token ids of a conversation, the answers marked.

    The text is tokenised once and whole, exactly as `LlavaProcessor` would; offsets then say which tokens lie in an
    answer. (Tokenising pieces and joining them gives other ids wherever a merge crosses a seam.)

    Args:
        turns: ("human" | "gpt", text) in alternation. num_image_tokens: N.
    """
    text, spans = _render(turns, TEMPLATES[template], num_image_tokens, tokenizer.eos_token)
    out = tokenizer(text, return_offsets_mapping=True)
    starts, ends = np.asarray(out["offset_mapping"], np.int64).reshape(-1, 2).T
    supervised = np.zeros(len(starts), bool)
    for start, end in spans:
        supervised |= (ends > start) & (starts < end) & (ends > starts)
    return Encoded(np.asarray(out["input_ids"], np.int32), supervised)


def check_template(name: str) -> None:
    if name not in TEMPLATES:
        raise InputError(f"data.template: {name!r} is not known. Use one of {', '.join(TEMPLATES)}.")
