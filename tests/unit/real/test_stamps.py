"""Tests of the data set that is made of Tux Paint's stamps, on a few stamps written here."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from pilot_jax.real.stamps import QUESTIONS, SPLITS, on_white, read_stamps, stamp_samples

WORDS = "A red {0}.\nde.utf8=Ein rotes {0}.\nfr.utf8=Un {0} rouge.\nes.utf8= \nxx.utf8=?\nnonsense\n"


@pytest.fixture
def stamps(tmp_path):
    """Writes 60 stamps of 30 things, photographs and drawings, and files that are no stamps; returns their folder."""
    folder = tmp_path / "stamps"
    for number in range(60):
        kind, cartoon = ("animals", "food")[number % 2], "cartoon" if number < 20 else "photo"
        place = folder / kind / cartoon
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (40, 20), (200, number, 0, 128)).save(place / f"thing{'abc'[number // 20]}_{number}.png")
        (place / f"thing{'abc'[number // 20]}_{number}.txt").write_text(WORDS.format(f"thing {number // 2}"))
    (folder / "symbols").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "symbols" / "a.png")
    (folder / "symbols" / "a.txt").write_text("The letter A.")
    Image.new("RGB", (9, 9)).save(folder / "food" / "silent.png")
    return folder


def test_a_thing_is_one_concept_in_one_split(stamps):
    every = read_stamps(stamps)
    assert len(every) == 60 and {s.kind for s in every} == {"animals", "food"} and sum(s.drawn for s in every) == 20
    assert set(every[0].texts) == {"en", "de", "fr", "xx"}  # a sentence of blanks is none
    assert len({s.concept for s in every}) == 3  # thinga_0, thinga_1, … are one thing in several pictures
    places = {}
    for sample in stamp_samples(stamps):
        name = sample.id.split("-", 1)[1].split("_")[0].rsplit("-", 1)[1]
        assert places.setdefault(name, sample.split) == sample.split in SPLITS


def test_clients_are_languages_and_kinds_of_pictures(stamps, call, tmp_path):
    code, out, err = call("data", "stamps", stamps, tmp_path / "out", "--side", 32)
    assert code == 0 and "GPL-2" in out, err
    entries = json.loads((tmp_path / "out" / "data.json").read_text())
    clients = {e["client"] for e in entries}
    kinds = {"kind_photo", "kind_drawing"}
    assert kinds < clients <= {f"caption_{language}" for language in QUESTIONS} | kinds
    german = [e for e in entries if e["client"] == "caption_de"]
    assert german and all(e["conversations"][1]["value"].startswith("Ein rotes") for e in german)
    assert not [e for e in entries if e["client"] == "caption_es"]  # it has no sentence
    image = np.asarray(Image.open(tmp_path / "out" / "images" / entries[0]["image"]))
    assert image.shape == (32, 32, 3) and (image[0] == 255).all() and image[16, 16, 0] > image[16, 16, 2]
    assert call("data", "check", tmp_path / "out")[0] == 0


def test_stamps_that_cannot_be_used(stamps, call, tmp_path):
    code, _, err = call("data", "stamps", tmp_path / "none", tmp_path / "out")
    assert code == 2 and "tuxpaint-stamps-default" in err
    file = next((stamps / "food" / "photo").glob("*.png"))
    file.write_bytes(file.read_bytes()[:60])
    code, _, err = call("data", "stamps", stamps, tmp_path / "out")
    assert code == 2 and str(file) in err and not (tmp_path / "out").exists()
    Image.new("RGB", (1, 9000)).save(file)
    assert on_white(file, 56).size == (56, 56)
