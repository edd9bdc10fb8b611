"""Tests conversations as OpenAI and TRL write them, in entries, files and tables, and the place of system turns."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from conftest import llava_entry, write, write_tokenizer
from PIL import Image

from pilot_jax.data.conversations import encode
from pilot_jax.data.images import read_image
from pilot_jax.data.llava.image_field import EncodedImage
from pilot_jax.data.llava.reading import read_samples
from pilot_jax.data.llava.sample import Entry, parse_sample
from pilot_jax.errors import InputError
from pilot_jax.models.checkpoints.processors import load_tokenizer


def png(colour="red"):
    file = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(file, "PNG")
    return file.getvalue()


URL = "data:image/png;base64," + base64.b64encode(png()).decode()
TEXT = {"type": "text", "text": "what colour?"}


def entry(content, *before, answer="red", **keys):
    messages = [*before, {"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"task": "t", "client": "c", "messages": messages, **keys}


def parsed(value, root=None):
    return parse_sample(Entry("f.json[3]", value, "", "", "train"), root)


MARKED = (("human", "<image>\nwhat colour?"), ("gpt", "red"))
FORMS = {
    "a part with a data URL": entry([{"type": "image_url", "image_url": {"url": URL}}, TEXT]),
    "a data URL as a text": entry([{"type": "image_url", "image_url": URL}, TEXT]),
    "a part with an image": entry([{"type": "image", "image": Image.new("RGB", (2, 2), "red")}, TEXT]),
    "a part with bytes": entry([{"type": "image", "image": {"bytes": png(), "path": None}}, TEXT]),
    "a column of images": entry([{"type": "image"}, TEXT], images=[EncodedImage(png())]),
    "a column of images for a text": entry("what colour?", images=[png()]),
    "an image for a text": entry("what colour?", image=png()),
    "a mark in the text": entry("<image>\nwhat colour?", images=[png()]),
    "TRL's prompt and completion": {"task": "t", "client": "c", "images": [png()], "prompt": "what colour?",
                                    "completion": "red"},
    "TRL's prompt and completion as messages": {
        "task": "t", "client": "c", "images": [png()], "prompt": entry([{"type": "image"}, TEXT])["messages"][:1],
        "completion": entry("", answer="red")["messages"][1:]},
    "keys without values, as tables have them": entry([{"type": "image", "text": None, "image_url": None},
                                                       TEXT | {"image_url": None}], images=[png()]),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_in_every_form(form):
    sample = parsed(FORMS[form])
    assert sample.turns == MARKED
    assert (np.asarray(read_image(sample)) == [255, 0, 0]).all()


def test_paths_start_from_the_root(tmp_path):
    (tmp_path / "x.png").write_bytes(png())
    for part in ({"type": "image", "path": "x.png"}, {"type": "image_url", "image_url": {"url": "x.png"}}):
        assert parsed(entry([part, TEXT]), tmp_path).image == tmp_path / "x.png"
    with pytest.raises(InputError, match=r"f\.json\[3\]: image: '/etc/passwd' must be a path inside"):
        parsed(entry([{"type": "image_url", "image_url": "/etc/passwd"}, TEXT]), tmp_path)


def test_system_turns_several_turns_and_parts_of_text():
    value = entry([TEXT, TEXT], {"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"},
                  {"role": "assistant", "content": "hello"})
    assert parsed(value).turns == (("system", "Be brief."), ("human", "hi"), ("gpt", "hello"),
                                   ("human", "what colour?\nwhat colour?"), ("gpt", "red"))
    spoken = llava_entry(conversations=[{"from": "system", "value": "s"}, {"from": "human", "value": "q"},
                                        {"from": "gpt", "value": "a"}])
    assert parsed(spoken).turns[0] == ("system", "s")


WRONG = {
    "two images": (entry([{"type": "image", "image": png()}] * 2 + [TEXT]), "2 images: several images.*not supported"),
    "two images in a column": (entry("q", images=[png(), png()]), "2 images: several images.*not supported"),
    "two images in LLaVA's key": (llava_entry(image=["a.png", "b.png"]), "2 images: several images.*not supported"),
    "two places for one image": (entry([{"type": "image"}] * 2, images=[png()]), "2 images.*not supported"),
    "no image for its place": (entry([{"type": "image"}, TEXT]), "a part of type image without an image"),
    "an address": (entry([{"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}]), "nothing is fetched"),
    "a torn data URL": (entry([{"type": "image_url", "image_url": "data:image/png;base64,a"}]), "not a valid data URL"),
    "sound": (entry([{"type": "input_audio"}]), r"messages\[0\]\.content\[0\]: type 'input_audio', expected text"),
    "a tool": (entry("q", {"role": "tool", "content": "x"}), r"messages\[0\]\.role: 'tool', expected 'user'"),
    "no content": (entry(None), r"messages\[0\]: expected \{role, content\}"),
    "a late system turn": (entry("q", {"role": "user", "content": "x"}, {"role": "system", "content": "x"}),
                           r"messages\[1\]\.role: 'system', expected 'assistant'"),
    "a system turn alone": ({"messages": [{"role": "system", "content": "x"}]}, "the last turn must be an answer"),
    "no answer": ({"messages": [{"role": "user", "content": "x"}]}, "the last turn must be an answer"),
    "both forms": (llava_entry() | entry("q"), "both messages and conversations"),
    "a prompt beside messages": (entry("q") | {"prompt": "x", "completion": "y"}, "both prompt or completion and mess"),
    "a prompt without completion": ({"task": "t", "prompt": "x"}, "expected two texts, or two lists"),
    "a prompt of another kind": ({"prompt": "x", "completion": [{"role": "assistant", "content": "y"}]}, "two texts"),
    "no message": (entry("q") | {"messages": []}, "messages: expected a non-empty list"),
    "an image in the system turn": (entry("q", {"role": "system", "content": [{"type": "image", "image": png()}]}),
                                    "<image> must stand once, in a human turn"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name):
    value, message = WRONG[name]
    with pytest.raises(InputError, match=rf"^f\.json\[3\]: .*{message}"):
        parsed(value)


def text_entry(number):
    return entry(f"what is {number}?", {"role": "system", "content": "Be brief."}, answer=str(number), id=str(number))


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet", "folder", "images in parquet"])
def test_files_and_tables_of_messages(tmp_path, form):
    entries = [text_entry(i) for i in range(3)]
    if form == "images in parquet":
        entries = [e | {"images": [{"bytes": png(), "path": None}]} for e in entries]
    if form == "json":
        write(tmp_path, "t.json", entries)
    elif form == "jsonl":
        write(tmp_path, "t.jsonl", "\n".join(map(json.dumps, entries)))
    else:
        import datasets

        table = datasets.Dataset.from_list(entries)
        if form == "images in parquet":
            table = table.cast_column("images", datasets.List(datasets.Image()))
        if form == "folder":
            table.save_to_disk(str(tmp_path / "table"))
        else:
            table.to_parquet(str(tmp_path / "t.parquet"))
    samples = read_samples(tmp_path / "table" if form == "folder" else tmp_path)
    mark = "<image>\n" if form == "images in parquet" else ""
    assert [s.turns for s in samples] == [
        (("system", "Be brief."), ("human", f"{mark}what is {i}?"), ("gpt", str(i))) for i in range(3)]
    if mark:
        assert (np.asarray(read_image(samples[1])) == [255, 0, 0]).all()


def test_byte_order_marks_and_line_ends_of_windows(tmp_path):
    entries = [llava_entry(id=str(i)) for i in range(3)]
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(entries, indent=1).replace("\n", "\r\n").encode())
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, entries)).encode() + b"\r\n\r\n")
    for name in ("a.json", "b.jsonl"):
        samples = read_samples(tmp_path / name)
        assert [s.id for s in samples] == ["0", "1", "2"] and samples[0].turns[0] == ("human", "q")


def test_names_of_pictures_in_either_form_of_unicode(tmp_path):
    (tmp_path / "caf\u00e9.png").write_bytes(png())  # é as one character
    one = llava_entry(image="cafe\u0301.png", conversations=[{"from": "human", "value": "<image>"},
                                                             {"from": "gpt", "value": "a"}])
    write(tmp_path, "d.json", [one])  # and as two
    assert read_samples(tmp_path / "d.json")[0].image.is_file()


# The chat templates of Llama-2-chat and of Qwen2 as their checkpoints have them, shortened to what they say of roles.
LLAMA2 = ("{% set rest = messages %}{% set s = '' %}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] "
          "%}{% set s = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% endif %}"
          "{% for m in rest %}{% set c = s + m['content'] if loop.index0 == 0 else m['content'] %}"
          "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + c.strip() + ' [/INST]' }}"
          "{% else %}{{ ' ' + c.strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
          "{% endfor %}")
TURNS = (("system", "Be brief."), ("human", "hi"), ("gpt", "hello"), ("human", "and?"), ("gpt", "yes"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, chat_template=LLAMA2)
    return load_tokenizer(folder)


def by_transformers(tokenizer, jinja, turns):
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    return tokenizer.apply_chat_template([{"role": roles[who], "content": text} for who, text in turns],
                                         chat_template=jinja, tokenize=False)


@pytest.mark.parametrize("turns", [TURNS, TURNS[:-1], TURNS[1:]])
def test_a_system_turn_has_the_place_that_the_published_templates_give_it(tokenizer, turns):
    expected = by_transformers(tokenizer, LLAMA2, turns)
    assert tokenizer.decode(encode(tokenizer, turns, "llama2", 0).input_ids) == expected
    assert tokenizer.decode(encode(tokenizer, turns, "tokenizer", 0).input_ids) == expected
    if turns == TURNS:
        expected = "<s>" + by_transformers(tokenizer, CHATML, turns).removesuffix("\n")
        for name in ("chatml", "chatml_short"):
            assert tokenizer.decode(encode(tokenizer, turns, name, 0).input_ids) == expected
        for name in ("vicuna_v1", "vicuna_short"):  # LLaVA's `conv_vicuna_v1`, with another system text
            found = encode(tokenizer, turns, name, 0)
            assert tokenizer.decode(found.input_ids) == ("<s>Be brief. USER: hi ASSISTANT: hello</s>USER: and? "
                                                         "ASSISTANT: yes</s>")
            assert tokenizer.decode(found.input_ids[found.supervised]) == " hello</s> yes</s>"


def test_a_template_without_a_place_is_named(tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"data\.template: plain has no place for a system turn"):
        encode(tokenizer, TURNS, "plain", 0)
    write_tokenizer(tmp_path, chat_template=CHATML.replace("{{", "{% if m['role'] != 'system' %}{{").replace(
        "{% endfor", "{% endif %}{% endfor"))
    with pytest.raises(InputError, match="chat template leaves a system turn out"):
        encode(load_tokenizer(tmp_path), TURNS, "tokenizer", 0)
