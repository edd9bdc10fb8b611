"""The emoji set: about 880 concepts, each drawn in three open styles, with words in five languages.

The set is in `assets/emoji`: a zip file of pictures for each style, `concepts.json`, and NOTICE with origins and
licences. `emoji_build.py` made it. Concepts are in pools that never mix, so that a model may be trained on some and
asked about others.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from pilot_jax.errors import InputError
from pilot_jax.files import read_json

ASSETS = Path(__file__).parent / "assets" / "emoji"
STYLES = ("noto", "twemoji", "fluent")
POOLS = {"base": 0.50, "train": 0.25, "validation": 0.08, "test": 0.17}  # shares of all concepts
LANGUAGES = ("de", "es", "fr", "it")  # of the translated names


@dataclasses.dataclass(frozen=True)
class Concept:
    """A thing, with the words for it; it has one picture in each style."""

    key: str  # code points in hexadecimal, joined by "-"; also the name of its pictures
    name: str  # English, as "dog"
    names: tuple[str, ...]  # other names that are right, as "dog face"
    kinds: tuple[str, ...]  # the kind of thing, then others that are right; empty: a picture does not tell it
    group: str  # near-duplicates have the same
    pool: str  # a key of POOLS
    keywords: tuple[str, ...]  # English words that go with it
    translations: dict[str, str]  # its name by language
    colours: dict[str, tuple[str, ...]]  # by style: the colour of most of it, or two between which it lies, or none


@dataclasses.dataclass(frozen=True)
class Picture:
    """A concept in one style."""

    concept: Concept
    style: str
    image: Image.Image  # RGB, 56 × 56, on white

    @property
    def colours(self) -> tuple[str, ...]:
        """The names of the colour that most of it has; see `Concept.colours`."""
        return self.concept.colours[self.style]


@functools.cache
def concepts(folder: Path = ASSETS) -> tuple[Concept, ...]:
    """Returns all concepts, in Unicode's order, of the set in `folder`.

    Raises:
        InputError: `concepts.json` cannot be read.
    """
    raw = read_json(folder / "concepts.json", "Give the folder of a set that pilot_jax.real.emoji_build wrote.")
    try:
        return tuple(Concept(
            one["key"], one["name"], tuple(one["names"]), tuple(one["kinds"]), one["group"], one["pool"],
            tuple(one["keywords"]), one["translations"], {s: tuple(names) for s, names in one["colours"].items()})
            for one in raw["concepts"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / 'concepts.json'}: not the set's format ({error!r}). Build the set again "
                         "with pilot_jax.real.emoji_build.") from None


def pool(name: str, folder: Path = ASSETS) -> tuple[Concept, ...]:
    """Returns the concepts of a pool."""
    return tuple(concept for concept in concepts(folder) if concept.pool == name)


@functools.cache
def _archive(folder: Path, style: str) -> dict[str, bytes]:
    """Returns the encoded pictures of a style by concept key."""
    with zipfile.ZipFile(folder / f"{style}.zip") as archive:
        return {name.removesuffix(".png"): archive.read(name) for name in archive.namelist()}


def picture(concept: Concept, style: str, folder: Path = ASSETS) -> Picture:
    """Returns the picture of a concept in a style of `STYLES`."""
    with Image.open(io.BytesIO(_archive(folder, style)[concept.key]), formats=["PNG"]) as image:
        return Picture(concept, style, image.convert("RGB"))


def pictures(pool_name: str, styles: tuple[str, ...] = STYLES, folder: Path = ASSETS) -> Iterator[Picture]:
    """Yields the pictures of a pool's concepts in all styles; pool "base" is the one for training a base model."""
    for concept in pool(pool_name, folder):
        for style in styles:
            yield picture(concept, style, folder)


def checksum(folder: Path = ASSETS) -> str:
    """Returns the SHA-256 of the whole set: of all words, and of all pixels, however they are encoded."""
    digest = hashlib.sha256()
    for concept in concepts(folder):
        digest.update(repr(concept).encode())
        for style in STYLES:
            digest.update(picture(concept, style, folder).image.tobytes())
    return digest.hexdigest()
