"""Shared fixtures: small random checkpoints written by transformers, and a small federation."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the tests' time, and many files want the same programs: all workers, and the processes that tests
# start, find them in one folder, which goes when the tests end.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/pilot-jax-programs-{os.getpid()}")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**31))  # with a limit, JAX locks what it reads and writes

import jax
import numpy as np
import pytest

import pilot_jax
from pilot_jax import cli
from pilot_jax.config import parse_config
from pilot_jax.runs import prepare

TINY_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
             "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TINY_VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
               "image_size": 16, "patch_size": 8}
IMAGE_TOKEN = 5


def write_llava(folder, *, vision=None, text=None, **options):
    """A random LLaVA checkpoint written by transformers; returns the torch model.

    `vision` and `text` override the tiny shapes; their `model_type` chooses the family (default CLIP and Llama).
    """
    import torch
    from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    save = options.pop("save", {})
    parts = {"vision_config": {"model_type": "clip_vision_model"} | TINY_VISION | (vision or {}),
             "text_config": {"model_type": "llama"} | TINY_TEXT | (text or {})}
    config = LlavaConfig(**{name: AutoConfig.for_model(**raw).to_dict() for name, raw in parts.items()},
                         image_token_index=IMAGE_TOKEN, **options)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():  # random biases and norms too, so that a mix-up shows
        for name, parameter in model.named_parameters():
            std = 0.3 if parameter.ndim == 1 else 0.15
            parameter.copy_(torch.randn_like(parameter) * std + (1.0 if "norm" in name and "weight" in name else 0.0))
    model.to(save.pop("dtype", torch.float32)).save_pretrained(folder, **save)
    if model.dtype != torch.float32:  # not model.float(): its rotary buffers have been rounded with the rest
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def write_tokenizer(folder, *, size=400, chat_template=None, image=True):
    """A byte-level BPE tokenizer trained here, with a BOS that it puts first, as Llama's does; returns it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", *(["<image>"] if image else ["<spare>"]), "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["USER: what is the colour of the cat? ASSISTANT: the cat is red. How many? two, I think."] * 4
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   pad_token="<pad>", chat_template=chat_template)
    fast.save_pretrained(folder)
    return fast


def write_checkpoint(folder, *, chat_template=None, **options):
    """`write_llava` with the tokenizer and image processor that a downloaded checkpoint brings."""
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    text = {"vocab_size": 400} | options.pop("text", {})
    model = write_llava(folder, text=text, **options)
    assert len(write_tokenizer(folder, chat_template=chat_template)) <= text["vocab_size"]
    side = model.config.vision_config.image_size
    if model.config.vision_config.model_type == "clip_vision_model":
        CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}
                              ).save_pretrained(folder)
    else:
        SiglipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
    return model


def pytest_unconfigure(config):
    if os.environ["JAX_COMPILATION_CACHE_DIR"].endswith(f"-programs-{os.getpid()}"):
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Compiled programs of one file's tests go with it: hundreds of them exhaust a process' memory maps, and XLA's
    compiler then crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(torch model, pilot_jax model) of one tiny random checkpoint."""
    folder = tmp_path_factory.mktemp("tiny")
    return write_llava(folder), pilot_jax.load(folder)


def small_config(**sections):
    """A federation of real parts, small enough for a test: the shipped base, few scenes, few steps."""
    raw = {
        "model": {"lora": {"rank": 4, "alpha": 8}},
        "data": {"template": "vicuna_short", "digits": {"train": 10, "validation": 2, "test": 2}},
        "federation": {"rounds": 1, "local_steps": 2},
        "train": {"batch_size": 4},
        "eval": {"max_new_tokens": 4, "batch_size": 2},
        # One program for all tasks, and a short one: compiling is most of a test's time.
        "system": {"length_spread": 4.0, "unroll": 1},
    }
    for name, section in sections.items():
        for key, value in section.items():
            old = raw.setdefault(name, {}).get(key)
            raw[name][key] = {**old, **value} if isinstance(old, dict) else value
    return parse_config(raw)


@pytest.fixture(scope="session")
def federation():
    """(federation, tokenizer, initial state) of `small_config()`."""
    fed, tokenizer = prepare.prepare(small_config())
    return fed, tokenizer, prepare.initial_state(fed)


def tree_max_difference(a, b) -> float:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return max(float(np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64))))
               for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command; returns (exit code, stdout, stderr)."""
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["pilot-jax", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out = capsys.readouterr()
        return caught.value.code or 0, out.out, out.err

    return run
