"""Scores a real base on things and wordings that it has never seen: `python -m pilot_jax.real.scores BASE`.

The questions are scenario R's, about all pictures of the pool *test*. Beside the model's score stand those of two ways
to answer without the picture: the most common answer to the question, and the model's own when it is not shown it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pilot_jax.data.arrays import padded_rows, round_up
from pilot_jax.data.conversations import encode, stop_tokens
from pilot_jax.data.images import pixel_values
from pilot_jax.models.pretrained import PretrainedModel, load
from pilot_jax.real.emoji import STYLES, Picture, picture
from pilot_jax.real.emoji_tasks import TASKS, askable, family_of
from pilot_jax.real.lessons import TEMPLATE

BATCH = 32
# Prose of this project's own, which no language model has read before.
PROSE = Path(__file__).parent / "assets" / "plain_english.txt"


def answers(model: PretrainedModel, questions: Sequence[str], images: Sequence[Picture] | None, most: int = 12
            ) -> list[str]:
    """Returns the model's greedy answers to questions, each about its picture, or to the questions alone."""
    tokenizer, count, out = model.tokenizer(), model.config.num_image_tokens, list[str]()
    before = "" if images is None else "<image>\n"
    prompts = [encode(tokenizer, (("human", before + question),), TEMPLATE, count).input_ids for question in questions]
    width = round_up(max(map(len, prompts)), 32)  # few widths, so that few programs are compiled
    stop = stop_tokens(tokenizer, TEMPLATE)
    for first in range(0, len(prompts), BATCH):
        ids, mask = padded_rows((prompts[first:first + BATCH] + [prompts[-1]] * BATCH)[:BATCH], width)
        pixels = None
        if images is not None:
            part = (list(images[first:first + BATCH]) + [images[-1]] * BATCH)[:BATCH]
            pixels = pixel_values(model, [one.image for one in part])
        tokens = model.generate(ids, mask, pixels, max_new_tokens=most, eos_id=stop)
        out += [tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens[:len(prompts) - first]]
    return out


def _right(answers_: Sequence[str], references: Sequence[tuple[str, ...]]) -> float:
    """Returns the share of answers that equal a reference, apart from case and a full stop."""
    return float(np.mean([a.lower().rstrip(".") in r for a, r in zip(answers_, references, strict=True)]))


def task_scores(model: PretrainedModel, task: str, pool: str = "test") -> dict[str, float]:
    """Returns the scores on all pictures of a pool that a task can ask about: "model", "blind", "majority".

    For the task "kind" there is also "family": how often the answer is a kind of the right one's family of 8.
    """
    chosen = [picture(concept, style) for style in STYLES for concept in askable(task, pool, style)]
    asked = TASKS[task](chosen)
    questions, right = [q for q, _ in asked], [r for _, r in asked]
    found = answers(model, questions, chosen)
    alone = dict(zip(dict.fromkeys(questions), answers(model, list(dict.fromkeys(questions)), None), strict=True))
    common = max({r[0] for r in right}, key=lambda answer: sum(answer in r for r in right))
    scores = {"pictures": len(chosen), "model": _right(found, right),
              "blind": _right([alone[q] for q in questions], right),
              "majority": _right([common] * len(right), right)}
    if task == "kind":
        near = [{other for kind in kinds for other in family_of(kind)} for kinds in right]
        scores["family"] = float(np.mean([a in kinds for a, kinds in zip(found, near, strict=True)]))
    return scores


def perplexity(model: PretrainedModel, length: int = 256) -> float:
    """Returns the perplexity per token of `PROSE`, read in pieces of `length` tokens."""
    text = PROSE.read_text(encoding="utf-8")
    ids = np.asarray(model.tokenizer()(text, add_special_tokens=False)["input_ids"], np.int32)
    ids = ids[:len(ids) // length * length].reshape(-1, length)
    total = 0.0
    for row in ids:
        logits = np.asarray(model.logits(row[None]))[0, :-1].astype(np.float64)
        top = logits.max(-1, keepdims=True)
        logs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        total -= float(logs[np.arange(length - 1), row[1:]].sum())
    return float(np.exp(total / (len(ids) * (length - 1))))


def report(model: PretrainedModel, pool: str = "test") -> str:
    """Returns the scores of a base as a Markdown table, and the perplexity of plain prose below it."""
    lines = ["| task | pictures | model | blind | majority |", "|---|---:|---:|---:|---:|"]
    for task in TASKS:
        row = task_scores(model, task, pool)
        values = [f"{row[name]:.3f}" for name in ("model", "blind", "majority")]
        lines.append(f"| {task} | {row['pictures']} | {' | '.join(values)} |")
        if "family" in row:
            lines.append(f"| {task}, of the right family | {row['pictures']} | {row['family']:.3f} | | |")
    return "\n".join([*lines, "", f"Perplexity of plain English: {perplexity(model):.1f}."])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prints a real base's scores on things that it has never seen.")
    parser.add_argument("base", help="folder of the base")
    parser.add_argument("--pool", default="test", choices=("train", "validation", "test"), help="pool of concepts")
    options = parser.parse_args()
    print(report(load(options.base, dtype="float32"), options.pool))
