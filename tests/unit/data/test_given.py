"""Tests samples that a program gives in Python: all forms of them, their clients, their checksum, what is wrong."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pilot_jax import Data, Sample
from pilot_jax.config import parse_config
from pilot_jax.data.given import samples_sha256
from pilot_jax.data.images import read_image
from pilot_jax.errors import InputError

SETTINGS = parse_config({}).data


def picture(number):
    return Image.new("RGB", (4, 4), (number * 20, 0, 255))


def entry(number, **changes):
    return {"id": str(number), "image": picture(number), "task": "t", "client": f"c{number % 2}",
            "split": "test" if number > 3 else "train", "answers": ["a", "b"], "kind": "k",
            "conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": f"{number}"}]
            } | changes


ENTRIES = [entry(i) for i in range(6)]


def as_file(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def table(entries):
    import datasets

    rows = [e | {"image": {"bytes": as_file(e["image"]), "path": None}} for e in entries]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def tables():
    import datasets

    return datasets.DatasetDict({"train": table(ENTRIES[:4]).remove_columns("split"),
                                 "test": table(ENTRIES[4:]).remove_columns("split")})


FORMS = {
    "samples": lambda folder: [Sample(e["id"], e["image"], (("human", "<image>\nq"), ("gpt", e["id"])), "t",
                                      e["client"], e["split"], "", ("a", "b"), "k") for e in ENTRIES],
    "a generator": lambda folder: (dict(e) for e in ENTRIES),
    "lists by split": lambda folder: {split: [{k: v for k, v in e.items() if k != "split"} for e in ENTRIES
                                              if e["split"] == split] for split in ("train", "test")},
    "bytes of images": lambda folder: [e | {"image": as_file(e["image"])} for e in ENTRIES],
    "paths as texts": lambda folder: [e | {"image": str(folder / f"{e['id']}.png")} for e in ENTRIES],
    "paths": lambda folder: [e | {"image": folder / f"{e['id']}.png"} for e in ENTRIES],
    "messages": lambda folder: [{k: v for k, v in e.items() if k != "conversations"} | {"messages": [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": e["id"]}]} for e in ENTRIES],
    "a Dataset": lambda folder: table(ENTRIES),
    "a DatasetDict": lambda folder: tables(),
    "a stream of a Dataset": lambda folder: table(ENTRIES).to_iterable_dataset(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_samples(tmp_path, form):
    for e in ENTRIES:
        e["image"].save(tmp_path / f"{e['id']}.png")
    data = Data(FORMS[form](tmp_path))
    for _ in range(2):  # a generator too can be read again, when the run is restored
        samples = data.samples(SETTINGS)
        assert len(samples) == 6
        for sample, e in zip(samples, ENTRIES, strict=True):
            assert (sample.id, sample.task, sample.client, sample.split, sample.answers, sample.kind) == (
                e["id"], "t", e["client"], e["split"], ("a", "b"), "k")
            assert sample.turns == (("human", "<image>\nq"), ("gpt", e["id"]))
            np.testing.assert_array_equal(np.asarray(read_image(sample)), np.asarray(e["image"]))


@pytest.mark.parametrize("change", [
    {"image": picture(9)}, {"task": "u"}, {"client": "d"}, {"split": "test"}, {"answers": ["a"]}, {"kind": "l"},
    {"conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "other"}]}])
def test_the_checksum_is_that_of_everything_but_ids(change):
    def checksum(*first):
        return samples_sha256(Data([*first, *ENTRIES[1:]]).samples(SETTINGS))

    same = checksum(ENTRIES[0])
    assert same == checksum(entry(0, id="another")) != checksum(entry(0, **change))


def test_a_function_names_the_clients():
    data = Data(ENTRIES, partition=lambda samples: [f"by {s.turns[-1][1]}" for s in samples])
    assert [s.client for s in data.samples(SETTINGS)] == [f"by {i}" for i in range(6)]


@pytest.mark.parametrize(("source", "message"), [
    ([entry(0), entry(1, task=None)], r"^data\[1\]: task: missing"),
    ([entry(0, image="gone.png")], r"^data\[0\]: image: gone\.png does not exist"),
    ([entry(0, image=3)], r"^data\[0\]: image: 3 must be a path, an image or the bytes of one"),
    ({"dev": [entry(0)]}, "data: 'dev' is not a split"), (entry(0), "data: 'id' is not a split"),
    (3, "data: a int has no entries"), ([], "no sample was given"), (["x"], r"^data\[0\]: expected an object"),
    ({"test": [entry(0, conversations=[])]}, r"^data \(test\)\[0\]: conversations")])
def test_what_is_wrong_is_named(source, message):
    with pytest.raises(InputError, match=message):
        Data(source).samples(SETTINGS)


@pytest.mark.parametrize(("names", "message"), [
    (["a"], "it returned 1 client for 6 samples"), (None, "it returned a NoneType"), ("abcdef", "it returned a str"),
    ([1.5] * 6, r"data\[0\]: client: 1\.5 must be a text")])
def test_a_function_that_names_no_client_for_each_is_refused(names, message):
    with pytest.raises(InputError, match=message):
        Data(ENTRIES, partition=lambda samples: names).samples(SETTINGS)


def test_paths_stay_inside_the_root_if_there_is_one(tmp_path):
    picture(0).save(tmp_path / "x.png")
    settings = parse_config({"data": {"image_root": str(tmp_path)}}).data
    assert Data([entry(0, image="x.png")]).samples(settings)[0].image == tmp_path / "x.png"
    with pytest.raises(InputError, match=r"must be a path inside data\.image_root"):
        Data([entry(0, image="../x.png")]).samples(settings)
