"""Lets a run's personalised models answer prompts: right and wrong answers, scores on every task, router weights."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from pilot_jax.data.images import read_image
from pilot_jax.data.llava.sample import Sample
from pilot_jax.evaluation.answers import answers, base_examinee
from pilot_jax.evaluation.metrics import scored, scores_single_answers
from pilot_jax.evaluation.personalised import evaluation_matrix, examinee, first_prompts
from pilot_jax.federation.state import Federation, Population
from pilot_jax.runs.prepare import load_samples
from pilot_jax.runs.restore import Run, restore

THUMBNAIL = 160  # largest width and height of an image on the page, in pixels
IMAGE_BYTES = 1_400_000  # most bytes of all images on the page
MOST_EXAMPLES = 600  # most answers on the page
MARKED = 8  # number of each client's first test prompts among which right and wrong answers are looked for
MOST_CLIENTS = 24  # most clients whose models are scored on every task
ROUTER_IMAGES = 8  # number of each client's test images over which router weights are averaged
CAPTIONS = "pretraining captions"  # column of the scores on captions that the embedded base was pretrained on


@dataclasses.dataclass(frozen=True)
class Example:
    """A test prompt and the answer of the client's personalised model."""

    client: str
    task: str
    question: str
    answer: str
    before: str  # the base model's answer
    references: tuple[str, ...]
    score: float | None  # of this answer alone; None if the task's metric has no score of a single answer
    image: str = ""  # as a data URI; "" without an image

    @property
    def outcome(self) -> str:
        """Returns right, partly, wrong or unmarked."""
        if self.score is None:
            return "unmarked"
        return "right" if self.score >= 1 - 1e-9 else "partly" if self.score > 0 else "wrong"


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
    prompts: Mapping[str, int] = dataclasses.field(default_factory=dict)  # number of test prompts by client
    abilities: Abilities | None = None
    routing: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # router weights [T] by client


def look_inside(folder: str | Path, examples: int, prompts: int) -> Inside:
    """Loads a finished run with its data, and returns examples, scores and router weights of its models.

    Args:
        examples: number of right answers, and of others, per client.
        prompts: number of each client's test prompts that every model answers. The scores are left out with 0, or
            with more than MOST_CLIENTS clients.
    """
    run = restore(folder)
    clients = run.evaluation.clients
    feasible = prompts and len(clients) <= MOST_CLIENTS
    counts = {client.name: len(client.evaluation["test"].references) for client in clients
              if "test" in client.evaluation}
    return Inside(tuple(_examples(run, examples)), counts, _abilities(run, prompts) if feasible else None,
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
    """Returns `count` right answers and `count` others of each client's model, as far as its first prompts have them.

    The clients take turns until MOST_EXAMPLES answers or IMAGE_BYTES of images are reached.
    """
    samples: dict[str, list[Sample]] = {}
    for sample in load_samples(run.config):
        if sample.split == "test":
            samples.setdefault(sample.client, []).append(sample)
    chosen = [_chosen(found, count) for found in _answered(run, samples, max(MARKED, count))]
    out, images = list[Example](), 0
    for turn in range(max(map(len, chosen), default=0)):
        for sample, example in (own[turn] for own in chosen if turn < len(own)):
            picture = "" if sample.image is None else _thumbnail(read_image(sample, run.evaluation.data.limits))
            if images + len(picture) > IMAGE_BYTES or len(out) == MOST_EXAMPLES:
                return out
            images += len(picture)
            out.append(dataclasses.replace(example, image=picture))
    return out


def _answered(run: Run, samples: Mapping[str, list[Sample]], count: int) -> list[list[tuple[Sample, Example]]]:
    """Returns each client's first `count` test samples with the answers of its model and of the base model."""
    fed, evaluation = run.federation, run.evaluation
    chosen = [i for i, client in enumerate(evaluation.clients) if "test" in client.evaluation]
    clients = [evaluation.clients[i] for i in chosen]
    prompts = [first_prompts(client.evaluation["test"], count) for client in clients]
    models = [evaluation.model_of_client[i] for i in chosen]
    examinees = [examinee(fed, model, run.population[model], own, client.task)
                 for model, own, client in zip(models, prompts, clients, strict=True)]
    examinees += [base_examinee(fed.model, client.task, own) for own, client in zip(prompts, clients, strict=True)]
    width = 1 if fed.mesh is None else fed.mesh.shape["clients"]
    texts = answers(fed.model, evaluation.decoder, examinees, width)
    out = []
    for client, own, before in zip(clients, texts, texts[len(clients):], strict=False):
        metric = evaluation.metrics.get(client.task, "exact")
        out.append([(sample, Example(
            client.name, client.task, _question(sample), text, base, sample.references,
            scored(metric, [text], [sample.references]) if scores_single_answers(metric) else None))
            for sample, text, base in zip(samples[client.name], own, before, strict=False)])
    return out


def _chosen(found: list[tuple[Sample, Example]], count: int) -> list[tuple[Sample, Example]]:
    """Returns the first `count` right answers and the first `count` others, by turns."""
    right = [pair for pair in found if pair[1].outcome == "right"][:count]
    other = [pair for pair in found if pair[1].outcome != "right"][:count]
    return [pair for two in itertools.zip_longest(right, other) for pair in two if pair is not None]


def _question(sample: Sample) -> str:
    return "\n".join(text for who, text in sample.turns[:-1] if who == "human").replace("<image>", "").strip()


def _thumbnail(image: Image.Image) -> str:
    """Returns the image, scaled down, as a data URI: PNG, or JPEG where that takes less than half as much."""
    image = image.convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    files = {}
    for kind in ("png", "jpeg"):
        image.save(file := io.BytesIO(), format=kind, **({"quality": 80} if kind == "jpeg" else {"optimize": True}))
        files[kind] = file.getvalue()
    kind = "jpeg" if 2 * len(files["jpeg"]) < len(files["png"]) else "png"
    return f"data:image/{kind};base64," + base64.b64encode(files[kind]).decode()
