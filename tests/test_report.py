"""The report: one page that asks for nothing from anywhere, with what the run wrote in it."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import small_config

from pilot_jax.errors import InputError
from pilot_jax.federation import simulation
from pilot_jax.report.charts import positions
from pilot_jax.report.page import write_report
from pilot_jax.report.record import read_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "a <run> & more"
    simulation.simulate(small_config(eval={"every": 1}), out=folder)
    return folder


class Page(html.parser.HTMLParser):
    """Tags that are open, ids, what is asked for, and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.asked, self.pictures, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        self.ids += [named["id"]] if "id" in named else []
        self.asked += [named[k] for k in ("src", "href", "xlink:href") if k in named]
        if tag == "img" or (tag == "svg" and named.get("role")):
            self.pictures.append(named.get("alt") or named.get("aria-label"))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_says_what_the_run_wrote(run, tmp_path):
    page_file, *pictures = write_report([run], tmp_path / "page.html", 1)
    text = page_file.read_text()
    page, summary = Page(text), json.loads((run / "summary.json").read_text())
    assert not page.open and len(page.ids) == len(set(page.ids))
    # Nothing from elsewhere: anchors of the page itself, and data.
    assert page.asked and all(x.startswith(("#", "data:")) for x in page.asked)
    assert not re.search(r"url\((?!#)|@import|<script", text)
    assert all(page.pictures) and len(page.pictures) >= 7 + 3
    assert {p.stem for p in pictures} >= {"scores", "validation", "losses", "mixing-1", "mixing-2", "map", "traffic",
                                          "times"}
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in pictures)
    assert "a <run> & more" in page.text and "<run>" not in text
    for client, score in summary["score_by_client"].items():
        assert client in page.text and f"{score:.3f}" in page.text
    mixing = read_run(run).mixing[-1]
    assert f"{float(np.mean(mixing.effective_neighbors)):.2f} effective neighbours" in page.text
    assert f"{mixing.weights[0, 0]:.2f}" in page.text and "What the models say" in page.text
    assert "max_new_tokens: 4" in page.text  # the config


def test_several_runs_and_unfinished_ones(run, tmp_path, call):
    other = tmp_path / "killed"
    shutil.copytree(run, other)
    (other / "summary.json").unlink()
    with (other / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2, "pha')
    code, said, _ = call("report", run, other, "--out", tmp_path / "both.html", "--answers", 0)
    text = (tmp_path / "both.html").read_text()
    page = Page(text)
    assert code == 0 and "figures in" in said and len(page.ids) == len(set(page.ids))
    assert "This run has not ended yet" in page.text and {"#run-0", "#run-1"} <= set(page.asked)
    assert (tmp_path / "both" / "2-losses.png").is_file()


@pytest.mark.parametrize(("breakage", "message"), [
    (lambda d: (d / "metrics.jsonl").unlink(), "not a run directory"),
    (lambda d: (d / "metrics.jsonl").write_text("[1]\n"), "not a line that `run` writes"),
    (lambda d: (d / "mixing" / "round_0001_stage1.npz").write_bytes(b"PK"), "damaged")])
def test_what_is_no_run_is_refused(run, tmp_path, breakage, message):
    shutil.copytree(run, tmp_path / "run")
    breakage(tmp_path / "run")
    with pytest.raises(InputError, match=message):
        write_report([tmp_path / "run"], tmp_path / "page.html", 0)
    assert not (tmp_path / "page.html").exists()


def test_the_map_keeps_distances_of_points_in_a_plane():
    points = np.random.default_rng(0).normal(size=(6, 2))
    between = np.linalg.norm(points[:, None] - points[None], axis=-1)
    found = positions(between)
    np.testing.assert_allclose(np.linalg.norm(found[:, None] - found[None], axis=-1), between, atol=1e-9)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [500, 1400])  # its window is never narrower than 500
def test_a_browser_has_no_complaint(run, tmp_path, width):
    page = write_report([run], tmp_path / "page.html", 0)[0]
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
         f"--window-size={width},1000", f"--screenshot={tmp_path / 'shot.png'}", page.as_uri()],
        capture_output=True, text=True, timeout=120)
    assert Path(tmp_path / "shot.png").stat().st_size > 20_000
    assert ":CONSOLE" not in done.stderr, done.stderr
