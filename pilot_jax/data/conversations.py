"""Encodes LLaVA conversations as token ids, of which only the answers are supervised."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pilot_jax.cache import as_json
from pilot_jax.data.llava.turns import IMAGE, Turns
from pilot_jax.data.tokenizer import remembered_by
from pilot_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class Template:
    """The form in which a conversation is written as text. Answers, and the end token after each, are supervised."""

    human: str  # form of a human turn; "{}" stands for its text
    answer: str  # form of an answer; "{}" stands for its text
    system: str = ""  # text before the first turn of a conversation without a system turn
    system_turn: str = ""  # form of a system turn, "{}" for its text; "": the template has no place for one
    system_inside: bool = False  # whether a system turn is put before the text of the first human turn, not before it
    end: str | None = None  # end token after an answer; None: the tokenizer's eos_token
    between: str = ""  # text between an end token and the next turn; "{bos}" stands for the tokenizer's bos_token


CHATML_SYSTEM = "<|im_start|>system\n{}<|im_end|>\n"
TEMPLATES = {
    # Vicuna v1.1, as in LLaVA-1.5 and the paper.
    "vicuna_v1": Template(
        "USER: {} ASSISTANT:", " {}",
        system="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
               "detailed, and polite answers to the user's questions. ", system_turn="{} "),
    # The same turns without the system sentence, so that prompts for the embedded base are short.
    "vicuna_short": Template("USER: {} ASSISTANT:", " {}", system_turn="{} "),
    # Llama-2-chat, without a system prompt unless the conversation has one.
    "llama2": Template("[INST] {} [/INST]", " {} ", between="{bos}", system_turn="<<SYS>>\n{}\n<</SYS>>\n\n",
                       system_inside=True),
    # ChatML in Qwen's form.
    "chatml": Template("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "{}",
                       system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", end="<|im_end|>",
                       between="\n", system_turn=CHATML_SYSTEM),
    # The same turns without the system message, so that prompts for small models are short.
    "chatml_short": Template("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "{}", end="<|im_end|>",
                             between="\n", system_turn=CHATML_SYSTEM),
    # Image, text and end token without roles, as in the pretraining of LLaVA's projectors.
    "plain": Template("{}", "{}"),
}
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}  # by speaker
TOKENIZER = "tokenizer"  # the value of `data.template` that means the tokenizer's own chat template


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One conversation of L tokens, with all N image tokens of its image."""

    input_ids: np.ndarray  # int32 [L]
    supervised: np.ndarray  # bool [L]: whether a token belongs to an answer, its end token included
    cut: int = 0  # number of supervised tokens beyond the length limit


def expand_image(turns: Turns, num_image_tokens: int) -> Turns:
    """Returns the turns with `<image>` replaced by N image tokens at the start of its turn, as LLaVA does."""

    def one(value: str) -> str:
        if IMAGE not in value:
            return value
        return f"{IMAGE * num_image_tokens}\n{value.replace(IMAGE, '').strip()}"

    return tuple((who, one(value) if who == "human" else value) for who, value in turns)


def _render(turns: Turns, template: Template, eos: str, bos: str) -> tuple[str, list[tuple[int, int]]]:
    """Returns the whole conversation as text, and the (start, end) characters of its answers.

    If the last turn is a human one, the text ends in the template's cue for the answer, as prompts for generation do.
    """
    text, spans, inside = template.system, [], ""
    between = template.between.replace("{bos}", bos)
    before, after = template.human.split("{}")
    if turns[0][0] == "system":
        own = template.system_turn.replace("{}", turns[0][1].strip())
        text, inside, turns = ("", own, turns[1:]) if template.system_inside else (own, "", turns[1:])
    for number, (speaker, value) in enumerate(turns):
        if speaker == "human":
            text += before + (inside if number == 0 else "") + value + after
        else:
            start = len(text)
            text += template.answer.replace("{}", value.strip()) + (template.end or eos)
            spans.append((start, len(text)))
            if number + 1 < len(turns):
                text += between
    return text, spans


MOST_TEMPLATE_SECONDS = 5.0
MOST_TEMPLATE_BYTES = 2**31  # what rendering may add to the process's memory
MOST_TEMPLATE_CHARACTERS = 10_000_000


@contextmanager
def _time_limit() -> Iterator[None]:
    """Ends the block by a TimeoutError after some seconds, in the main thread and where the system has such a timer."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise TimeoutError(f"it was not done after {MOST_TEMPLATE_SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, MOST_TEMPLATE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _memory_limit() -> Iterator[None]:
    """Ends the block by a MemoryError if the process grows by `MOST_TEMPLATE_BYTES`, where the system can tell (Linux).

    A template can ask for any amount in one step ('a' * 10**11), which no timer interrupts.
    """
    used = Path("/proc/self/statm")
    if not used.exists():
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(used.read_text().split()[0]) * resource.getpagesize() + MOST_TEMPLATE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(soft, limit), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _apply_template(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], cue: bool) -> str:
    """Returns the text of the messages by the checkpoint's chat template, with the cue for an answer if asked.

    Raises:
        InputError: the template fails, or needs too much time or memory.
    """
    try:
        with _time_limit(), _memory_limit():
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=cue))
        if len(text) > MOST_TEMPLATE_CHARACTERS:
            raise ValueError(f"its text has {len(text)} characters")
    except Exception as error:  # a template is a program in the checkpoint; transformers runs it in Jinja's sandbox
        raise InputError(f"data.template: tokenizer: the checkpoint's chat template fails "
                         f"({str(error) or type(error).__name__}). Choose a named template.") from None
    return text


def _render_by_tokenizer(turns: Turns, tokenizer: PreTrainedTokenizerFast) -> tuple[str, list[tuple[int, int]]]:
    """Returns the same as `_render`, by the tokenizer's chat template; an answer is the text that follows its cue."""
    messages = [{"role": ROLES[who], "content": value} for who, value in turns]

    def text_of(count: int, cue: bool) -> str:
        return _apply_template(tokenizer, messages[:count], cue)

    whole, spans = text_of(len(turns), turns[-1][0] == "human"), []
    if turns[0][0] == "system" and turns[0][1].strip() not in whole:
        raise InputError("data.template: tokenizer: the tokenizer's chat template leaves a system turn out. Remove the "
                         "turn, or choose a named template.")
    for number, (speaker, _) in enumerate(turns):
        if speaker != "gpt":
            continue
        prompt, answered = text_of(number, True), text_of(number + 1, False)
        if not answered.startswith(prompt) or not whole.startswith(answered):
            raise InputError("data.template: the tokenizer's chat template rewrites earlier turns when a conversation "
                             "goes on, so its answers cannot be located. Choose a named template.")
        end = answered.rfind(tokenizer.eos_token, len(prompt))
        spans.append((len(prompt), len(answered) if end < 0 else end + len(tokenizer.eos_token)))
    return whole, spans


def check_system(turns: Turns, template: str) -> None:
    """Refuses a system turn if the named template has no place for one; a chat template is checked when it is used.

    Raises:
        InputError: there is one.
    """
    if turns[0][0] == "system" and template in TEMPLATES and not TEMPLATES[template].system_turn:
        able = [name for name, one in TEMPLATES.items() if one.system_turn]
        raise InputError(f"data.template: {template} has no place for a system turn. Remove the turn, or choose a "
                         f"template that has one ({', '.join(able)}).")


def encode(tokenizer: PreTrainedTokenizerFast, turns: Turns, template: str, num_image_tokens: int,
           max_length: int | None = None) -> Encoded:
    """Returns the token ids of a conversation, with the answers marked.

    The text is tokenised as a whole, exactly as transformers' `LlavaProcessor` does; character offsets then show which
    tokens belong to an answer. (Tokenising pieces and joining them gives other ids where a token spans two pieces.)

    Args:
        turns: the turns, ("human" | "gpt", text), alternating; ("system", text) may stand before them.
        template: a name in `TEMPLATES`, or `TOKENIZER`.
        num_image_tokens: N, the number of tokens of an image.
        max_length: the largest number of tokens; those beyond it are dropped, and the supervised ones counted in `cut`.

    Raises:
        InputError: image tokens lie beyond `max_length`, or the template has no place for a system turn, or the
            tokenizer's chat template cannot be used.
    """
    check_system(turns, template)
    turns = expand_image(turns, num_image_tokens)
    if template == TOKENIZER:
        text, spans = _render_by_tokenizer(turns, tokenizer)
    else:
        text, spans = _render(turns, TEMPLATES[template], tokenizer.eos_token, tokenizer.bos_token or "")
    # A chat template itself writes the special tokens at the start of a text.
    out = tokenizer(text, return_offsets_mapping=True, add_special_tokens=template != TOKENIZER)
    ids = np.asarray(out["input_ids"], np.int32)
    starts, ends = np.asarray(out["offset_mapping"], np.int64).reshape(-1, 2).T
    supervised = np.zeros(len(ids), bool)
    for start, end in spans:
        supervised |= (ends > start) & (starts < end) & (ends > starts)
    if max_length is None or len(ids) <= max_length:
        return Encoded(ids, supervised)
    if (ids[max_length:] == tokenizer.convert_tokens_to_ids(IMAGE)).any():
        raise InputError(f"data.max_length: {max_length} would cut the image ({num_image_tokens} tokens) of a "
                         f"conversation of {len(ids)} tokens. Raise the limit.")
    return Encoded(ids[:max_length], supervised[:max_length], int(supervised[max_length:].sum()))


def stop_tokens(tokenizer: PreTrainedTokenizerFast, template: str) -> tuple[int, ...]:
    """Returns the ids of the tokens that end an answer: the template's end token and the tokenizer's own.

    Raises:
        InputError: there is no such template, or the tokenizer does not have the template's end token.
    """
    return remembered_by(tokenizer, f"stop {template}", as_json(tuple[int, ...]),
                         lambda: _stop_tokens(tokenizer, template))


def _stop_tokens(tokenizer: PreTrainedTokenizerFast, template: str) -> tuple[int, ...]:
    if template == TOKENIZER:
        if not tokenizer.chat_template:
            raise InputError("data.template: tokenizer: this checkpoint's tokenizer has no chat template. "
                             f"Use one of {', '.join(TEMPLATES)}.")
        return (tokenizer.eos_token_id,)
    if template not in TEMPLATES:
        raise InputError(f"data.template: {template!r} is not known. Use one of {', '.join([*TEMPLATES, TOKENIZER])}.")
    end = TEMPLATES[template].end
    if end is None:
        return (tokenizer.eos_token_id,)
    if end not in tokenizer.get_vocab():
        raise InputError(f"data.template: {template} ends answers with {end}, which this checkpoint's tokenizer does "
                         "not have. Choose the template the model was trained with.")
    return tuple(dict.fromkeys((tokenizer.convert_tokens_to_ids(end), tokenizer.eos_token_id)))
