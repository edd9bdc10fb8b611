"""Train the embedded base: a small CLIP + Llama on captions of digit scenes, from the *pretrain* pool alone.

Two steps, as real LLaVA bases come about. First the tower, to name digit and ink of each grid cell (what a caption
says, cell by cell); then projector and language model on captions, with the tower frozen. Training everything at once
on captions stays on a plateau that ignores the image.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import yaml

from pilot_jax.data.conversations import encode
from pilot_jax.embedded import scenes, tasks
from pilot_jax.errors import InputError
from pilot_jax.models.checkpoints.hf_config import read_vlm_config
from pilot_jax.models.checkpoints.writing import save_base
from pilot_jax.models.spec import VlmSpec
from pilot_jax.models.vlm import Vlm, variables

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
TEMPLATE = "vicuna_short"
NO_DIGIT, NO_INK = 10, len(scenes.INKS)


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    width: int = 128  # D and C
    layers: int = 4  # of the tower, and of the language model
    heads: int = 4
    vocab: int = 512
    vision_steps: int = 2000
    language_steps: int = 1600
    batch: int = 32
    lr: float = 2e-3
    seed: int = 0


def load_pretrain_config(path: str | Path) -> PretrainConfig:
    """Read a YAML mapping of `PretrainConfig`'s fields.

    Raises:
        InputError: unreadable, unknown keys, or values that are not positive numbers.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({error}).") from None
    known = {f.name: type(f.default) for f in dataclasses.fields(PretrainConfig)}
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected a mapping of {', '.join(known)}.")
    for key, value in raw.items():
        if key not in known:
            raise InputError(f"{path}: {key}: unknown key. Known: {', '.join(known)}.")
        if not isinstance(value, known[key]) or isinstance(value, bool) or value < (key != "seed"):
            raise InputError(f"{path}: {key}: expected a positive {known[key].__name__}, got {value!r}.")
    return PretrainConfig(**raw)


def build_tokenizer(vocab: int):
    """Byte-level BPE over the words of all tasks, digits one by one; any text can be encoded.

    A tokenizer knows more words than its model was trained on: the base never sees a task's questions or answers.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    rng = np.random.default_rng(0)
    texts = []
    for _ in range(3000):
        scene = scenes.draw_scene(rng, "pretrain", None)
        texts += ["USER: \n", *tasks.pretraining_caption(rng, scene)]
        wording = int(rng.integers(5))
        texts += [f" {text} ASSISTANT:" for task in tasks.TASKS.values() for text in task(rng, scene, wording)]
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


def hf_config(config: PretrainConfig, vocab: int) -> dict:
    """`config.json` of the base."""
    patches = (scenes.CANVAS // 8) ** 2
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "image_token_index": SPECIAL.index("<image>"), "image_seq_length": patches,
        "projector_hidden_act": "gelu", "multimodal_projector_bias": True, "tie_word_embeddings": False,
        "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": config.width, "intermediate_size": 4 * config.width,
            "num_hidden_layers": config.layers, "num_attention_heads": config.heads, "image_size": scenes.CANVAS,
            "patch_size": 8, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": config.width},
        "text_config": {
            "model_type": "llama", "hidden_size": config.width, "intermediate_size": 11 * config.width // 4,
            "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
            "num_key_value_heads": config.heads, "head_dim": config.width // config.heads, "vocab_size": vocab,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2, "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    }


def image_processor():
    """The base's image processor: CLIP's, at the canvas size."""
    from transformers import CLIPImageProcessorPil

    side = {"height": scenes.CANVAS, "width": scenes.CANVAS}
    return CLIPImageProcessorPil(size=side, crop_size=side)


def _pixels(scenes: list[scenes.Scene]) -> np.ndarray:
    processor = image_processor()
    raw = np.stack([np.asarray(scene.image) for scene in scenes]).astype(np.float32) / 255.0
    return (raw - np.asarray(processor.image_mean, np.float32)) / np.asarray(processor.image_std, np.float32)


def _vision_batch(rng: np.random.Generator, pool: str, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """pixels [B, H, W, 3], digit and ink of each cell [B, 9]; crowded scenes teach more per picture."""
    scenes = [scenes.draw_scene(rng, pool, None, most=9, distinct=False) for _ in range(size)]
    value = np.full((size, scenes.GRID**2), NO_DIGIT)
    ink = np.full((size, scenes.GRID**2), NO_INK)
    names = list(scenes.INKS)
    for row, scene in enumerate(scenes):
        for digit in scene.digits:
            value[row, digit.cell], ink[row, digit.cell] = digit.value, names.index(digit.ink)
    return _pixels(scenes), value, ink


def _caption_batch(rng: np.random.Generator, pool: str, size: int, tokenizer, num_image_tokens: int,
                   length: int) -> dict[str, np.ndarray]:
    scenes = [scenes.draw_scene(rng, pool, None) for _ in range(size)]
    ids, weight = np.zeros((size, length), np.int32), np.zeros((size, length), np.float32)
    mask = np.zeros((size, length), np.int32)
    for row, scene in enumerate(scenes):
        asked, said = tasks.pretraining_caption(rng, scene)
        encoded = encode(tokenizer, (("human", f"<image>\n{asked}"), ("gpt", said)), TEMPLATE, num_image_tokens)
        n = len(encoded.input_ids)
        ids[row, :n], mask[row, :n], weight[row, :n] = encoded.input_ids, 1, encoded.supervised
    return {"pixels": _pixels(scenes), "input_ids": ids, "attention_mask": mask, "weight": weight}


def _schedule(peak: float, steps: int) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(0.0, peak, max(1, steps // 20), steps, peak * 0.01)


def _optimizer(peak: float, steps: int) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(_schedule(peak, steps), weight_decay=0.01))


def _train(loss: Callable, params, batches: Iterator, steps: int, peak: float,
           report: Callable[[str], None], name: str):
    optimizer = _optimizer(peak, steps)

    @jax.jit
    def step(params, state, batch):
        (value, metric), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, metric

    state = optimizer.init(params)
    for index in range(steps):
        params, state, value, metric = step(params, state, next(batches))
        if index % 100 == 99 or index == steps - 1:
            report(f"{name} step {index + 1}/{steps}: loss {float(value):.3f}, accuracy {float(metric):.3f}")
    return params


def _pretrain_vision(module: Vlm, config: PretrainConfig, report: Callable[[str], None]) -> dict:
    """The tower's weights, after learning to name digit and ink per cell."""
    rng = np.random.default_rng([config.seed, 1])
    key = jax.random.key(config.seed)
    width, cells = config.width, scenes.GRID**2
    pixels = jnp.zeros((1, scenes.CANVAS, scenes.CANVAS, 3))
    tower = module.init(key, pixels, method="features")["params"]["vision_tower"]
    heads = {"digit": jax.random.normal(key, (4 * width, NO_DIGIT + 1)) * 0.02,
             "ink": jax.random.normal(key, (4 * width, NO_INK + 1)) * 0.02}

    def scores(params, pixels):
        x = module.apply({"params": {"vision_tower": params["tower"]}}, pixels, method="features")
        side = scenes.GRID
        x = x.reshape(-1, side, 2, side, 2, width).transpose(0, 1, 3, 2, 4, 5).reshape(-1, cells, 4 * width)
        return {name: x @ head for name, head in params["heads"].items()}

    def loss(params, batch):
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
    report(f"vision: digit accuracy on held-out handwriting {float(jax.jit(loss)(params, held_out)[1]):.3f}")
    return params["tower"]


def _pretrain_language(module: Vlm, tower: dict, tokenizer, config: PretrainConfig,
                       report: Callable[[str], None]) -> dict:
    """Projector and decoder weights, after learning to caption."""
    rng = np.random.default_rng([config.seed, 2])
    keys = jax.random.split(jax.random.key(config.seed + 1), 3)
    c, n = module.config, module.config.num_image_tokens
    width = c.vision.hidden_size
    projector = {
        "linear_1": {"kernel": jax.random.normal(keys[0], (width, c.text.hidden_size)) * 0.6 * width**-0.5,
                     "bias": jnp.zeros(c.text.hidden_size)},
        "linear_2": {"kernel": jax.random.normal(keys[1], (c.text.hidden_size,) * 2) * 0.6 * c.text.hidden_size**-0.5,
                     "bias": jnp.zeros(c.text.hidden_size)}}
    ids = jnp.zeros((1, n + 2), jnp.int32)
    decoder = module.init(keys[2], ids, jnp.ones_like(ids), None, method="logits")["params"]["decoder"]
    # Words that no caption holds keep the rows they start with, and the head stays frozen in the federation: rows
    # of unit norm can be told apart there, rows of norm 0.2 cannot (their logits could never leave each other).
    decoder = decoder | {name: decoder[name] * (0.1 / 0.02) for name in ("embedding", "head")}
    params = {"projector": projector, "decoder": decoder}
    length = n + 48

    def loss(params, batch):
        base = {"vision_tower": tower, "decoder": params["decoder"]}
        features = module.apply(variables(base, {}), batch["pixels"], method="features")
        logits = module.apply(variables(base, {"projector": params["projector"]}), batch["input_ids"],
                              batch["attention_mask"], features, method="logits")[:, n:-1]
        target, weight = batch["input_ids"][:, n + 1:], batch["weight"][:, n + 1:]
        ce = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        exact = jnp.all((jnp.argmax(logits, -1) == target) | (weight == 0), axis=-1)
        return jnp.sum(ce * weight) / jnp.sum(weight), jnp.mean(exact)

    batches = iter(lambda: _caption_batch(rng, "pretrain", config.batch, tokenizer, n, length), None)
    params = _train(loss, params, batches, config.language_steps, config.lr, report, "language")
    held_out = _caption_batch(np.random.default_rng(2), "validation", 256, tokenizer, n, length)
    report(f"language: captions right on held-out handwriting {float(jax.jit(loss)(params, held_out)[1]):.3f}")
    return params


def pretrain(out: str | Path, config: PretrainConfig | None = None, report: Callable[[str], None] = print) -> Path:
    """Train the embedded base and write it to `out`, a new Hugging Face LLaVA directory.

    Raises:
        InputError: `out` exists.
    """
    config, out = config or PretrainConfig(), Path(out)
    if out.exists():
        raise InputError(f"{out}: exists already. Choose a new folder; nothing was written.")
    tokenizer = build_tokenizer(config.vocab)
    raw = hf_config(config, len(tokenizer))
    shapes = _shapes(raw)
    module = Vlm(shapes)
    tower = _pretrain_vision(module, config, report)
    params = _pretrain_language(module, tower, tokenizer, config, report)
    partial = out.with_name(out.name + ".partial")
    save_base(partial, shapes, {"vision_tower": tower} | params, raw)
    tokenizer.save_pretrained(partial)
    image_processor().save_pretrained(partial)
    partial.rename(out)
    return out


def _shapes(raw: dict) -> VlmSpec:
    import json

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        return read_vlm_config(folder)
