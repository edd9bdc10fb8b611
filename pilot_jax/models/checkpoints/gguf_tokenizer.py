"""Builds the tokenizer that a GGUF file describes: byte-level BPE ("gpt2") or SentencePiece's BPE ("llama")."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pilot_jax.errors import InputError
from pilot_jax.models.checkpoints.library import transformers

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

CONTROL, USER_DEFINED = 3, 4  # kinds of tokens in `tokenizer.ggml.token_type`
# The expressions by which Llama 3 and Qwen2 split a text into words. They differ in the digits of a number.
_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
# By `tokenizer.ggml.pre`: the expression, or None for GPT-2's.
SPLITS = {"default": None, "gpt-2": None, "smollm": None, "llama-bpe": _WORDS.replace("DIGITS", "{1,3}"),
          "qwen2": _WORDS.replace("DIGITS", "")}
SINGLE_DIGITS = ("smollm",)  # GPT-2's expression behind a split of numbers into digits


def gguf_tokenizer(file: Path, fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Returns the tokenizer of a GGUF file as one of transformers.

    Args:
        file: the file, for messages.
        fields: the values of its keys.

    Raises:
        InputError: the tokenizer is of a kind that is not read, or is incomplete.
    """
    from tokenizers import AddedToken, processors

    kind, tokens, types = (fields.get(f"tokenizer.ggml.{key}") for key in ("model", "tokens", "token_type"))
    if kind not in ("gpt2", "llama") or not isinstance(tokens, list) or not isinstance(types, list):
        raise InputError(f"{file}: tokenizer.ggml.model is {kind!r}, expected gpt2 or llama with a list of tokens. "
                         "Give the model's Hugging Face directory instead.")
    try:
        tokenizer = _byte_level(file, tokens, fields) if kind == "gpt2" else _sentencepiece(tokens, types, fields)
        added = [(t, k) for t, k in zip(tokens, types, strict=True) if k in (CONTROL, USER_DEFINED)]
        tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in added if k == CONTROL])
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in added if k == USER_DEFINED])
        named = {role: tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
                 for role, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"),
                                   ("unk_token", "unknown")) if f"tokenizer.ggml.{key}_token_id" in fields}
        if "bos_token" in named and fields.get("tokenizer.ggml.add_bos_token", kind == "llama"):
            bos = named["bos_token"]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))])
        return cast("PreTrainedTokenizerFast", transformers().PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, chat_template=fields.get("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False, **named))
    except InputError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        raise InputError(f"{file}: its tokenizer cannot be built ({type(error).__name__}: {error}). Fetch the file "
                         "again.") from None


def _byte_level(file: Path, tokens: list[str], fields: Mapping[str, Any]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    split = fields.get("tokenizer.ggml.pre", "default")
    if split not in SPLITS:
        raise InputError(f"{file}: tokenizer.ggml.pre is {split!r}, expected one of {', '.join(SPLITS)}. Give the "
                         "model's Hugging Face directory instead.")
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges,
                                     ignore_merges=split == "llama-bpe"))
    words, steps = SPLITS[split], list[pre_tokenizers.PreTokenizer]()
    if split in SINGLE_DIGITS:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if words is not None:
        steps.append(pre_tokenizers.Split(Regex(words), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merges(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Returns the pairs of tokens that SentencePiece would join, those with the highest score of the result first."""
    vocab = {t: i for i, t in enumerate(tokens) if types[i] == 1}
    pairs = [(-scores[i], -len(t[:cut]), t[:cut], t[cut:]) for t, i in vocab.items() for cut in range(1, len(t))
             if t[:cut] in vocab and t[cut:] in vocab]
    return [(left, right) for _, _, left, right in sorted(pairs)]


def _sentencepiece(tokens: list[str], types: list[int], fields: Mapping[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    merges = _merges(tokens, types, fields["tokenizer.ggml.scores"])
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, unk_token=unknown,
                                     fuse_unk=True, byte_fallback=True))
    # "▁" stands for a space, and one is put before the text.
    before = [normalizers.Prepend("▁")] if fields.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           *([decoders.Strip(" ", 1, 0)] if before else [])])
    return tokenizer
