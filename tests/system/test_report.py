"""Tests that a report is one HTML page that loads nothing from the network, and that it shows the run's numbers."""

from __future__ import annotations

import base64
import html.parser
import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT, small_config
from written_runs import inside_of, results_of, write_run

from pilot_jax import words
from pilot_jax.compare.cards import client_gains
from pilot_jax.compare.page import comparison_page, write_comparison_report
from pilot_jax.errors import InputError
from pilot_jax.evaluation.metrics import scored
from pilot_jax.evaluation.personalised import evaluation_matrix
from pilot_jax.report.alone import differing_keys, find_alone
from pilot_jax.report.drawing import axis_labels, ticks
from pilot_jax.report.mixing_card import MOST_WEIGHTS, shown_phases
from pilot_jax.report.page import runs_page, write_report
from pilot_jax.report.probes import look_inside
from pilot_jax.report.record import Mixing, read_run
from pilot_jax.report.run_cards import positions
from pilot_jax.runs import restore, simulate
from pilot_jax.runs.manifest import run_config


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
        self.tables, self.plots = 0, 0  # of figures
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if tag not in ("meta", "link", "img", "br", "input"):
            self.open.append(tag)
        self.ids += [named["id"]] if "id" in named else []
        self.addresses += [named[k] for k in ("src", "href", "xlink:href") if k in named]
        if tag == "img" or named.get("role") == "img":
            self.pictures.append(named.get("alt") or named.get("aria-label"))
        self.plots += named.get("class") == "plot"
        self.tables += tag == "details"

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def checked(text):
    """Returns the parsed page, after checks that hold for every page: it is whole, loads nothing, describes all."""
    page = Page(text)
    assert not page.open and len(page.ids) == len(set(page.ids))
    assert all(x.startswith(("#", "data:")) for x in page.addresses)
    assert not re.search(r"url\((?!#)|@import|<script[^>]+src|fetch\(|XMLHttpRequest|import\(", text)
    assert all(page.pictures) and page.tables >= page.plots + 1  # each figure has a table; the config is one more
    assert len(text.encode()) < 3_000_000 and "nan" not in re.findall(r"[a-z]+", page.text.lower())
    return page


@pytest.mark.parametrize("count", [3, 20, 100])
def test_pages_of_any_size(tmp_path, count):
    """Every client's scores and gains are on the page, and what differs between runs."""
    run = read_run(write_run(tmp_path / "a <b> & c", count))
    alone = read_run(write_run(tmp_path / "alone", count, "local", seed=1))
    text = runs_page([run], inside_of).html
    page = checked(text)
    assert "a <b> & c" in page.text and "<b> &" not in text
    own, other = run.summary["score_by_client"], alone.summary["score_by_client"]
    for client in run.task_of:
        assert client in page.text and words.change(own[client] - other[client], 3) in page.text
    up = sum(own[c] > other[c] for c in own)
    assert f"{up} of {count} clients gained over training alone" in page.text
    assert "partly right (0.40)" in page.text and "24 test prompts" in page.text
    mixing = run.mixing[-1]
    assert f"{float(np.mean(mixing.effective_neighbors)):.2f} effective neighbours" in page.text
    packed = json.loads(re.search(r'type="application/json">(.*?)</script>', text)[1])["phases"]
    for one, shown in zip(packed, shown_phases(run.mixing), strict=True):
        weights = np.frombuffer(base64.b64decode(one["weights"]), "<u2").reshape(count, count) / 65535
        np.testing.assert_allclose(weights, np.clip(shown.weights, 0, 1), atol=1 / 65535)
    both = checked(runs_page([run, alone]).html)
    assert "strategy.name" in both.text and "Training loss of all runs" in both.text and "#run-1" in both.addresses
    results = results_of(3, count)
    compared = checked(comparison_page(results).html)
    gained = client_gains(results, "pilot")
    assert len(gained) == count and all(words.change(v.mean(), 3) in compared.text for v in gained.values())


def test_a_run_that_has_not_ended_and_one_without_test_data(tmp_path):
    page = checked(runs_page([read_run(write_run(tmp_path / "killed", 3, ended=False))]).html)
    assert "has not ended yet: so far, 3 clients with 3 tasks trained for 3 rounds" in page.text
    run = read_run(write_run(tmp_path / "run", 3, rounds=1))
    for key in list(run.summary):
        if key.startswith("score_"):
            run.summary[key] = {} if key.endswith("_by_client") else dict.fromkeys(run.tasks) if key.endswith(
                "_by_task") else None
    page = checked(runs_page([run]).html)
    assert "no test samples" in page.text and "no test data" in page.text and "for 1 round with" in page.text
    assert "None" not in page.text.split("Configuration")[0]
    both = checked(runs_page([run, read_run(write_run(tmp_path / "other", 3))]).html)
    assert "no test data" in both.text


def test_training_alone_is_found_where_the_config_is_the_same(tmp_path):
    """Beside a run, or among those given; another config counts only if it was given, and is named."""
    run = read_run(write_run(tmp_path / "run", 3))
    assert find_alone(run, [run]) is None and "--set strategy.name=local" in runs_page([run]).html
    other = read_run(write_run(tmp_path / "other rounds", 3, "local", rounds=2))
    write_run(tmp_path / "damaged", 3, "local")
    (tmp_path / "damaged" / "summary.json").write_text("{")
    assert find_alone(run, [run]) is None
    found = find_alone(run, [run, other])
    assert found.name == "other rounds" and list(found.differs) == ["federation.rounds"]
    assert "another config: federation.rounds" in runs_page([run, other]).html
    same = read_run(write_run(tmp_path / "same", 3, "local", seed=4))
    found = find_alone(run, [run])
    assert found.name == "same" and dict(found.scores) == same.summary["score_by_client"] and not found.differs
    assert find_alone(same, [same, run]) is None
    assert differing_keys(run_config(run.folder), run_config(other.folder)) == ["federation.rounds"]


def test_only_as_many_matrices_as_fit():
    matrices = [Mixing(f"{i}", [f"c{k}" for k in range(100)], np.eye(100), None, np.ones(100)) for i in range(100)]
    shown = shown_phases(matrices)
    assert shown[0] is matrices[0] and shown[-1] is matrices[-1] and 2 < len(shown) <= MOST_WEIGHTS // 10_000
    assert shown_phases(matrices[:3]) == matrices[:3]


def test_numbers_on_axes_and_in_words():
    assert ticks(0, 1, 6) == [0, 0.2, 0.4, 0.6, 0.8, 1] and axis_labels(ticks(0, 1, 6))[1] == "0.2"
    assert ticks(-0.5, 0.31, 5) == [-0.4, -0.2, 0, 0.2] and axis_labels([0, 2000.0]) == ["0", "2,000"]
    for low, high in ((0, 1e-9), (3, 3), (-1e9, 1e9), (0.97, 1.01)):
        found = ticks(low, high, 5)
        assert 1 <= len(found) <= 5 and all(low - 1e-12 <= v <= high + 1e-12 for v in found)
    assert [words.counted(n, "round") for n in (0, 1, 2, 1200)] == ["0 rounds", "1 round", "2 rounds", "1,200 rounds"]
    assert [words.change(v) for v in (0.004, -0.004, 0.05, -0.05)] == ["0.00", "0.00", "+0.05", "−0.05"]
    assert words.listed(["a"]) == "a" and words.listed(["a", "b", "c"]) == "a, b and c"
    assert words.listed(list("abcdef")) == "a, b, c and 3 others"
    assert [words.duration(s) for s in (0.42, 12, 600, 9000)] == ["0.4 s", "12 s", "10.0 min", "2.5 h"]
    assert [words.size(b) for b in (12, 16_109_568, 1.88e9, 999_999)] == ["12 B", "16.1 MB", "1.88 GB", "1 MB"]


@pytest.mark.slow
def test_the_page_says_what_the_run_wrote(run, tmp_path):
    page_file, *pictures = write_report([run], tmp_path / "page.html", 1, 1)
    text = page_file.read_text()
    page, summary = checked(text), json.loads((run / "summary.json").read_text())
    assert {p.stem for p in pictures} == {"scores", "validation", "losses", "mixing", "map", "traffic", "times"}
    assert {"abilities", "routing"} <= set(page.ids)
    assert all(p.suffix == ".svg" and p.read_text().startswith("<svg xmlns") for p in pictures)
    assert "a <run> & more" in page.text and "<run>" not in text
    for client, score in summary["score_by_client"].items():
        assert client in page.text and f"{score:.3f}" in page.text
    assert "max_new_tokens: 4" in page.text  # the config


@pytest.mark.slow
def test_answers_are_marked_by_the_tasks_metric(run):
    """Each client has its first prompts, their answers are its own model's, and the marks those of the metric."""
    inside, done = look_inside(run, 2, 0), restore.restore(run)
    assert inside.prompts == dict.fromkeys(done.summary["clients"], 2) and inside.abilities is None
    assert {e.client for e in inside.examples} == set(done.summary["clients"]) and len(inside.examples) == 18
    for client, score in done.summary["score_by_client"].items():  # both prompts are shown, so the mean is the score
        own = [e for e in inside.examples if e.client == client]
        assert np.mean([e.score for e in own]) == pytest.approx(score)
    for e in inside.examples:
        metric = done.evaluation.metrics.get(e.task, "exact")
        assert e.score == scored(metric, [e.answer], [e.references]) and e.image.startswith("data:image/")
        assert e.outcome == ("right" if e.score == 1 else "wrong" if e.score == 0 else "partly")


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
    page = checked(text)
    assert code == 0
    for line in results["variants"]:
        assert line["name"] in page.text and f"{line['score']:.3f} ± {line['standard_error']:.3f}" in page.text
        assert "difference" not in line or f"{line['difference']['mean']:+.3f}" in page.text
    assert {p.stem for p in (tmp_path / "page").iterdir()} == {"scores", "gains", "differences", "traffic"}
    folder = tmp_path / "compared"
    folder.mkdir()
    shutil.copy(RESULTS, folder / "results.json")
    assert write_comparison_report(folder, tmp_path / "again.html")[0].read_text().count("<section") == 5
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
    page = checked(text)
    assert code == 0 and "figures in" in said and {"#run-1", "#run-2"} <= set(page.addresses)
    assert "This run has not ended yet" in page.text and (tmp_path / "both" / "2-losses.svg").is_file()


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
