"""Tests that every input of bad_inputs.py ends in one message within 10 s, and changes nothing."""

from __future__ import annotations

import hashlib
import shutil
import time

import pytest
from bad_inputs import CASES, RESULTS, file, results
from conftest import QUICK, llava_entry
from transformers import AutoTokenizer

ALL = [pytest.param(one, id=f"{one.kind}: {one.name}"[:120], marks=[] if number % 60 == 0 else
                    pytest.mark.slow if number % 10 == 0 else pytest.mark.long) for number, one in enumerate(CASES)]


def contents(folder):
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in folder.rglob("*")}


def test_the_list_is_long():
    kinds = [one.kind for one in CASES]
    assert len(kinds) >= 300 and len(set(kinds)) >= 14 and min(map(kinds.count, kinds)) >= 10


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("one", ALL)
def test_it_is_refused(call, tmp_path, monkeypatch, one):
    monkeypatch.chdir(tmp_path)
    arguments = one.make(tmp_path)
    before, began = contents(tmp_path), time.monotonic()
    code, out, err = call(*arguments)
    seconds = time.monotonic() - began
    assert code == 2, (code, out[-500:], err[-1500:])
    assert one.says in " ".join(err.split()), err[-1500:]
    assert "Traceback" not in err and len(err) < 3000
    assert contents(tmp_path) == before
    assert seconds < 30, "a hang; 10 s on a machine that does nothing else"


@pytest.mark.slow
def test_token_ids_beyond_the_vocabulary(call, tmp_path):
    """A tokenizer with a token that the model has no embedding for is refused where that token occurs."""
    from pilot_jax.models.pretrained import EMBEDDED, model_directory

    shutil.copytree(model_directory(EMBEDDED), tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(tmp_path / "base")
    turns = [{"from": "human", "value": "a zebra"}, {"from": "gpt", "value": "a"}]
    entries = [llava_entry(id=str(n), conversations=turns) for n in range(9)]
    data = file(tmp_path, "d.json", entries)
    code, _, err = call("run", QUICK, "--set", f"model.path={tmp_path / 'base'}", "--set", f"data.path={data}",
                        "--set", "data.template=vicuna_short", "--out", tmp_path / "out")
    assert code == 2 and "gives 'zebra' the id" in " ".join(err.split()), err
    assert not (tmp_path / "out").exists()


def test_names_in_a_comparison_are_shown_as_they_are(call, tmp_path):
    """What is mathematics elsewhere, or markup to HTML, is neither in the page of a comparison."""
    names = ["$_$", "$\\frac{", "<script>alert(1)</script>", "a&b", "^_^"]
    variants = [RESULTS["variants"][0] | {"name": name, "by_task": {"$x_": 0.5}} for name in names]
    config = {"federation": {"rounds": 1}, "<b>": "<img src=x>"}
    code, _, err = call(*results(tmp_path, RESULTS | {"variants": variants, "config": config, "split": "<i>"}))
    assert code == 0, err
    page = (tmp_path / "page.html").read_text()
    for text in ("<script>alert", "<img src=x", "<i>", "<b>alert"):
        assert text not in page
    assert "&lt;script&gt;" in page and "$_$" in page
