"""Tests of GGUF files against transformers' own reading of them, and of their tokenizers against sentencepiece."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from conftest import slow_except, write_llava
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel
from written_parts import write_gguf

import pilot_jax
from pilot_jax.errors import InputError
from pilot_jax.models.checkpoints.gguf import GgufFile

TEXTS = ["Hello 1234 world! It's naïve, isn't it?", "  two  spaces\n\nand lines\t", "日本語 emoji 🙂", "x=3.14;y<=7",
         ""]


@pytest.fixture
def load(tmp_path):
    """Returns a function that loads a GGUF file together with a random CLIP tower and projector."""
    whole = write_llava(tmp_path / "whole", text={"hidden_size": 64})
    tower = CLIPVisionModel(whole.config.vision_config)
    tower.load_state_dict(whole.model.vision_tower.state_dict())
    tower.save_pretrained(tmp_path / "tower")
    save_file({f"mm_projector.{n}.{k}": v.detach().clone() for n, layer in (("0", "linear_1"), ("2", "linear_2"))
               for k, v in getattr(whole.model.multi_modal_projector, layer).named_parameters()},
              tmp_path / "projector.safetensors")
    return lambda file: pilot_jax.load_from_parts(tmp_path / "tower", file, tmp_path / "projector.safetensors")


@pytest.mark.parametrize(("arch", "kind", "tied"), slow_except([("llama", "Q4_1", True)], [
    ("llama", "Q4_1", True), ("llama", "Q8_0", False), ("llama", "F16", False), ("llama", "BF16", True),
    ("qwen2", "Q8_0", True), ("qwen2", "Q4_0", False), ("llama", "F32", False)]))
def test_logits_equal_those_of_transformers(tmp_path, load, arch, kind, tied):
    file = write_gguf(tmp_path / "model.gguf", arch=arch, kind=GGMLQuantizationType[kind], tied=tied)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    ids = np.random.default_rng(0).integers(3, 320, (2, 12))
    with torch.no_grad():
        theirs = reference(torch.tensor(ids)).logits.numpy()
    model = load(file)
    assert model.config.text.tie_word_embeddings == tied and model.config.image_token_id == 320
    np.testing.assert_allclose(model.logits(ids), theirs, atol=1e-4)
    ids[:, 2:6], pixels = 320, np.zeros((2, 3, 16, 16), np.float32)
    assert np.isfinite(np.asarray(model.logits(ids, None, pixels))).all()


def test_byte_level_tokenizers(tmp_path):
    """Ids equal those of transformers' reading of the file, and texts come back; what a special token is stays one."""
    file = write_gguf(tmp_path / "model.gguf", pre="gpt-2")
    ours, theirs = GgufFile(file).tokenizer(), AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in [*TEXTS, "a<|im_end|>\nb"]:
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == text
    assert ours.eos_token == "<|im_end|>" and ours.pad_token == "<|pad|>"
    assert ours.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello<|im_end|>"


@pytest.mark.parametrize(("pre", "digits"), [("smollm", [["1"], ["2"], ["3"], ["4"]]), ("llama-bpe", [["123"], ["4"]]),
                                             ("qwen2", [["1"], ["2"], ["3"], ["4"]]), ("default", [["1234"]])])
def test_numbers_are_split_as_the_tokenizer_says(tmp_path, pre, digits):
    tokenizer = GgufFile(write_gguf(tmp_path / "model.gguf", pre=pre)).tokenizer()
    words = [[w] for w, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("1234")]
    assert words == digits
    joined = tokenizer.tokenize("1234")
    assert joined == (["1234"] if pre == "default" else ["12", "3", "4"] if pre == "llama-bpe" else list("1234"))


def test_sentencepiece_tokenizers(tmp_path):
    """A BPE model that sentencepiece has trained gives the same ids from a GGUF file, for texts of any bytes."""
    sentencepiece = pytest.importorskip("sentencepiece")
    words = ["the cat sat on the mat", "a red cat and a blue dog", "what colour is the dog? it's blue 123"] * 20
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=out, vocab_size=320, model_type="bpe", byte_fallback=True,
        pad_id=-1, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        minloglevel=2)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    pieces = [oracle.id_to_piece(i) for i in range(320)]

    def spm(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(pieces)
        writer.add_token_scores([oracle.get_score(i) for i in range(320)])
        writer.add_token_types([2 if oracle.is_unknown(i) else 3 if oracle.is_control(i) else
                                6 if oracle.is_byte(i) else 1 for i in range(320)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    tokenizer = GgufFile(write_gguf(tmp_path / "model.gguf", tokenizer=False, change=spm)).tokenizer()
    for text in [*TEXTS[:-1], *words[:3], "the dogs' mats"]:
        assert tokenizer(text).input_ids == [1, *oracle.encode(text)], text
        assert tokenizer.decode(oracle.encode(text)) == text


BROKEN = {
    "another architecture": ({"arch": "gpt2"}, "general.architecture is 'gpt2', expected one of llama, qwen2"),
    "no tokenizer": ({"tokenizer": False}, "tokenizer.ggml.model is None"),
    "unknown words": ({"pre": "tekken"}, "tokenizer.ggml.pre is 'tekken', expected one of"),
    "experts": ({"change": lambda w: w.add_expert_count(8)}, "a mixture of experts is not read"),
    "scaled positions": ({"change": lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32))},
                         "the scaling of its rotary positions is not read"),
    "an unknown tensor": ({"change": lambda w: w.add_tensor("blk.0.attn_q_norm.weight", np.ones(16, np.float32))},
                          "belong to no part of the model"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_refused(tmp_path, load, name):
    options, message = BROKEN[name]
    if options.get("arch") == "gpt2":
        writer = GGUFWriter(tmp_path / "model.gguf", "gpt2")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    else:
        write_gguf(tmp_path / "model.gguf", **options)
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path / "model.gguf")
    assert str(tmp_path) in str(caught.value)


def test_torn_files_are_refused(tmp_path, load):
    whole = write_gguf(tmp_path / "whole.gguf", kind=GGMLQuantizationType.Q8_0).read_bytes()
    for number, size in enumerate((0, 3, 40, 2000, len(whole) // 2, len(whole) - 1)):
        file = tmp_path / f"{number}.gguf"
        file.write_bytes(whole[:size])
        with pytest.raises(InputError, match=rf"{number}\.gguf"):
            load(file)
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path / "none.gguf")
