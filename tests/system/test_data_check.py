"""Tests that `data check` refuses what a run refuses, with its words, and nothing else."""

from __future__ import annotations

import json

import pytest
from conftest import llava_entry, write
from test_own_data import BROKEN, checkpoint, photos, without  # noqa: F401  # two of them are fixtures

import pilot_jax
from pilot_jax.config import parse_config
from pilot_jax.errors import InputError
from pilot_jax.runs.ahead import compute_all_features
from pilot_jax.runs.prepare import checked_data, prepare


def entries_of(folder):
    return json.loads((folder / "all.json").read_text())


def change(**changes):
    """Returns a function that changes every entry; a change to None removes the key."""
    def apply(folder):
        write(folder, "all.json", [{k: v for k, v in (e | changes).items() if v is not None}
                                   for e in entries_of(folder)])

    return apply


def add(*entries):
    return lambda folder: write(folder, "all.json", [*entries_of(folder), *entries])


def first(changes):
    def apply(folder):
        one, *rest = entries_of(folder)
        write(folder, "all.json", [{k: v for k, v in (one | changes).items() if v is not None}, *rest])

    return apply


SYSTEM = llava_entry(task="vqa", client="north", conversations=[
    {"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])
LONG = [{"from": "human", "value": "what? " * 200}, {"from": "gpt", "value": "a"}]
EQUAL = {"data.partition": "equal", "federation.clients": 4}
# By name: what is done to good data, changes of the config, and a part of the message; None: a run takes them.
CASES = {name: (spoil, {}, message) for name, (spoil, message) in BROKEN.items()} | {
    "good": (lambda folder: None, {}, None),
    "equal ids": (change(id="1"), {}, None),
    "an empty answer": (add(SYSTEM | {"conversations": [LONG[0], {"from": "gpt", "value": " "}]}), {}, None),
    "no held-out data": (change(split=None), {}, None),
    "shares held out": (change(split=None), {"data.hold_out.test": 0.3, "data.hold_out.validation": 0.2}, None),
    "shares of data that have splits": (lambda folder: None, {"data.hold_out.test": 0.3}, "data.hold_out.test: every"),
    "a system turn": (add(SYSTEM), {}, None),
    "a system turn without a place": (add(SYSTEM), {"data.template": "plain"}, "plain has no place for a system turn"),
    "no client": (change(client=None), {}, "all.json[0]: client: missing"),
    "no client, divided": (change(client=None), EQUAL, None),
    "too few to divide": (change(client=None), EQUAL | {"federation.clients": 20}, "samples for 10 clients"),
    "not a multiple": (change(client=None), EQUAL | {"federation.clients": 3}, "multiple of the number of tasks, 2"),
    "another number of clients": (lambda folder: None, {"federation.clients": 3}, "has 4 clients"),
    "two tasks": (first({"task": "ocr"}), {}, "(ocr, vqa), first ocr at"),
    "an entry without its task": (first({"task": None}), {}, "(all, vqa), first all at"),
    "nothing to train": (add(llava_entry(client="x", task="vqa", split="test")), {},
                         "client 'x' has no training sample"),
    "a long prompt": (add(llava_entry(client="north", task="vqa", split="test", conversations=LONG)),
                      {"data.max_length": 200}, "tokens, data.max_length is 200"),
    "a long prompt in training": (add(llava_entry(client="north", task="vqa", conversations=LONG)),
                                  {"data.max_length": 200}, "no answer token within data.max_length (200)"),
    "a cut image": (lambda folder: None, {"data.max_length": 30}, "would cut the image"),
    "an unknown template": (lambda folder: None, {"data.template": "vicuna"}, "data.template: 'vicuna' is not known"),
    "a template without its token": (lambda folder: None, {"data.template": "tokenizer"}, "has no chat template"),
    "no sample": (lambda folder: write(folder, "all.json", []), {}, "holds no sample"),
    "no list": (lambda folder: write(folder, "all.json", {}), {}, "a JSON list of samples"),
    "no file": (lambda folder: (folder / "all.json").unlink(), {}, "is neither a data file"),
    "several images": (first({"images": ["a", "b"]}), {}, "images: several images in a sample are not supported"),
}


@pytest.fixture(scope="module")
def model(checkpoint):  # noqa: F811
    return pilot_jax.load(checkpoint)


@pytest.mark.parametrize("name", CASES)
def test_check_and_run_agree(checkpoint, model, photos, name):  # noqa: F811
    spoil, changes, message = CASES[name]
    spoil(photos)
    raw = {"model": {"path": str(checkpoint)}, "data": {"path": str(photos), "hold_out": {}}, "federation": {}}
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        node = raw
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    config, by_run, by_check = parse_config(raw), None, []
    try:
        compute_all_features(prepare(config))
    except InputError as error:
        by_run = str(error)
    try:
        by_check = checked_data(config, photos, model).errors
    except InputError as error:
        by_check = [str(error)]
    if message is None:
        assert by_run is None and by_check == []
    else:
        assert message in by_run and by_run in by_check, by_check


def test_the_command_takes_a_runs_config(call, photos, tmp_path):  # noqa: F811
    change(client=None)(photos)
    code, _, err = call("data", "check", photos)
    assert code == 2 and "client: missing" in err
    (tmp_path / "c.yaml").write_text("data: {partition: equal}\nfederation: {clients: 4}\n")
    code, out, err = call("data", "check", photos, "--config", tmp_path / "c.yaml")
    assert code == 0 and "vqa_1" in out, err
    code, _, err = call("data", "check", photos, "--config", tmp_path / "c.yaml", "--set", "federation.clients=3")
    assert code == 2 and "must be a multiple" in err
    code, _, err = call("data", "check", photos, "--template", "vicuna")
    assert code == 2 and "'vicuna' is not known" in err


def test_what_a_run_takes_as_it_is_is_said(call, photos):  # noqa: F811
    change(split=None)(photos)
    several = [without(entries_of(photos)[0], "split") | {"conversations": [
        {"from": "human", "value": "<image>"}, {"from": "gpt", "value": answer}]} for answer in ("", "x")]
    add(*several)(photos)
    code, out, err = call("data", "check", photos, "--set", "eval.every=1")
    assert code == 0, err
    assert "2 samples have the id of another one (first: 'north-0' of" in out and "all.json[20])" in out
    assert "1 sample has an empty answer" in out and "first: " in out
    assert "no client has test samples, so the run ends without scores" in out and "data.hold_out.test" in out
    assert "no client has validation samples, so eval.every: 1 scores nothing" in out
    code, out, _ = call("data", "check", photos, "--set", "data.hold_out={test: 0.2}")
    assert code == 0 and "no client has test" not in out
    assert {line.split()[2] for line in out.splitlines() if line.startswith("vqa")} == {"train", "test"}
