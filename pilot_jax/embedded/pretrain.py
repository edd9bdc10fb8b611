"""Trains the embedded base, a small CLIP and a small Llama, on digit scenes from the pool *pretrain* only.

There are two steps, as for real LLaVA bases. First the vision tower learns to name the digit and the ink in each grid
cell, which is what captions say. Then the projector and the language model learn to write captions, while the tower is
frozen. If everything is trained on captions at once, training stays on a plateau where the image is ignored.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pilot_jax.data.conversations import encode
from pilot_jax.embedded.scenes import CANVAS, GRID, INKS, Scene, draw_scene
from pilot_jax.embedded.tasks import TASKS, pretraining_caption
from pilot_jax.errors import InputError
from pilot_jax.files import new_folder
from pilot_jax.models.checkpoints.hf_config import read_vlm_config
from pilot_jax.models.checkpoints.writing import save_base
from pilot_jax.models.spec import VlmSpec
from pilot_jax.models.vlm import Vlm, variables

if TYPE_CHECKING:
    from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
TEMPLATE = "vicuna_short"
TOKENIZED = ("vqa", "ocr", "caption", "grounding")  # tasks whose texts, in the clients' wordings, made the tokenizer
NO_DIGIT, NO_INK = 10, len(INKS)  # the classes of an empty cell
Params = dict[str, Any]  # nested dicts of arrays
Lesson = Callable[[np.random.Generator, Scene], tuple[str, str]]  # makes an instruction and its answer


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """How projector and decoder of an embedded base are trained."""

    language_steps: int = 1600
    batch: int = 32  # samples in a step
    lr: float = 2e-3  # peak learning rate of the language step; the vision step has half of it
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class PretrainConfig(LanguageConfig):
    """Sizes and training settings of the embedded base; `configs/pretrain.yaml` has them."""

    width: int = 128  # D and C
    layers: int = 4  # number of layers of the tower, and of the language model
    heads: int = 4  # number of attention heads of the tower, and of the language model
    vocab: int = 512  # V
    vision_steps: int = 2000


def build_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer with `vocab` tokens, trained on captions and on the texts of four tasks.

    Each digit is a token, and any text can be encoded. The base model, unlike its tokenizer, is never trained on the
    questions and answers of the tasks.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    rng = np.random.default_rng(0)
    texts = []
    for _ in range(3000):
        scene = draw_scene(rng, "pretrain", None)
        texts += ["USER: \n", *pretraining_caption(rng, scene)]
        wording = int(rng.integers(5))
        texts += [f" {text} ASSISTANT:" for task in TOKENIZED for text in TASKS[task](rng, scene, wording)]
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"], clean_up_tokenization_spaces=False, padding_side="right",
        model_max_length=512)


def hf_config(config: PretrainConfig, vocab: int) -> dict[str, Any]:
    """Returns the content of the base's `config.json`."""
    patches = (CANVAS // 8) ** 2
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "image_token_index": SPECIAL.index("<image>"), "image_seq_length": patches,
        "projector_hidden_act": "gelu", "multimodal_projector_bias": True, "tie_word_embeddings": False,
        "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": config.width, "intermediate_size": 4 * config.width,
            "num_hidden_layers": config.layers, "num_attention_heads": config.heads, "image_size": CANVAS,
            "patch_size": 8, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": config.width},
        "text_config": {
            "model_type": "llama", "hidden_size": config.width, "intermediate_size": 11 * config.width // 4,
            "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
            "num_key_value_heads": config.heads, "head_dim": config.width // config.heads, "vocab_size": vocab,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2, "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    }


def image_processor() -> CLIPImageProcessorPil:
    """Returns the base's image processor, which is CLIP's for the size of the canvas."""
    from transformers import CLIPImageProcessorPil

    side = {"height": CANVAS, "width": CANVAS}
    return CLIPImageProcessorPil(size=side, crop_size=side)


def _pixels(scenes: list[Scene]) -> np.ndarray:
    """Returns the scenes' pixel values, float32 [B, H, W, 3], as the image processor computes them, but faster."""
    processor = image_processor()
    raw = np.stack([np.asarray(scene.image) for scene in scenes]).astype(np.float32) / 255.0
    return (raw - np.asarray(processor.image_mean, np.float32)) / np.asarray(processor.image_std, np.float32)


def _vision_batch(rng: np.random.Generator, pool: str, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns pixels [B, H, W, 3] of scenes with up to 9 digits, and the digit and the ink in each cell, int [B, 9]."""
    scenes = [draw_scene(rng, pool, None, most=9, distinct=False) for _ in range(size)]
    value = np.full((size, GRID**2), NO_DIGIT)
    ink = np.full((size, GRID**2), NO_INK)
    names = list(INKS)
    for row, scene in enumerate(scenes):
        for digit in scene.digits:
            value[row, digit.cell], ink[row, digit.cell] = digit.value, names.index(digit.ink)
    return _pixels(scenes), value, ink


@dataclasses.dataclass(frozen=True)
class Lessons:
    """Makes batches of random scenes with an instruction and an answer for each."""

    lesson: Lesson
    tokenizer: PreTrainedTokenizerFast
    num_image_tokens: int  # N
    text_length: int = 48  # largest number of tokens besides the image's

    def batch(self, rng: np.random.Generator, pool: str, size: int) -> dict[str, np.ndarray]:
        """Returns pixels [B, H, W, 3], input_ids and attention_mask, int32 [B, L], and weight, float32 [B, L].

        The weight is 1 where a token is supervised, and 0 elsewhere.
        """
        tokenizer, num_image_tokens = self.tokenizer, self.num_image_tokens
        length = num_image_tokens + self.text_length
        scenes = [draw_scene(rng, pool, None) for _ in range(size)]
        ids, weight = np.zeros((size, length), np.int32), np.zeros((size, length), np.float32)
        mask = np.zeros((size, length), np.int32)
        for row, scene in enumerate(scenes):
            question, answer = self.lesson(rng, scene)
            turns = (("human", f"<image>\n{question}"), ("gpt", answer))
            encoded = encode(tokenizer, turns, TEMPLATE, num_image_tokens)
            n = len(encoded.input_ids)
            ids[row, :n], mask[row, :n], weight[row, :n] = encoded.input_ids, 1, encoded.supervised
        return {"pixels": _pixels(scenes), "input_ids": ids, "attention_mask": mask, "weight": weight}


def _schedule(peak: float, steps: int) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(0.0, peak, max(1, steps // 20), steps, peak * 0.01)


def _optimizer(peak: float, steps: int) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(_schedule(peak, steps), weight_decay=0.01))


def _train(loss: Callable[[Params, Any], tuple[jax.Array, jax.Array]], params: Params, batches: Iterator[Any],
           steps: int, peak: float, report: Callable[[str], None], name: str) -> Params:
    """Returns the parameters after training; `loss` returns the loss, and an accuracy for the progress messages."""
    optimizer = _optimizer(peak, steps)

    @jax.jit
    def step(params: Params, state: optax.OptState, batch: Any
             ) -> tuple[Params, optax.OptState, jax.Array, jax.Array]:
        (value, metric), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return cast(Params, optax.apply_updates(params, updates)), state, value, metric

    state = optimizer.init(params)
    for index in range(steps):
        params, state, value, metric = step(params, state, next(batches))
        if index % 100 == 99 or index == steps - 1:
            report(f"{name} step {index + 1}/{steps}: loss {float(value):.3f}, accuracy {float(metric):.3f}")
    return params


def _pretrain_vision(module: Vlm, config: PretrainConfig, report: Callable[[str], None]) -> Params:
    """Returns the weights of a tower that is trained to name the digit and the ink in each cell."""
    rng = np.random.default_rng([config.seed, 1])
    key = jax.random.key(config.seed)
    width, cells = config.width, GRID**2
    pixels = jnp.zeros((1, CANVAS, CANVAS, 3))
    tower = module.init(key, pixels, method="features")["params"]["vision_tower"]
    heads = {"digit": jax.random.normal(key, (4 * width, NO_DIGIT + 1)) * 0.02,
             "ink": jax.random.normal(key, (4 * width, NO_INK + 1)) * 0.02}

    def scores(params: Params, pixels: jax.Array) -> dict[str, jax.Array]:
        base = {"params": {"vision_tower": params["tower"]}}
        x = cast(jax.Array, module.apply(base, pixels, method="features"))
        # A cell of 16 × 16 pixels is 2 × 2 patches.
        x = x.reshape(-1, GRID, 2, GRID, 2, width).transpose(0, 1, 3, 2, 4, 5).reshape(-1, cells, 4 * width)
        return {name: x @ head for name, head in params["heads"].items()}

    def loss(params: Params, batch: Any) -> tuple[jax.Array, jax.Array]:
        pixels, value, ink = batch
        out = scores(params, pixels)
        ce = optax.softmax_cross_entropy_with_integer_labels
        hits = jnp.argmax(out["digit"], -1) == value
        seen = value != NO_DIGIT
        return jnp.mean(ce(out["digit"], value) + ce(out["ink"], ink)), jnp.sum(hits * seen) / jnp.sum(seen)

    batches = iter(lambda: _vision_batch(rng, "pretrain", config.batch), None)
    params = _train(loss, {"tower": tower, "heads": heads}, batches, config.vision_steps, config.lr / 2, report,
                    "vision")
    held_out = _vision_batch(np.random.default_rng(1), "validation", 256)
    report(f"vision: accuracy of digits on held-out handwriting {float(jax.jit(loss)(params, held_out)[1]):.3f}")
    return params["tower"]


def _initial_language(module: Vlm, config: PretrainConfig) -> Params:
    """Returns the initial weights of projector and decoder."""
    keys = jax.random.split(jax.random.key(config.seed + 1), 3)
    spec = module.config
    vision, text = spec.tower.hidden_size, spec.text.hidden_size
    projector = {"linear_1": {"kernel": jax.random.normal(keys[0], (vision, text)) * 0.6 * vision**-0.5,
                              "bias": jnp.zeros(text)},
                 "linear_2": {"kernel": jax.random.normal(keys[1], (text, text)) * 0.6 * text**-0.5,
                              "bias": jnp.zeros(text)}}
    ids = jnp.zeros((1, spec.num_image_tokens + 2), jnp.int32)
    decoder = module.init(keys[2], ids, jnp.ones_like(ids), None, method="logits")["params"]["decoder"]
    # Tokens that occur in no caption keep their initial rows, and the head stays frozen in the federation. Clients can
    # then learn to distinguish rows of norm 1, but not rows of norm 0.2, whose logits stay too close to each other.
    return {"projector": projector,
            "decoder": decoder | {name: decoder[name] * (0.1 / 0.02) for name in ("embedding", "head")}}


def train_language(module: Vlm, tower: Params, start: Params, lessons: Lessons, config: LanguageConfig,
                   report: Callable[[str], None]) -> Params:
    """Returns the weights of projector and decoder, trained from `start` to give the answers of `lessons`."""
    rng = np.random.default_rng([config.seed, 2])
    n = module.config.num_image_tokens

    def loss(params: Params, batch: Any) -> tuple[jax.Array, jax.Array]:
        base = {"vision_tower": tower, "decoder": params["decoder"]}
        features = module.apply(variables(base, {}), batch["pixels"], method="features")
        logits = cast(jax.Array, module.apply(
            variables(base, {"projector": params["projector"]}), batch["input_ids"], batch["attention_mask"], features,
            method="logits"))[:, n:-1]
        target, weight = batch["input_ids"][:, n + 1:], batch["weight"][:, n + 1:]
        ce = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        exact = jnp.all((jnp.argmax(logits, -1) == target) | (weight == 0), axis=-1)
        return jnp.sum(ce * weight) / jnp.sum(weight), jnp.mean(exact)

    batches = iter(lambda: lessons.batch(rng, "pretrain", config.batch), None)
    params = _train(loss, start, batches, config.language_steps, config.lr, report, "language")
    held_out = lessons.batch(np.random.default_rng(2), "validation", 256)
    report(f"language: right answers on held-out handwriting {float(jax.jit(loss)(params, held_out)[1]):.3f}")
    return params


def pretrain(out: str | Path, config: PretrainConfig | None = None, report: Callable[[str], None] = print) -> Path:
    """Trains the embedded base and writes it to `out`, a new Hugging Face LLaVA directory.

    Args:
        report: a function that is called with a line of text every 100 steps.

    Raises:
        InputError: `out` exists.
    """
    config, out = config or PretrainConfig(), Path(out)
    if out.exists():
        raise InputError(f"{out}: exists already. Choose a new folder; nothing was written.")
    tokenizer = build_tokenizer(config.vocab)
    raw = hf_config(config, len(tokenizer))
    spec = _spec(raw)
    module = Vlm(spec)
    tower = _pretrain_vision(module, config, report)
    lessons = Lessons(pretraining_caption, tokenizer, spec.num_image_tokens)
    params = train_language(module, tower, _initial_language(module, config), lessons, config, report)
    with new_folder(out) as folder:
        save_base(folder, spec, {"vision_tower": tower} | params, raw)
        tokenizer.save_pretrained(folder)
        image_processor().save_pretrained(folder)
    return out


def _spec(raw: dict[str, Any]) -> VlmSpec:
    """Returns the spec of a `config.json` with the content `raw`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        return read_vlm_config(folder)
