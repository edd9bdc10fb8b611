"""Tests runs whose samples are given in Python: they are resumed and restored with the same samples, and no others."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT, DiesAt, Killed, llava_entry, same_run, small_config, write
from PIL import Image

import pilot_jax
from pilot_jax.data.llava.reading import read_samples
from pilot_jax.errors import InputError
from pilot_jax.report.page import write_report


def entry(number, colour):
    return {"image": Image.new("RGB", (20, 20), (colour, 40 * number, 0)), "task": "shade",
            "split": "train" if number else "test",
            "conversations": [{"from": "human", "value": "<image>\nwhat is shown?"},
                              {"from": "gpt", "value": str(number)}]}


def entries(colour=200):
    return [entry(i, colour) for i in range(5) for _ in range(2)]


def by_turn(samples):
    return [f"client {i % 2}" for i in range(len(samples))]


def given(**options):
    return pilot_jax.Data(entries(**options), partition=by_turn)


CONFIG = small_config(federation={"rounds": 2, "local_steps": 1}, eval={"max_new_tokens": 2})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given") / "run"
    return pilot_jax.simulate(CONFIG, out=folder, data=given()), folder


@pytest.mark.long
def test_it_is_restored_with_the_same_samples_alone(run, call, tmp_path):
    done, folder = run
    assert done.summary["clients"] == ["client 0", "client 1"] and done.summary["client_steps"] == 2 * 3
    back = pilot_jax.restore(folder, data=given())
    assert back.config == done.config and back.summary == done.summary
    with pytest.raises(InputError, match=r"given in Python\. Pass the same again"):
        pilot_jax.restore(folder)
    for other in (given(colour=100), pilot_jax.Data(entries(), partition=lambda samples: ["one"] * len(samples))):
        with pytest.raises(InputError, match="data: these are not the samples of the run"):
            pilot_jax.restore(folder, data=other)
    code, _, err = call("evaluate", folder)
    assert code == 2 and "given in Python" in err
    page, *_ = write_report([folder], tmp_path / "page.html", 1)
    assert "The samples were given in Python" in page.read_text()


@pytest.mark.slow
def test_it_is_resumed_with_the_same_samples_alone(run, tmp_path):
    _, whole = run
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        pilot_jax.simulate(CONFIG, out=folder, data=given(), observers=[DiesAt(2)])
    before = sorted(path.name for path in folder.rglob("*"))
    for options in ({}, {"data": given(colour=100)}):
        with pytest.raises(InputError, match="the run began with other samples than it is given now"):
            pilot_jax.simulate(CONFIG, out=folder, resume=True, **options)
    with pytest.raises(InputError, match=r"given in Python\. Pass the same again"):
        pilot_jax.simulate(pilot_jax.load_config(folder / "config.yaml"), out=folder, resume=True)
    assert sorted(path.name for path in folder.rglob("*")) == before
    pilot_jax.simulate(CONFIG, out=folder, resume=True, data=given())
    same_run(whole, folder)
    again = pilot_jax.simulate(CONFIG, out=folder, resume=True, data=given())  # has ended: it is restored
    assert again.summary["clients"] == ["client 0", "client 1"]
    with pytest.raises(InputError, match="data: these are not the samples of the run"):
        pilot_jax.restore(folder, data=entries())  # without their partition


PAGE = (ROOT / "docs" / "own-checkpoint-and-data.md").read_text(encoding="utf-8")


def test_the_entries_of_the_documentation_are_read(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0001.png")
    blocks = re.findall(r"```json\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 2
    for block in blocks:
        samples = read_samples(write(tmp_path, "vqa.json", block))
        assert all(s.image == tmp_path / "0001.png" and s.turns[-1] == ("gpt", "no") for s in samples)
    assert [s.turns[:-1] for s in samples] == [
        (("system", "Answer with one word."), ("human", "<image>\nIs there a fracture?")),
        (("human", "<image>\nIs there a fracture?"),)]


@pytest.mark.slow
def test_the_python_of_the_documentation_runs(tmp_path, monkeypatch):
    """Its blocks run one after another, with fewer steps: photographs by folder, and clients by a function."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 2 and sum(map(bool, blocks[1].splitlines())) <= 10
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for number in range(12):
        file = tmp_path / "photos" / ("north", "south")[number % 2] / f"{('red', 'blue')[number % 3 % 2]}_{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (number * 20, 0, 255)).save(file)
    (tmp_path / "my_data").mkdir()
    write(tmp_path / "my_data", "t.json", [llava_entry(client=None, task="t", conversations=[
        {"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": "ab"[i % 2]}]) for i in range(10)])
    code = "".join(blocks).replace("{test: 0.2}\"", "{test: 0.2}\", *SMALL")
    scope = {"SMALL": ["federation.rounds=1", "federation.local_steps=1", "train.batch_size=2", "eval.max_new_tokens=2",
                       "system.unroll=1", "strategy.name=fedavg", "federation.schedule=single"]}
    assert "SMALL" in code
    exec(code, scope)
    assert scope["run"].summary["clients"] == ["t_a", "t_b"] and scope["run"].summary["score_by_client"].keys() == {
        "t_a", "t_b"}
    assert (tmp_path / "runs" / "photos" / "summary.json").is_file()
