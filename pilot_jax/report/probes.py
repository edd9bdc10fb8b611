"""What a run's personalised models do: answers with their images, scores on everybody's tasks, whom the routers ask."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from pilot_jax.data.images import read_image
from pilot_jax.evaluation.answers import answers, speaker
from pilot_jax.evaluation.personalised import evaluation_matrix, examinee, first_prompts
from pilot_jax.federation.state import Federation, Population
from pilot_jax.report.charts import MOST_NAMES
from pilot_jax.runs.prepare import load_samples
from pilot_jax.runs.restore import restore
from pilot_jax.runs.simulate import Run

SIDE = 192  # pixels of a thumbnail
ROUTED = 8  # images of a client that its router is asked about


@dataclasses.dataclass(frozen=True)
class Example:
    client: str
    question: str
    answer: str
    references: tuple[str, ...]
    image: str  # a data URI; "" for text alone


@dataclasses.dataclass(frozen=True)
class Abilities:
    """Scores [models + 1, columns], the untouched base last; columns are tasks, and the base's own captions."""

    models: tuple[str, ...]
    columns: tuple[str, ...]
    scores: np.ndarray
    count: int  # prompts of each client; the base has answered all


@dataclasses.dataclass(frozen=True)
class Inside:
    examples: tuple[Example, ...] = ()
    abilities: Abilities | None = None
    routing: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # client: weights [T]


def look_inside(folder: str | Path, count: int, asked: int) -> Inside:
    """Loads a run that has ended, and its data.

    Args:
        count: answers of each task that are shown.
        asked: how many of each client's prompts every model answers, where there are few enough clients and all have
            test data.
    """
    run = restore(folder)
    few = len(run.federation.examined) <= MOST_NAMES
    whole = asked and few and all("test" in client.evaluation for client in run.federation.examined)
    return Inside(tuple(_examples(run, count)), _abilities(run, asked) if whole else None,
                  router_weights(run.federation, run.population))


def _abilities(run: Run, count: int) -> Abilities:
    fed = run.federation
    found = evaluation_matrix(fed, run.tokenizer, run.population, "test", count)
    scores = [list(found["by_task"][name].values()) for name in found["clients"]]
    scores.append([run.summary["score_base_by_task"][task] for task in found["tasks"]])
    columns, captions = list(found["tasks"]), found["base_captions"]
    if captions:
        columns.append("base's captions")
        for row, value in zip(scores, [*captions["clients"], captions["base"]], strict=True):
            row.append(value)
    return Abilities(tuple(found["clients"]), tuple(columns), np.asarray(scores, np.float64), count)


def router_weights(fed: Federation, population: Population) -> dict[str, np.ndarray]:
    """Mean over image tokens of P = softmax(H_v·W_φ), [T] for each client that has a router and test images."""
    out = {}
    for client, state in zip(fed.clients, population, strict=True):
        if state.stage != "stage2" or "router" not in state.adapters or "test" not in client.evaluation:
            continue
        features = np.asarray(first_prompts(client.evaluation["test"], ROUTED).features, np.float32)  # [n, N, D]
        features = features[np.any(features != 0, axis=(1, 2))]  # of questions without an image they are zeros
        if len(features):
            logits = features @ np.asarray(state.adapters["router"]["kernel"], np.float32)
            out[client.name] = np.asarray(jax.nn.softmax(logits, axis=-1)).mean((0, 1))
    return out


def _examples(run: Run, count: int) -> list[Example]:
    """What the first client of each task answers to its first `count` test prompts."""
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
