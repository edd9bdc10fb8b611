"""Scenario S: photographs and drawings with a sentence in many languages, Tux Paint's stamps, as federated data.

The stamps are Debian's package `tuxpaint-stamps-default`, under the GPL-2: the data set is made where it is used, and
neither pictures nor words are part of pilot_jax.

There are two tasks. `caption` has a client for each language; a picture belongs to one of them. `kind` has two
clients, photographs and drawings, and asks for the folder of a stamp, as "animals".
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from pilot_jax.data.llava.sample import Sample
from pilot_jax.errors import InputError

QUESTIONS = {"en": "What is this?", "de": "Was ist das?", "fr": "Qu'est-ce que c'est ?", "es": "¿Qué es esto?",
             "nl": "Wat is dit?", "sv": "Vad är det här?"}
KINDS = ("animals", "clothes", "food", "hobbies", "household", "people", "plants", "seasonal", "space", "sports",
         "town", "vehicles")  # folders of things; others hold letters, signs and weapons
SPLITS = {"train": 7, "validation": 1, "test": 2}  # tenths of the concepts
DRAWN = "cartoon"  # the folder of drawings


@dataclasses.dataclass(frozen=True)
class Stamp:
    """A picture, and a sentence about it in each language."""

    file: Path
    kind: str
    drawn: bool
    texts: dict[str, str]  # by language
    concept: str  # the same for pictures of one thing


def _number(text: str, below: int) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % below


def _texts(file: Path) -> dict[str, str]:
    """Returns a stamp's sentences: English in the first line, then "xx.utf8=" and the sentence in language xx."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    others = (line.split(".utf8=", 1) for line in lines[1:] if ".utf8=" in line)
    found = {"en": lines[0].strip()} | {language.strip(): text.strip() for language, text in others}
    return {language: text for language, text in found.items() if text}


def read_stamps(folder: Path) -> list[Stamp]:
    """Returns the stamps in a folder and all below it that have a sentence, in the order of their paths.

    Stamps with the same English sentence, or whose files are named alike but for numbers or size, are one concept.

    Raises:
        InputError: there is none.
    """
    found, parents = list[tuple[Path, tuple[str, ...], dict[str, str]]](), dict[str, str]()
    for file in sorted(folder.rglob("*.png")):
        words, parts = file.with_suffix(".txt"), file.relative_to(folder).parts
        if parts[0] in KINDS and words.is_file() and not re.search(r"_(mirror|flip)", file.stem):
            texts = _texts(words)
            if "en" in texts:
                found.append((file, parts, texts))
    if not found:
        raise InputError(f"{folder}: no stamps in it. Give the folder that Debian's package tuxpaint-stamps-default "
                         "installs, /usr/share/tuxpaint/stamps.")

    def top(name: str) -> str:
        while parents.setdefault(name, name) != name:
            name = parents[name]
        return name

    for file, _, texts in found:
        name = re.sub(r"[\d_]+$|[_-]?(photo|big|small|baby)$", "", file.stem.lower())
        parents[top("sentence " + texts["en"].lower())] = top("file " + name)
    return [Stamp(file, parts[0], DRAWN in parts, texts, top("sentence " + texts["en"].lower()))
            for file, parts, texts in found]


def _split(concept: str) -> str:
    number = _number(concept, sum(SPLITS.values()))
    for split, tenths in SPLITS.items():
        number -= tenths
        if number < 0:
            return split
    raise AssertionError


def on_white(file: Path, side: int) -> Image.Image:
    """Returns a stamp on white, RGB [side, side], as large as it fits.

    Raises:
        InputError: the file is not an image.
    """
    try:
        with Image.open(file, formats=["PNG"]) as opened:
            image = opened.convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{file}: cannot be read as a PNG image ({error}). Install the stamps again.") from None
    scale = (side - 4) / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))),
                         Image.Resampling.BICUBIC)
    canvas = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    canvas.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas.convert("RGB")


def stamp_samples(folder: Path, side: int = 112) -> Iterator[Sample]:
    """Yields the samples of all clients: caption_en, …, kind_photo and kind_drawing.

    Raises:
        InputError: there are no stamps in the folder, or one cannot be read.
    """
    languages = tuple(QUESTIONS)
    for stamp in read_stamps(folder):
        path = stamp.file.relative_to(folder).with_suffix("")
        image, split = on_white(stamp.file, side), _split(stamp.concept)
        asked = [("kind", "drawing" if stamp.drawn else "photo", "Which kind of thing is this?", stamp.kind)]
        language = languages[_number(str(path), len(languages))]
        if language in stamp.texts:
            asked.append(("caption", language, QUESTIONS[language], stamp.texts[language]))
        for task, group, question, answer in asked:
            client = f"{task}_{group}"
            yield Sample(
                id=f"{client}-{'-'.join(path.parts)}", image=image, task=task, client=client, split=split,
                turns=(("human", f"<image>\n{question}"), ("gpt", answer)), source=str(stamp.file))
