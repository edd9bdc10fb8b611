"""Federations on digit scenes: each client's task, look of scenes, wording and number of samples."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pilot_jax.data.llava.image_field import DrawnImage
from pilot_jax.data.llava.sample import Sample
from pilot_jax.embedded.scenes import Style, draw_scene
from pilot_jax.embedded.tasks import BASE_WORDINGS, CLIENT_WORDINGS, TASKS, pretraining_caption

PAPERS = ((250, 250, 248), (250, 238, 205), (214, 228, 246), (226, 244, 222), (240, 220, 232))
SHIFTS = ((0, 0, 0), (18, 10, -12), (-12, 8, 20), (10, -14, 12), (-16, 16, 0))
SLANTS = (0.0, 14.0, -14.0, 7.0, -7.0)


def client_style(number: int, heterogeneity: float = 1.0) -> Style:
    """Returns the look and the wording of a task's client `number`, from 0; they repeat after five clients.

    Args:
        heterogeneity: with 0, all clients have the look and wording of client 0; with 1, each has its own. In between,
            looks are interpolated, and this share of a client's samples has the client's own wording.
    """
    k, h = number % 5, heterogeneity

    def between(table: Any) -> Any:
        return tuple(round(first + h * (own - first)) for first, own in zip(table[0], table[k], strict=True))

    return Style(between(PAPERS), between(SHIFTS), h * SLANTS[k], k, h)


# Looks of scenario c, which are unlike everything that a base has seen.
LOOKS = (Style(paper=(250, 238, 205), rotation=45.0), Style(paper=(214, 228, 246), mirrored=True), Style(noise=30.0),
         Style(ink_shift=(90, 90, 90)), Style(paper=(226, 244, 222), ink_shift=(60, -30, -30), rotation=-40.0))


def benchmark_style(number: int, look: str, wording: str, labels: str, per_task: int) -> Style:
    """Returns the look, the wording and the digits of a task's client `number`, from 0 to `per_task`, in scenario c.

    Args:
        look, wording, labels: values of the keys of the same names; the config's descriptions explain them.
    """
    own = number % len(CLIENT_WORDINGS)
    words = {"known": (BASE_WORDINGS[0], 1.0), "shared": (0, 1.0), "half": (1 + own % 4, 0.5), "own": (own, 1.0)}
    index, share = words[wording]
    values = tuple(v for v in range(10) if v % per_task == number) if labels == "own" else ()
    return dataclasses.replace(LOOKS[0 if look == "same" else number % len(LOOKS)], wording=index, own_wording=share,
                               values=values)


@dataclasses.dataclass(frozen=True)
class ClientSpec:
    """The specification of a client, from which its samples are drawn."""

    name: str
    task: str
    style: Style
    sizes: dict[str, int]  # number of samples of each split


SCENARIOS = {  # the tasks, and the number of clients of each task
    "a": (("vqa", "ocr", "caption"), 3),
    "b": (("vqa", "ocr", "caption", "grounding"), 5),
    "c": (("vqa", "ocr", "caption", "position"), 3),
}


def scenario_clients(scenario: str, train: int, validation: int, test: int, heterogeneity: float = 1.0,
                     clients_per_task: int | None = None) -> list[ClientSpec]:
    """Returns the clients of scenario "a" (3 tasks × 3 clients of equal size) or "b" (4 tasks × 5 clients).

    Args:
        train, validation, test: numbers of samples of each client. In scenario "b", training samples fall from `train`
            for a task's first client to a quarter of it for the last.
        heterogeneity: see `client_style`.
        clients_per_task: number of clients per task; None: the scenario's own.
    """
    per_task = clients_per_task or SCENARIOS[scenario][1]
    shares = [1.0 if scenario == "a" else 1.0 - 0.75 * number / max(per_task - 1, 1) for number in range(per_task)]
    return _clients(scenario, [client_style(number, heterogeneity) for number in range(per_task)],
                    [{"train": max(1, round(train * share)), "validation": validation, "test": test}
                     for share in shares])


def benchmark_clients(train: int, validation: int, test: int, look: str = "own", wording: str = "own",
                      labels: str = "same", clients_per_task: int | None = None) -> list[ClientSpec]:
    """Returns the clients of scenario "c" (4 tasks × 3 clients of equal size); see `benchmark_style`."""
    per_task = clients_per_task or SCENARIOS["c"][1]
    return _clients("c", [benchmark_style(number, look, wording, labels, per_task) for number in range(per_task)],
                    [{"train": train, "validation": validation, "test": test}] * per_task)


def clients_of(scenario: str, sizes: tuple[int, int, int], heterogeneity: float = 1.0, look: str = "own",
               wording: str = "own", labels: str = "same", clients_per_task: int | None = None) -> list[ClientSpec]:
    """Returns the clients of any scenario; `sizes` are the numbers of training, validation and test samples."""
    if scenario == "c":
        return benchmark_clients(*sizes, look, wording, labels, clients_per_task)
    return scenario_clients(scenario, *sizes, heterogeneity, clients_per_task)


def _clients(scenario: str, styles: Sequence[Style], sizes: Sequence[dict[str, int]]) -> list[ClientSpec]:
    """Returns, for each task of a scenario, one client with each of the styles and sizes."""
    digits = len(str(len(styles) - 1))
    return [ClientSpec(f"{task}_{number:0{digits}d}", task, style, size)
            for task in SCENARIOS[scenario][0] for number, (style, size) in enumerate(zip(styles, sizes, strict=True))]


def scene_samples(specs: list[ClientSpec], seed: int) -> Iterator[Sample]:
    """Yields every client's samples, which depend only on the seed, the client's specification and the split."""
    for spec in specs:
        for split, size in spec.sizes.items():
            yield from _samples(spec.name, spec.task, spec.style, split, size, seed)


def _samples(name: str, task: str, style: Style, split: str, size: int, seed: int) -> Iterator[Sample]:
    of_all = style.values and split != "train"  # a task's clients with digits of their own are tested on the same
    rng = np.random.default_rng([seed, *f"{task if of_all else name}/{split}".encode()])
    for number in range(size):
        scene = draw_scene(rng, split, style)
        # No random number is drawn at full heterogeneity, where it could not matter.
        own = style.own_wording == 1 or rng.random() < style.own_wording
        question, answer = TASKS[task](rng, scene, style.wording if own else style.common_wording)
        turns = ("human", f"<image>\n{question}"), ("gpt", answer)
        yield _sample(name, task, split, number, scene.image, turns)


def _sample(name: str, task: str, split: str, number: int, image: Any, turns: tuple[tuple[str, str], ...]) -> Sample:
    return Sample(id=f"{name}-{split}-{number:05d}", image=image, turns=turns, task=task, client=name, split=split,
                  source=f"digits:{name}/{split}[{number}]")


@functools.lru_cache(maxsize=2)
def _images(name: str, task: str, style: Style, split: str, size: int, seed: int) -> list[Any]:
    return [sample.image for sample in _samples(name, task, style, split, size, seed)]


def lazy_samples(specs: list[ClientSpec], seed: int, turns: list[list[list[str]]] | None = None) -> Iterator[Sample]:
    """Yields the samples of `scene_samples` with images that are drawn when they are needed.

    Args:
        turns: the samples' conversations, if they are known; otherwise everything is drawn now.
    """
    rest = iter(turns or [])
    for spec in specs:
        for split, size in spec.sizes.items():
            stream = spec.name, spec.task, spec.style, split, size, seed
            drawn = _samples(*stream) if turns is None else (
                _sample(spec.name, spec.task, split, number, None, tuple((who, text) for who, text in next(rest)))
                for number in range(size))
            for number, sample in enumerate(drawn):
                yield dataclasses.replace(sample, image=DrawnImage(
                    f"digits {stream} {number}", functools.partial(_image, sample.image, stream, number)))


def _image(image: Any, stream: tuple[Any, ...], number: int) -> Any:
    return _images(*stream)[number] if image is None else image


def pretraining_samples(count: int, seed: int) -> list[Sample]:
    """Returns samples of a task that the base has learnt in pretraining, brief captions.

    The scenes have handwriting from the pool "test" and random styles.
    """
    rng, samples = np.random.default_rng([seed, *b"base"]), list[Sample]()
    while len(samples) < count:
        scene = draw_scene(rng, "test", None)
        question, answer = pretraining_caption(rng, scene)
        if "briefly" in question:
            number = len(samples)
            samples.append(Sample(
                id=f"base-{number:05d}", image=scene.image, turns=(("human", f"<image>\n{question}"), ("gpt", answer)),
                task="base", client="", split="test", source=f"digits:base[{number}]"))
    return samples
