"""Trains the projector of a real base in LLaVA's two stages and a third, on emoji of the pool *base* only.

First the projector alone learns to name and describe pictures, while tower and language model are frozen. Then the
projector and a LoRA of the language model learn from questions in many wordings (`lessons.py`). In the third stage,
questions that compare are more frequent, and each step also repeats answers of the untrained language model to plain
questions. The LoRA is merged.

Several lessons about one picture share its image tokens: they are written one after another, each with the positions
that it would have directly behind the image, and none sees another. That is exactly what separate samples compute, at
about half the cost.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from pilot_jax.data.arrays import padded_rows
from pilot_jax.data.conversations import TOKENIZER, encode, stop_tokens
from pilot_jax.data.images import pixel_values
from pilot_jax.errors import InputError
from pilot_jax.files import new_folder
from pilot_jax.models.lora import init_lora
from pilot_jax.models.pretrained import PretrainedModel, load
from pilot_jax.models.vlm import Vlm, variables
from pilot_jax.real.base import convert, fetched_parts, known_base
from pilot_jax.real.emoji import Picture, pictures, pool
from pilot_jax.real.lessons import PLAIN, STAGES, TEMPLATE, Lesson, lessons
from pilot_jax.real.scores import perplexity, report
from pilot_jax.real.trained import write_trained

LONGEST = 64  # tokens of a lesson, at most
Params = dict[str, Any]  # nested dicts of arrays
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class RealPretrainConfig:
    """Training settings of a real base; `configs/pretrain_real.yaml` has them."""

    base: str = "smollm2-dinov2"  # a key of `pilot_jax.real.base.BASES`
    side: int = 56  # height and width of images in pixels
    projector_steps: int = 300
    instruction_steps: int = 1500
    review_steps: int = 600
    pictures: int = 4  # pictures in a step
    tokens: int = 120  # L, the tokens of a picture with its lessons
    projector_lr: float = 2e-3  # peak learning rate of the first stage
    lr: float = 5e-4  # of the others, for projector and LoRA
    rank: int = 8  # of the LoRA
    alpha: float = 16.0
    seed: int = 0


def augmented(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Returns the image, in half of all cases mirrored, a little turned, shifted and larger or smaller, on white."""
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    angle, scale = np.deg2rad(rng.uniform(-15, 15)), rng.uniform(0.85, 1.3)
    side, (dx, dy) = image.width, rng.uniform(-4, 4, 2)
    cos, sin, middle = scale * np.cos(angle), scale * np.sin(angle), side / 2
    turn = (cos, sin, middle - cos * (middle + dx) - sin * (middle + dy),
            -sin, cos, middle + sin * (middle + dx) - cos * (middle + dy))
    return image.transform(image.size, Image.Transform.AFFINE, turn, Image.Resampling.BICUBIC,
                           fillcolor=(255, 255, 255))


@dataclasses.dataclass
class Packer:
    """Writes lessons about one picture as one row of tokens."""

    model: PretrainedModel
    length: int  # L
    targets: int = 48  # A, most supervised tokens of a row

    def __post_init__(self) -> None:
        self.tokenizer = self.model.tokenizer()
        image = self.model.config.image_token_id
        self.count = self.model.config.num_image_tokens
        ids = self.encoded("Well?", "Yes")[0]
        self.before = ids[:np.flatnonzero(ids == image)[-1] + 2]  # up to the line break behind the image
        if self.length < len(self.before) + LONGEST:
            raise InputError(f"tokens: {self.length}, expected at least {len(self.before) + LONGEST}: the image takes "
                             f"{self.count} tokens, and a question with its answer up to {LONGEST}.")

    def encoded(self, question: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the token ids of one lesson, and whether each is supervised."""
        turns = (("human", f"<image>\n{question}"), ("gpt", answer))
        out = encode(self.tokenizer, turns, TEMPLATE, self.count)
        return out.input_ids, out.supervised

    def row(self, some: Iterator[Lesson]) -> Batch:
        """Returns a row of as many lessons about one picture as find room behind it, as `_packed` does."""
        start = len(self.before)
        encoded = (self.encoded(question, answer) for question, answer in some)
        return self._packed(self.before, ((ids[start:], supervised[start:]) for ids, supervised in encoded))

    def plain_row(self, some: Iterator[tuple[np.ndarray, np.ndarray]]) -> Batch:
        """Returns a row of as many conversations without a picture as find room, given as prompt and answer tokens."""
        return self._packed(self.before[:0], (
            (np.concatenate([prompt, answer]), np.arange(len(prompt) + len(answer)) >= len(prompt))
            for prompt, answer in some))

    def _packed(self, before: np.ndarray, some: Iterator[tuple[np.ndarray, np.ndarray]]) -> Batch:
        """Returns a row: the tokens `before`, then lessons, each given as its tokens and whether they are supervised.

        It has input_ids, positions and segment, int32 [L]: 0 for the tokens before, i for the i-th lesson, -1 for
        padding; target_positions, targets, int32 [A], and weight, float32 [A].
        """
        ids, positions = np.zeros(self.length, np.int32), np.zeros(self.length, np.int32)
        segment, rows = np.full(self.length, -1, np.int32), list[int]()
        end, number = len(before), 0
        ids[:end], positions[:end], segment[:end] = before, np.arange(end), 0
        for tokens, supervised in some:
            where = slice(end, end + len(tokens))
            if where.stop > self.length or len(rows) + supervised.sum() > self.targets:
                if number:
                    break
                continue  # it is longer than a row
            number += 1
            ids[where], segment[where] = tokens, number
            positions[where] = len(before) + np.arange(len(tokens))
            rows += (end + np.flatnonzero(supervised)).tolist()
            end = where.stop
        target, weight = np.zeros(self.targets, np.int32), np.zeros(self.targets, np.float32)
        target[:len(rows)], weight[:len(rows)] = rows, 1
        return {"input_ids": ids, "positions": positions, "segment": segment, "weight": weight,
                "target_positions": np.maximum(target - 1, 0), "targets": ids[target]}


def visible(segment: jax.Array) -> jax.Array:
    """Returns which tokens each token sees, bool [B, L, L]: earlier ones of its own lesson, and the image's."""
    causal = jnp.tril(jnp.ones((segment.shape[-1],) * 2, bool))
    same = segment[:, :, None] == segment[:, None, :]
    return causal & (same | (segment[:, None, :] == 0))


def packed_logits(module: Vlm, batch: dict[str, jax.Array], features: jax.Array) -> jax.Array:
    """Returns the logits at the target positions, float32 [B, A, V]; for `Vlm.apply`."""
    x, _ = module.embed(batch["input_ids"], features, "plain")
    hidden, _ = module.decoder.hidden(x, batch["positions"], visible(batch["segment"]), rows=batch["target_positions"])
    return module.decoder.logits(hidden)


def plain_answers(model: PretrainedModel, most: int = 20) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the model's greedy answers to plain questions: the tokens of each prompt and of its answer.

    Every question is asked in the template of training and in the tokenizer's own.
    """
    tokenizer, out = model.tokenizer(), list[tuple[np.ndarray, np.ndarray]]()
    for template in (TEMPLATE, TOKENIZER):
        prompts = [encode(tokenizer, (("human", question),), template, 0).input_ids for question in PLAIN]
        ids, mask = padded_rows(prompts, max(map(len, prompts)))
        stop = stop_tokens(tokenizer, template)
        for prompt, answer in zip(prompts, model.generate(ids, mask, max_new_tokens=most, eos_id=stop), strict=True):
            ends = np.flatnonzero(np.isin(answer, stop))
            out.append((prompt, answer[:ends[0] + 1] if len(ends) else answer))
    return out


def batches(model: PretrainedModel, config: RealPretrainConfig, stage: str, chosen: list[Picture], seed: int
            ) -> Iterator[Batch]:
    """Yields batches of augmented pictures with lessons of a stage; no picture comes again before all have come.

    In the stage "review", each batch has one row more, of plain questions without a picture.
    """
    rng, packer = np.random.default_rng([config.seed, seed]), Packer(model, config.tokens)
    names = [picture.concept.name for picture in chosen]
    plain = plain_answers(model) if stage == "review" else []
    order: list[int] = []
    while True:
        while len(order) < config.pictures:
            order += rng.permutation(len(chosen)).tolist()
        part, order = [chosen[i] for i in order[:config.pictures]], order[config.pictures:]
        rows = [packer.row(lessons(rng, picture, stage, names)) for picture in part]
        pixels = pixel_values(model, [augmented(rng, picture.image) for picture in part])
        if plain:
            rows.append(packer.plain_row(plain[i] for i in rng.permutation(len(plain))))
            pixels = np.concatenate([pixels, np.zeros_like(pixels[:1])])
        yield {"pixels": pixels} | {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def train(model: PretrainedModel, config: RealPretrainConfig, params: Params, stage: str, steps: int, peak: float,
          say: Callable[[str], object]) -> Params:
    """Returns `params` (projector and, if it is to be trained, text_adapter) after training on a stage's lessons."""
    module = dataclasses.replace(model.module, lora_scale=config.alpha / config.rank)
    warm = max(1, steps // 20)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, peak, warm, max(steps, warm + 1), peak * 0.01), weight_decay=0.01))

    def loss(params: Params, base: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        features = module.apply({"params": {"vision_tower": base["vision_tower"]}},
                                batch["pixels"].transpose(0, 2, 3, 1), method="features")
        logits = module.apply(variables(base, params), batch, features, method=packed_logits)
        logits, target, weight = cast(jax.Array, logits), batch["targets"], batch["weight"]
        ce = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        hits = jnp.sum((jnp.argmax(logits, -1) == target) * weight)
        return jnp.sum(ce * weight) / jnp.sum(weight), hits / jnp.sum(weight)

    @jax.jit
    def step(params: Params, state: optax.OptState, base: Params, batch: dict[str, jax.Array]
             ) -> tuple[Params, optax.OptState, jax.Array, jax.Array]:
        (value, hits), grads = jax.value_and_grad(loss, has_aux=True)(params, base, batch)
        updates, state = optimizer.update(grads, state, params)
        return cast(Params, optax.apply_updates(params, updates)), state, value, hits

    base = {name: model.base[name] for name in ("vision_tower", "decoder")}
    state, recent = optimizer.init(params), list[tuple[float, float]]()
    data = batches(model, config, stage, list(pictures("base")), seed=list(STAGES).index(stage) + 1)
    for number in range(1, steps + 1):
        params, state, value, hits = step(params, state, base, next(data))
        recent.append((float(value), float(hits)))
        if number % 50 == 0 or number == steps:
            means = np.mean(recent, axis=0)
            say(f"{stage} step {number}/{steps}: loss {means[0]:.3f}, right tokens {means[1]:.3f}")
            recent.clear()
    return params


def scaled_projector(model: PretrainedModel, seed: int) -> Params:
    """Returns a random projector whose outputs are as large as the language model's embeddings."""
    pictures_ = [picture.image for picture, _ in zip(pictures("base"), range(64), strict=False)]
    features = np.asarray(model.features(pixel_values(model, pictures_)))
    size = float(np.sqrt((features**2).mean()))
    embedding = float(np.sqrt((np.asarray(model.base["decoder"]["embedding"][:5000], np.float32)**2).mean()))
    rng, d_in, d_out = np.random.default_rng(seed), features.shape[-1], model.config.text.hidden_size
    first = rng.normal(size=(d_in, d_out)) * d_in**-0.5 / size
    second = rng.normal(size=(d_out, d_out)) * d_out**-0.5 * 1.5 * embedding
    return {"linear_1": {"kernel": jnp.asarray(first, jnp.float32), "bias": jnp.zeros(d_out)},
            "linear_2": {"kernel": jnp.asarray(second, jnp.float32), "bias": jnp.zeros(d_out)}}


def all_stages(model: PretrainedModel, config: RealPretrainConfig, say: Callable[[str], object]) -> Params:
    """Returns a trained projector and LoRA ("projector", "text_adapter") for the model."""
    params: Params = {"projector": scaled_projector(model, config.seed)}
    params = train(model, config, params, "projector", config.projector_steps, config.projector_lr, say)
    lora = init_lora(jax.random.key(config.seed), model.config.text, config.rank)
    params |= {"text_adapter": lora}
    params = train(model, config, params, "instructions", config.instruction_steps, config.lr, say)
    return train(model, config, params, "review", config.review_steps, config.lr, say)


CARD = """# Trained part of {base}

A projector (LLaVA's mm_projector) and a LoRA of the language model (PEFT), trained by

    pilot-jax pretrain CONFIG OUT      # {settings}

on emoji of the pool *base* of pilot_jax's set: {concepts} concepts in three styles, Noto (Apache-2.0), Twemoji (CC-BY
4.0) and Fluent (MIT); names and words are emojibase's (MIT) and Unicode's CLDR. Licence of the weights: that of
pilot_jax.

Scores on things (pool *test*) and wordings that it has not seen, exact matches. Blind: its answers without the picture.
Majority: the most common right answer.

{scores} Before training: {before:.1f}.
"""


def pretrain(out: str | Path, config: RealPretrainConfig, say: Callable[[str], object] = print) -> Path:
    """Trains a real base and writes it to `out`, a new LLaVA directory, and what was trained to `out`/trained.

    Args:
        say: a function that shows a line of progress.

    Raises:
        InputError: `out` exists, the config's base or sizes cannot be used, or a part cannot be fetched.
    """
    base, out = known_base(config.base), Path(out)
    with new_folder(out) as folder, fetched_parts(base, folder, say) as (gguf, onnx):
        with tempfile.TemporaryDirectory(dir=folder, prefix=".start-") as start:
            convert(base, gguf, onnx, Path(start), config.side)
            model = load(start, dtype="float32")
            before = perplexity(model)
            params = jax.device_get(all_stages(model, config, say))
        trained = folder / "trained"
        trained.mkdir()
        write_trained(trained, params, config.rank, config.alpha, config.base)
        convert(base, gguf, onnx, folder, config.side, trained)
        say("scoring …")
        settings = ", ".join(f"{key}: {value}" for key, value in dataclasses.asdict(config).items())
        (trained / "README.md").write_text(CARD.format(
            base=config.base, settings=settings, concepts=len(pool("base")), before=before,
            scores=report(load(folder, dtype="float32"))), encoding="utf-8")
    return out
