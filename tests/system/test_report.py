"""Tests that a report is one HTML page that loads nothing from the network, and that it shows the run's numbers."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, small_config

from pilot_jax.compare.page import write_comparison_report
from pilot_jax.errors import InputError
from pilot_jax.evaluation.personalised import evaluation_matrix
from pilot_jax.report.charts import positions
from pilot_jax.report.page import write_report
from pilot_jax.report.probes import look_inside
from pilot_jax.report.record import read_run
from pilot_jax.runs import restore, simulate


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "a <run> & more"
    simulate.simulate(small_config(eval={"every": 1}), out=folder)
    return folder


class Page(html.parser.HTMLParser):
    """Parses a page: tags that are not closed, ids, addresses of links and images, descriptions of images, and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.addresses, self.pictures, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        self.ids += [named["id"]] if "id" in named else []
        self.addresses += [named[k] for k in ("src", "href", "xlink:href") if k in named]
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


@pytest.mark.slow
def test_the_page_says_what_the_run_wrote(run, tmp_path):
    page_file, *pictures = write_report([run], tmp_path / "page.html", 1, 1)
    text = page_file.read_text()
    page, summary = Page(text), json.loads((run / "summary.json").read_text())
    assert not page.open and len(page.ids) == len(set(page.ids))
    # All addresses are anchors on the page itself or data URIs.
    assert page.addresses and all(x.startswith(("#", "data:")) for x in page.addresses)
    assert not re.search(r"url\((?!#)|@import|<script", text)
    assert all(page.pictures) and len(page.pictures) >= 7 + 3
    assert {p.stem for p in pictures} >= {"scores", "validation", "losses", "mixing-1", "mixing-2", "map", "traffic",
                                          "times", "abilities", "routing"}
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in pictures)
    assert "a <run> & more" in page.text and "<run>" not in text
    for client, score in summary["score_by_client"].items():
        assert client in page.text and f"{score:.3f}" in page.text
    mixing = read_run(run).mixing[-1]
    assert f"{float(np.mean(mixing.effective_neighbors)):.2f} effective neighbours" in page.text
    assert f"{mixing.weights[0, 0]:.2f}" in page.text and "Answers of the personalised models" in page.text
    assert "max_new_tokens: 4" in page.text  # the config


@pytest.mark.slow
def test_abilities_and_routing_are_the_models_own(run):
    """Router weights equal those computed in NumPy float64, and scores equal those of `evaluation_matrix`."""
    inside, done = look_inside(run, 1, 2), restore.restore(run)
    fed, evaluation = done.federation, done.evaluation
    assert set(inside.routing) == {c.name for c in fed.clients} and len(fed.tasks) == 3
    for client, state in zip(fed.clients, done.population, strict=True):
        features = np.asarray(client.evaluation["test"].features, np.float64)
        e = np.exp(features @ np.asarray(state.adapters["router"]["kernel"], np.float64))
        np.testing.assert_allclose(inside.routing[client.name], (e / e.sum(-1, keepdims=True)).mean((0, 1)), atol=1e-5)
    able = inside.abilities  # with two prompts, which are all that each client has
    assert able.columns == (*fed.tasks, "pretraining captions") and able.models == tuple(c.name for c in fed.clients)
    base, matrix = done.summary["score_base_by_task"], evaluation_matrix(evaluation, done.population)
    assert able.scores[-1, :3].tolist() == [base[t] for t in fed.tasks]
    columns = [[i for i, c in enumerate(fed.clients) if c.task == t] for t in fed.tasks]
    for row, scores in zip(able.scores, np.asarray(matrix["scores"]), strict=False):
        np.testing.assert_allclose(row[:3], [scores[of].mean() for of in columns])


RESULTS = ROOT / "docs" / "results" / "scenario_a.json"


@pytest.mark.slow
def test_the_page_of_a_comparison(tmp_path, call):
    code, _, _ = call("report", RESULTS, "--out", tmp_path / "page.html")
    text, results = (tmp_path / "page.html").read_text(), json.loads(RESULTS.read_text())
    page = Page(text)
    assert code == 0 and not page.open and len(page.ids) == len(set(page.ids)) and all(page.pictures)
    assert all(x.startswith(("#", "data:")) for x in page.addresses)
    assert not re.search(r"url\((?!#)|@import|<script", text)
    for line in results["variants"]:
        assert line["name"] in page.text and f"{line['score']:.3f} ± {line['standard_error']:.3f}" in page.text
        assert "difference" not in line or f"{line['difference']['mean']:+.3f}" in page.text
    assert {p.stem for p in (tmp_path / "page").iterdir()} == {"scores", "differences", "tasks", "traffic"}
    folder = tmp_path / "compared"
    folder.mkdir()
    shutil.copy(RESULTS, folder / "results.json")
    assert write_comparison_report(folder, tmp_path / "again.html")[0].read_text().count("<section") == 4
    code, _, error = call("report", folder, folder, "--out", tmp_path / "no.html")
    assert code == 2 and "page of its own" in error
    assert call("report", folder / "results.json")[0] == 0 and (folder / "results.html").is_file()
    (folder / "results.json").write_text('{"key": "a", "values": []}')
    with pytest.raises(InputError, match="not what `compare` writes"):
        write_comparison_report(folder, tmp_path / "no.html")
    assert not (tmp_path / "no.html").exists()


@pytest.mark.slow
def test_several_runs_and_unfinished_ones(run, tmp_path, call):
    other = tmp_path / "killed"
    shutil.copytree(run, other)
    (other / "summary.json").unlink()
    (other / "manifest.json").unlink()
    with (other / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2, "pha')
    code, said, _ = call("report", run, other, "--out", tmp_path / "both.html", "--answers", 0)
    text = (tmp_path / "both.html").read_text()
    page = Page(text)
    assert code == 0 and "figures in" in said and len(page.ids) == len(set(page.ids))
    assert "This run has not ended yet" in page.text and {"#run-0", "#run-1"} <= set(page.addresses)
    assert (tmp_path / "both" / "2-losses.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("breakage", "message"), [
    (lambda d: (d / "metrics.jsonl").unlink(), "not a run directory"),
    (lambda d: (d / "metrics.jsonl").write_text("[1]\n"), "metrics.jsonl: damaged"),
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


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [500, 1400])  # chromium's window cannot be narrower than 500 pixels
def test_a_browser_has_no_complaint(run, tmp_path, width):
    page = write_report([run], tmp_path / "page.html", 0)[0]
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
         f"--window-size={width},1000", f"--screenshot={tmp_path / 'shot.png'}", page.as_uri()],
        capture_output=True, text=True, timeout=120)
    assert Path(tmp_path / "shot.png").stat().st_size > 20_000
    assert ":CONSOLE" not in done.stderr, done.stderr
