"""Digit scenes: real handwriting in coloured ink on a small canvas. Each split has a handwriting pool of its own."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
from PIL import Image

ASSETS = Path(__file__).parent / "assets"
CANVAS, GRID, CELL = 48, 3, 16  # side of the canvas in pixels and in cells, side of a cell in pixels
INKS = {"red": (205, 35, 40), "green": (30, 140, 55), "blue": (40, 70, 205), "orange": (235, 135, 20),
        "purple": (140, 45, 160), "black": (25, 25, 30)}
POOLS = {"pretrain": 0.50, "train": 0.28, "validation": 0.08, "test": 0.14}  # shares of all handwriting
_POOL_SEED = 20250113  # a constant, because the embedded base was trained on this pool "pretrain"


@dataclasses.dataclass(frozen=True)
class Style:
    """The look of one client's scenes, and the wording of its questions and answers."""

    paper: tuple[int, int, int] = (250, 250, 248)  # RGB colour of the background
    ink_shift: tuple[int, int, int] = (0, 0, 0)  # RGB difference that is added to every ink
    rotation: float = 0.0  # mean rotation of the client's digits, in degrees
    wording: int = 0  # index into the wordings of `tasks`
    own_wording: float = 1.0  # share of samples with this wording; the others have `common_wording`
    common_wording: int = 0
    mirrored: bool = False  # whether the handwriting is mirrored left to right
    noise: float = 3.0  # standard deviation of the noise on every pixel, in levels of 0..255
    values: tuple[int, ...] = ()  # digits of nine in ten draws in training; empty: all digits are drawn alike


@dataclasses.dataclass(frozen=True)
class Digit:
    """One digit of a scene."""

    value: int
    ink: str
    cell: int  # 0..8, row-major
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 of its ink, in [0, 1]


@dataclasses.dataclass(frozen=True)
class Scene:
    """An image and the digits in it."""

    image: Image.Image
    digits: tuple[Digit, ...]  # in reading order


@functools.cache
def handwriting() -> tuple[np.ndarray, np.ndarray]:
    """Returns all handwritten digits: images, float32 [1797, 8, 8] in [0, 1], and labels, int64 [1797].

    They are the test set of the UCI data set "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak,
    1998, CC BY 4.0), in the order of scikit-learn's `load_digits`.
    """
    with np.load(ASSETS / "digits.npz") as data:
        return (data["images"] / 16.0).astype(np.float32), data["labels"].astype(np.int64)


@functools.cache
def pool_indices(pool: str) -> np.ndarray:
    """Returns the indices of the handwriting images in a pool; each of the 1,797 images is in exactly one pool."""
    order = np.random.default_rng(_POOL_SEED).permutation(len(handwriting()[1]))
    edges = np.round(np.cumsum([0.0, *POOLS.values()]) * len(order)).astype(int)
    k = list(POOLS).index(pool)
    return np.sort(order[edges[k]:edges[k + 1]])


@functools.cache
def _glyph(index: int, size: int) -> Image.Image:
    """Returns handwriting image `index`, scaled to `size` pixels, in the middle of a cell."""
    glyph = Image.fromarray((handwriting()[0][index] * 255).astype(np.uint8))
    cell = Image.new("L", (CELL, CELL))
    cell.paste(glyph.resize((size, size), Image.Resampling.BICUBIC), ((CELL - size) // 2, (CELL - size) // 2))
    return cell


def _stamp(index: int, degrees: float, size: int) -> np.ndarray:
    """Returns the ink coverage, float32 [CELL, CELL] in [0, 1], of handwriting image `index`, scaled and rotated."""
    return np.asarray(_glyph(index, size).rotate(degrees, Image.Resampling.BILINEAR), np.float32) / 255.0


def draw_scene(rng: np.random.Generator, pool: str, style: Style | None, *, most: int = 4,
               distinct: bool = True) -> Scene:
    """Returns one random scene with handwriting from `pool`.

    Args:
        style: the scene's style; None: a random one, as in the scenes on which the base is pretrained.
        most: the largest number of digits; the number is uniform in 1..most.
        distinct: whether all digits differ in value and in ink, so that each question has one answer.
    """
    if style is None:
        paper = rng.integers(215, 256, 3)
        shift, slant, spread = rng.integers(-22, 23, 3), 0.0, 20.0
        style = Style()
    else:
        paper, shift, slant, spread = np.asarray(style.paper), np.asarray(style.ink_shift), style.rotation, 5.0
    count = int(rng.integers(1, most + 1))
    cells = np.sort(rng.choice(GRID * GRID, count, replace=False))
    inks = rng.choice(list(INKS), count, replace=not distinct)
    chosen = _handwriting_of_scene(rng, pool, count, distinct, style.values if pool == "train" else ())
    canvas = np.empty((CANVAS, CANVAS, 3), np.float32)
    canvas[:] = paper
    digits = []
    for cell, ink, index in zip(cells, inks, chosen, strict=True):
        coverage = _stamp(index, slant + rng.uniform(-spread, spread), int(rng.integers(13, 16)))
        coverage = coverage[:, ::-1] if style.mirrored else coverage
        colour = np.clip(np.asarray(INKS[ink]) + shift, 0, 255)
        box = _draw(canvas, int(cell), coverage, colour)
        digits.append(Digit(int(handwriting()[1][index]), str(ink), int(cell), box))
    noisy = canvas + rng.normal(0, style.noise, canvas.shape)
    return Scene(Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)), tuple(digits))


def _handwriting_of_scene(rng: np.random.Generator, pool: str, count: int, distinct: bool,
                          values: tuple[int, ...]) -> list[int]:
    """Returns the indices of `count` handwriting images from `pool`; with `distinct`, their labels differ.

    Args:
        values: labels from which nine in ten are drawn, before `distinct` refuses any; empty: all are drawn alike.
    """
    _, labels = handwriting()
    everything = pool_indices(pool)
    own = everything[np.isin(labels[everything], values)] if values else everything
    chosen: list[int] = []
    while len(chosen) < count:
        members = own if not values or rng.random() < 0.9 else everything
        index = int(members[rng.integers(len(members))])
        if not distinct or labels[index] not in [labels[i] for i in chosen]:
            chosen.append(index)
    return chosen


def _draw(canvas: np.ndarray, cell: int, coverage: np.ndarray, colour: np.ndarray) -> tuple[float, float, float, float]:
    """Draws a digit into a cell of the canvas, float32 [CANVAS, CANVAS, 3], and returns the box of its ink."""
    row, column = divmod(cell, GRID)
    window = canvas[row * CELL:(row + 1) * CELL, column * CELL:(column + 1) * CELL]
    window[:] = window * (1 - coverage[..., None]) + colour * coverage[..., None]
    ys, xs = np.nonzero(coverage > 0.25)
    x0, y0, x1, y1 = (float(v) / CANVAS for v in (
        column * CELL + xs.min(), row * CELL + ys.min(), column * CELL + xs.max() + 1, row * CELL + ys.max() + 1))
    return x0, y0, x1, y1
