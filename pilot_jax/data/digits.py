"""Digit scenes: small canvases of real handwriting, from the 1,797 digits that ship with scikit-learn.

A scene shows 1–4 digits in coloured ink on a 3×3 grid. Handwriting is split by image into four pools that never mix,
so whatever is read off a *test* scene was written by no pen that training saw. All of it follows from one seed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from pilot_jax.data import digit_tasks
from pilot_jax.data.llava import Sample

CANVAS, GRID, CELL = 48, 3, 16  # pixels, cells a side, pixels a cell
INKS = {"red": (205, 35, 40), "green": (30, 140, 55), "blue": (40, 70, 205), "orange": (235, 135, 20),
        "purple": (140, 45, 160), "black": (25, 25, 30)}
POOLS = {"pretrain": 0.50, "train": 0.28, "validation": 0.08, "test": 0.14}
_POOL_SEED = 20250113  # fixed: the shipped base was trained on this pretrain pool


@dataclasses.dataclass(frozen=True)
class Style:
    """How one client's pictures look and how it words things."""

    paper: tuple[int, int, int] = (250, 250, 248)
    ink_shift: tuple[int, int, int] = (0, 0, 0)  # added to every ink
    rotation: float = 0.0  # degrees, the middle of the client's slant
    wording: int = 0  # index into digit_tasks' wordings
    own_wording: float = 1.0  # share of samples in that wording; the others have wording 0


@dataclasses.dataclass(frozen=True)
class Digit:
    value: int
    ink: str
    cell: int  # 0..8, row-major
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 of its ink, in [0, 1]


@dataclasses.dataclass(frozen=True)
class Scene:
    image: Image.Image
    digits: tuple[Digit, ...]  # in reading order


@functools.cache
def handwriting() -> tuple[np.ndarray, np.ndarray]:
    """All digits: images [1797, 8, 8] float32 in [0, 1], labels [1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16.0).astype(np.float32), data.target.astype(np.int64)


@functools.cache
def pool_indices(pool: str) -> np.ndarray:
    """Indices of the handwriting images in `pool`; the pools partition all 1,797."""
    order = np.random.default_rng(_POOL_SEED).permutation(len(handwriting()[1]))
    edges = np.round(np.cumsum([0.0, *POOLS.values()]) * len(order)).astype(int)
    k = list(POOLS).index(pool)
    return np.sort(order[edges[k]:edges[k + 1]])


@functools.cache
def _glyph(index: int, size: int) -> Image.Image:
    """Handwriting image `index` scaled to `size` pixels, in the middle of a cell."""
    glyph = Image.fromarray((handwriting()[0][index] * 255).astype(np.uint8))
    cell = Image.new("L", (CELL, CELL))
    cell.paste(glyph.resize((size, size), Image.Resampling.BICUBIC), ((CELL - size) // 2, (CELL - size) // 2))
    return cell


def _stamp(index: int, degrees: float, size: int) -> np.ndarray:
    """Ink coverage [CELL, CELL] of handwriting image `index`, scaled and rotated."""
    return np.asarray(_glyph(index, size).rotate(degrees, Image.Resampling.BILINEAR), np.float32) / 255.0


def draw_scene(rng: np.random.Generator, pool: str, style: Style | None, *, most: int = 4,
               distinct: bool = True) -> Scene:
    """One random scene from `pool`.

    Args:
        style: None draws a random one (what the base is pretrained on).
        most: at most so many digits; their number is uniform in 1..most.
        distinct: no digit value and no ink twice, so that questions have one answer.
    """
    _, labels = handwriting()
    members = pool_indices(pool)
    if style is None:
        paper = rng.integers(215, 256, 3)
        shift, slant, spread = rng.integers(-22, 23, 3), 0.0, 20.0
    else:
        paper, shift, slant, spread = np.asarray(style.paper), np.asarray(style.ink_shift), style.rotation, 5.0
    count = int(rng.integers(1, most + 1))
    cells = np.sort(rng.choice(GRID * GRID, count, replace=False))
    inks = rng.choice(list(INKS), count, replace=not distinct)
    chosen: list[int] = []
    while len(chosen) < count:
        index = int(members[rng.integers(len(members))])
        if not distinct or labels[index] not in [labels[i] for i in chosen]:
            chosen.append(index)
    canvas = np.empty((CANVAS, CANVAS, 3), np.float32)
    canvas[:] = paper
    digits = []
    for cell, ink, index in zip(cells, inks, chosen, strict=True):
        cover = _stamp(index, slant + rng.uniform(-spread, spread), int(rng.integers(13, 16)))
        row, column = divmod(int(cell), GRID)
        window = canvas[row * CELL:(row + 1) * CELL, column * CELL:(column + 1) * CELL]
        colour = np.clip(np.asarray(INKS[ink]) + shift, 0, 255)
        window[:] = window * (1 - cover[..., None]) + colour * cover[..., None]
        ys, xs = np.nonzero(cover > 0.25)
        x0, y0, x1, y1 = (float(v) / CANVAS for v in (
            column * CELL + xs.min(), row * CELL + ys.min(), column * CELL + xs.max() + 1, row * CELL + ys.max() + 1))
        digits.append(Digit(int(labels[index]), str(ink), int(cell), (x0, y0, x1, y1)))
    noisy = canvas + rng.normal(0, 3, canvas.shape)
    return Scene(Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)), tuple(digits))


PAPERS = ((250, 250, 248), (250, 238, 205), (214, 228, 246), (226, 244, 222), (240, 220, 232))
SHIFTS = ((0, 0, 0), (18, 10, -12), (-12, 8, 20), (10, -14, 12), (-16, 16, 0))
SLANTS = (0.0, 14.0, -14.0, 7.0, -7.0)


def client_style(number: int, heterogeneity: float = 1.0) -> Style:
    """The look and wording of a task's client `number` (they repeat after five).

    heterogeneity: 0 gives all the first one's, 1 each its own; between, looks lie between and that share of the samples
    has the own wording.
    """
    k, h = number % 5, heterogeneity
    def between(table: Any) -> Any:
        return tuple(round(first + h * (own - first)) for first, own in zip(table[0], table[k], strict=True))

    return Style(between(PAPERS), between(SHIFTS), h * SLANTS[k], k, h)


@dataclasses.dataclass(frozen=True)
class ClientSpec:
    name: str
    task: str
    style: Style
    sizes: dict[str, int]  # samples per split


SCENARIOS = {
    "a": (("vqa", "ocr", "caption"), 3),
    "b": (("vqa", "ocr", "caption", "grounding"), 5),
}


def scenario_clients(scenario: str, train: int, validation: int, test: int,
                     heterogeneity: float = 1.0, clients_per_task: int | None = None) -> list[ClientSpec]:
    """Clients of scenario "a" (3 tasks × 3, equal sizes) or "b" (4 tasks × 5, sizes falling to a quarter)."""
    tasks, per_task = SCENARIOS[scenario]
    per_task = clients_per_task or per_task
    digits = len(str(per_task - 1))
    out = []
    for task in tasks:
        for number in range(per_task):
            share = 1.0 if scenario == "a" else 1.0 - 0.75 * number / max(per_task - 1, 1)
            sizes = {"train": max(1, round(train * share)), "validation": validation, "test": test}
            out.append(ClientSpec(f"{task}_{number:0{digits}d}", task, client_style(number, heterogeneity), sizes))
    return out


def scene_samples(specs: list[ClientSpec], seed: int) -> Iterator[Sample]:
    """Every client's samples. A client's draws depend on the seed, its own name and the split alone."""
    for spec in specs:
        for split, size in spec.sizes.items():
            rng = np.random.default_rng([seed, *f"{spec.name}/{split}".encode()])
            for number in range(size):
                scene = draw_scene(rng, split, spec.style)
                style = spec.style
                # Drawn only where it can matter, so that scenes of full heterogeneity do not depend on it.
                own = style.own_wording == 1 or rng.random() < style.own_wording
                question, answer = digit_tasks.TASKS[spec.task](rng, scene, style.wording if own else 0)
                yield Sample(
                    id=f"{spec.name}-{split}-{number:05d}", image=scene.image,
                    turns=(("human", f"<image>\n{question}"), ("gpt", answer)),
                    task=spec.task, client=spec.name, split=split, source=f"digits:{spec.name}/{split}[{number}]")


def pretraining_samples(count: int, seed: int) -> list[Sample]:
    """Brief captions in the base's own wording, of scenes from the test pool in random styles: what the base can do
    before any federation."""
    rng, samples = np.random.default_rng([seed, *b"base"]), list[Sample]()
    while len(samples) < count:
        scene = draw_scene(rng, "test", None)
        question, answer = digit_tasks.pretraining_caption(rng, scene)
        if "briefly" in question:
            number = len(samples)
            samples.append(Sample(
                id=f"base-{number:05d}", image=scene.image, turns=(("human", f"<image>\n{question}"), ("gpt", answer)),
                task="base", client="", split="test", source=f"digits:base[{number}]"))
    return samples
