"""Answers of a run's personalised models to held-out prompts, with the images."""

from __future__ import annotations

import base64
import dataclasses
import io
from pathlib import Path

from pilot_jax.data.images import read_image
from pilot_jax.evaluation.evaluate import answers, speaker
from pilot_jax.federation.examination import examinee, first_prompts
from pilot_jax.federation.simulation import load_samples, restore

SIDE = 192  # pixels of a thumbnail


@dataclasses.dataclass(frozen=True)
class Example:
    client: str
    question: str
    answer: str
    references: tuple[str, ...]
    image: str  # a data URI; "" for text alone


def examples(folder: str | Path, count: int) -> list[Example]:
    """What the first client of each task answers to its first `count` test prompts. Loads the run and its data."""
    run = restore(folder)
    fed, config = run.federation, run.config
    first = {client.task: i for i, client in reversed(list(enumerate(fed.examined))) if "test" in client.evaluation}
    chosen = sorted(first.values())
    asked = [examinee(fed, fed.model_of(i), run.population[fed.model_of(i)],
                      first_prompts(fed.examined[i].evaluation["test"], count), fed.examined[i].task) for i in chosen]
    rows = 1 if fed.mesh is None else fed.mesh.shape["clients"]
    voice = speaker(run.tokenizer, config.data.template, config.eval, config.system.seed)
    said = answers(fed.model, voice, asked, rows)
    samples: dict[str, list] = {}
    for sample in load_samples(config):
        if sample.split == "test":
            samples.setdefault(sample.client, []).append(sample)
    out = []
    for i, texts in zip(chosen, said, strict=True):
        name = fed.examined[i].name
        for sample, text in zip(samples[name], texts, strict=False):
            image = "" if sample.image is None else _thumbnail(read_image(sample, config.data.limits))
            question = "\n".join(said for who, said in sample.turns[:-1] if who == "human").replace("<image>", "")
            out.append(Example(name, question.strip(), text, sample.references, image))
    return out


def _thumbnail(image) -> str:
    image = image.copy()
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
