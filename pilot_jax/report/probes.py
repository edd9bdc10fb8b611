"""Lets a run's personalised models answer prompts: examples, scores on every task's data, and router weights."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from pilot_jax.data.images import read_image
from pilot_jax.data.llava.sample import Sample
from pilot_jax.evaluation.answers import answers
from pilot_jax.evaluation.personalised import evaluation_matrix, examinee, first_prompts
from pilot_jax.federation.state import Federation, Population
from pilot_jax.report.charts import MOST_NAMES
from pilot_jax.runs.prepare import load_samples
from pilot_jax.runs.restore import Run, restore

THUMBNAIL = 192  # largest width and height of an image on the page, in pixels
ROUTER_IMAGES = 8  # number of each client's test images over which router weights are averaged
CAPTIONS = "pretraining captions"  # column of the scores on captions that the embedded base was pretrained on


@dataclasses.dataclass(frozen=True)
class Example:
    """A test prompt and the answer of the client's personalised model."""

    client: str
    question: str
    answer: str
    references: tuple[str, ...]
    image: str  # as a data URI; "" without an image


@dataclasses.dataclass(frozen=True)
class Abilities:
    """Scores of models on every task's test data and, for the embedded base, on the captions of its pretraining."""

    models: tuple[str, ...]  # the clients
    columns: tuple[str, ...]  # the tasks, and perhaps CAPTIONS
    scores: np.ndarray  # float64 [models + 1, columns]; the last row has the scores of the base model
    prompts: int  # number of each client's test prompts that every model answers; the base model answers all


@dataclasses.dataclass(frozen=True)
class Inside:
    """All that a report shows of a run's models; everything is empty if no model was loaded."""

    examples: tuple[Example, ...] = ()
    abilities: Abilities | None = None
    routing: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # router weights [T] by client


def look_inside(folder: str | Path, examples: int, prompts: int) -> Inside:
    """Loads a finished run with its data, and returns examples, scores and router weights of its models.

    Args:
        examples: number of example answers per task.
        prompts: number of each client's test prompts that every model answers. The scores are left out with 0, with
            more than MOST_NAMES clients, or if a client has no test data.
    """
    run = restore(folder)
    clients = run.evaluation.clients
    feasible = prompts and len(clients) <= MOST_NAMES and all("test" in client.evaluation for client in clients)
    return Inside(tuple(_examples(run, examples)), _abilities(run, prompts) if feasible else None,
                  router_weights(run.federation, run.population))


def _abilities(run: Run, prompts: int) -> Abilities:
    """Scores every client's model on every task's test data."""
    found = evaluation_matrix(run.evaluation, run.population, "test", prompts)
    scores = [list(found["by_task"][name].values()) for name in found["clients"]]
    scores.append([run.summary["score_base_by_task"][task] for task in found["tasks"]])
    columns, captions = list(found["tasks"]), found["base_captions"]
    if captions:
        columns.append(CAPTIONS)
        for row, value in zip(scores, [*captions["clients"], captions["base"]], strict=True):
            row.append(value)
    return Abilities(tuple(found["clients"]), tuple(columns), np.asarray(scores, np.float64), prompts)


def router_weights(fed: Federation, population: Population) -> dict[str, np.ndarray]:
    """Returns each client's router weights P = softmax(H_v·W_φ), averaged over image tokens, [T].

    Clients without a router, or without test images, are left out."""
    out = {}
    for client, state in zip(fed.clients, population, strict=True):
        if state.stage != "stage2" or "router" not in state.adapters or "test" not in client.evaluation:
            continue
        prompts = first_prompts(client.evaluation["test"], ROUTER_IMAGES)
        features = np.asarray(prompts.features, np.float32)  # [n, N, D]
        features = features[np.any(features != 0, axis=(1, 2))]  # prompts without an image have zeros
        if len(features):
            logits = features @ np.asarray(state.adapters["router"]["kernel"], np.float32)
            out[client.name] = np.asarray(jax.nn.softmax(logits, axis=-1)).mean((0, 1))
    return out


def _examples(run: Run, count: int) -> list[Example]:
    """Returns the answers of the model of each task's first client to that client's first `count` test prompts."""
    fed, clients = run.federation, run.evaluation.clients
    first = {client.task: i for i, client in reversed(list(enumerate(clients))) if "test" in client.evaluation}
    chosen = sorted(first.values())
    models = [run.evaluation.model_of_client[i] for i in chosen]
    examinees = [examinee(fed, model, run.population[model], first_prompts(clients[i].evaluation["test"], count),
                          clients[i].task) for i, model in zip(chosen, models, strict=True)]
    width = 1 if fed.mesh is None else fed.mesh.shape["clients"]
    samples: dict[str, list[Sample]] = {}
    for sample in load_samples(run.config):
        if sample.split == "test":
            samples.setdefault(sample.client, []).append(sample)
    out = []
    for i, texts in zip(chosen, answers(fed.model, run.evaluation.decoder, examinees, width), strict=True):
        name = clients[i].name
        for sample, text in zip(samples[name], texts, strict=False):
            image = "" if sample.image is None else _thumbnail(read_image(sample, run.evaluation.data.limits))
            question = "\n".join(value for who, value in sample.turns[:-1] if who == "human").replace("<image>", "")
            out.append(Example(name, question.strip(), text, sample.references, image))
    return out


def _thumbnail(image: Image.Image) -> str:
    """Returns the image, scaled down, as a data URI."""
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
