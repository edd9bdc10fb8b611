"""Tests of token ids against transformers' processor and chat templates, and of labels against character offsets."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import write_checkpoint, write_tokenizer
from PIL import Image
from transformers import LlavaProcessor

from pilot_jax.data.conversations import TEMPLATES, encode, stop_tokens
from pilot_jax.errors import InputError
from pilot_jax.models.checkpoints.processors import load_image_processor, load_tokenizer

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the user's questions. ")
CASES = {
    "one turn": (("human", "<image>\nwhat colour?"), ("gpt", "red")),
    "image behind the question": (("human", "what colour?\n<image>"), ("gpt", "red")),
    "image in the middle": (("human", "is <image> red?"), ("gpt", "yes")),
    "several turns": (("human", "<image>\nhow many?"), ("gpt", "two"), ("human", "sure?"), ("gpt", "I think so.")),
    "unicode": (("human", "<image>\nwas heißt 猫?"), ("gpt", "gatito 🐈 — naïve"), ("human", "ω?"), ("gpt", "Ωμέγα")),
    "empty answer": (("human", "<image>\nsay nothing."), ("gpt", ""), ("human", "again"), ("gpt", "")),
    "answer contains the template": (("human", "<image>\nquote"), ("gpt", "USER: what? ASSISTANT: that</s>"),
                                     ("human", "USER: me"), ("gpt", "ASSISTANT:")),
    "no image": (("human", "hello"), ("gpt", "  padded answer  ")),
}
N = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder)
    return folder


def vicuna_text(turns, image):
    """Returns the conversation as text for LlavaProcessor, and the (start, end) characters of each answer."""
    text, spans = SYSTEM, []
    for who, value in turns:
        if who == "human":
            question = value.replace("<image>", "").strip()
            text += "USER: " + (f"{image}\n{question}" if "<image>" in value else value) + " ASSISTANT:"
        else:
            start = len(text)
            text += " " + value.strip() + "</s>"
            spans.append((start, len(text)))
    return text, spans


@pytest.mark.parametrize("name", CASES)
def test_ids_equal_llava_processors(checkpoint, name):
    tokenizer = load_tokenizer(checkpoint)
    processor = LlavaProcessor(
        image_processor=load_image_processor(checkpoint, "clip"), tokenizer=tokenizer, patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1)
    turns = CASES[name]
    text, _ = vicuna_text(turns, "<image>")
    images = [Image.new("RGB", (20, 30))] if "<image>" in text else None
    expected = processor(images=images, text=[text], return_tensors="np")["input_ids"][0]
    encoded = encode(tokenizer, turns, "vicuna_v1", N)
    np.testing.assert_array_equal(encoded.input_ids, expected)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("drop", [0, 6])
def test_labels_equal_character_offsets(checkpoint, name, drop):
    """A token is supervised if any of its characters belongs to an answer; the limit drops tokens at the end."""
    tokenizer = load_tokenizer(checkpoint)
    text, spans = vicuna_text(CASES[name], "<image>" * N)
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    inside = set()
    for start, end in spans:
        inside |= set(range(start, end))
    expected = [any(c in inside for c in range(a, b)) for a, b in offsets]
    limit = len(offsets) - drop
    encoded = encode(tokenizer, CASES[name], "vicuna_v1", N, limit)
    assert encoded.supervised.tolist() == expected[:limit]
    assert encoded.cut == sum(expected[limit:]) and (encoded.cut > 0) == (drop > 0)
    ends = encoded.input_ids[encoded.supervised] == tokenizer.eos_token_id
    assert drop or ends.sum() == text.count("</s>")  # the end token of every answer is supervised


def test_the_limit_never_cuts_an_image(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    turns = CASES["one turn"]
    before = int(np.flatnonzero(encode(tokenizer, turns, "vicuna_short", N).input_ids == 5)[-1])  # last image token
    assert (encode(tokenizer, turns, "vicuna_short", N, before + 1).input_ids == 5).sum() == N
    with pytest.raises(InputError, match=r"would cut the image \(4 tokens\)"):
        encode(tokenizer, turns, "vicuna_short", N, before)


LLAMA2 = ("{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + "
          "' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
CHATML = ("{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' "
          "}}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + "
          "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def by_chat_template(tokenizer, template, turns, **options):
    messages = []
    for who, value in turns:
        image = "<image>" * N + "\n" if "<image>" in value else ""
        messages.append({"role": "user" if who == "human" else "assistant",
                         "content": image + value.replace("<image>", "").strip()})
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("name", "jinja"), [("llama2", LLAMA2), ("chatml", CHATML)])
@pytest.mark.parametrize("case", ["one turn", "several turns", "unicode", "no image"])
def test_named_templates_equal_the_published_jinja(checkpoint, name, jinja, case):
    """The templates llama2 (without a system prompt) and chatml equal the chat templates of Llama-2-chat and Qwen."""
    tokenizer = load_tokenizer(checkpoint)
    encoded = encode(tokenizer, CASES[case], name, N)
    expected = by_chat_template(tokenizer, jinja, CASES[case])
    if name == "chatml":  # Qwen's tokenizers add no BOS, and its template ends in a line break, which is not supervised
        expected = [tokenizer.bos_token_id, *expected[:-1]]
    np.testing.assert_array_equal(encoded.input_ids, expected)
    learnt = tokenizer.decode(encoded.input_ids[encoded.supervised])
    end = {"llama2": " </s>", "chatml": "<|im_end|>"}[name]
    said = [value.strip() for who, value in CASES[case] if who == "gpt"]
    assert learnt == "".join(f"{' ' if name == 'llama2' else ''}{text}{end}" for text in said)


@pytest.mark.parametrize("case", ["one turn", "several turns", "unicode"])
def test_tokenizers_own_chat_template(tmp_path, case):
    write_tokenizer(tmp_path, chat_template=LLAMA2)
    tokenizer = load_tokenizer(tmp_path)
    encoded = encode(tokenizer, CASES[case], "tokenizer", N)
    np.testing.assert_array_equal(encoded.input_ids, by_chat_template(tokenizer, LLAMA2, CASES[case]))
    same = encode(tokenizer, CASES[case], "llama2", N)
    np.testing.assert_array_equal(encoded.input_ids, same.input_ids)
    np.testing.assert_array_equal(encoded.supervised, same.supervised)
    prompt = encode(tokenizer, CASES[case][:-1], "tokenizer", N)
    assert tokenizer.decode(prompt.input_ids).endswith("[/INST]")


def test_a_chat_template_that_rewrites_the_past_is_refused(tmp_path):
    forgetful = "{% for m in messages %}{{ loop.revindex ~ m['content'] ~ eos_token }}{% endfor %}"
    write_tokenizer(tmp_path, chat_template=forgetful)
    with pytest.raises(InputError, match="rewrites earlier turns"):
        encode(load_tokenizer(tmp_path), CASES["several turns"], "tokenizer", N)


def test_prompts_end_in_the_cue(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    cues = {"vicuna_v1": " ASSISTANT:", "vicuna_short": " ASSISTANT:", "llama2": " [/INST]",
            "chatml": "<|im_start|>assistant\n", "chatml_short": "<|im_start|>assistant\n", "plain": "what colour?"}
    assert set(cues) == set(TEMPLATES)
    for name, cue in cues.items():
        whole, prompt = (encode(tokenizer, CASES["one turn"][:n], name, N) for n in (2, 1))
        assert tokenizer.decode(prompt.input_ids).endswith(cue) and not prompt.supervised.any()
        if name not in ("plain", "chatml", "chatml_short"):  # in these, the cue's last token may extend into the answer
            np.testing.assert_array_equal(whole.input_ids[:len(prompt.input_ids)], prompt.input_ids)


def test_stop_tokens(checkpoint, tmp_path):
    tokenizer = load_tokenizer(checkpoint)
    assert stop_tokens(tokenizer, "vicuna_v1") == (2,)
    assert stop_tokens(tokenizer, "chatml") == (6, 2)  # <|im_end|> is first: it fills finished rows
    with pytest.raises(InputError, match="no chat template"):
        stop_tokens(tokenizer, "tokenizer")
    with pytest.raises(InputError, match="'vicuna' is not known"):
        stop_tokens(tokenizer, "vicuna")


def test_chatml_needs_its_end_token():
    from pilot_jax.models.pretrained import model_directory

    with pytest.raises(InputError, match=r"ends answers with <\|im_end\|>"):
        stop_tokens(load_tokenizer(model_directory("embedded")), "chatml")
