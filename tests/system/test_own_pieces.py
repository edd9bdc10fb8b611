"""Tests that the examples of docs/own-pieces.md run, and that an own metric survives resuming and evaluation."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
import yaml
from conftest import ROOT, DiesAt, Killed, small_config
from PIL import Image

import pilot_jax
from pilot_jax.config import apply_overrides, import_own, parse_config
from pilot_jax.data.images import FITS, check_image_fit, image_fit, pixel_values
from pilot_jax.errors import InputError
from pilot_jax.evaluation.metrics import METRICS, check_metrics, metric, scored
from pilot_jax.evaluation.personalised import evaluate
from pilot_jax.models.projectors import PROJECTORS
from pilot_jax.runs import prepare

PAGE = ROOT / "docs" / "own-pieces.md"


@pytest.fixture
def registered():
    """Forgets what a test registers."""
    before = dict(METRICS)
    yield
    METRICS.clear()
    METRICS.update(before)
    FITS.clear()
    PROJECTORS.clear()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


def lines(block):
    return [line for line in block.splitlines() if line.strip()]


@pytest.mark.slow
def test_the_examples_run(monkeypatch, tmp_path, capsys, registered):
    monkeypatch.chdir(tmp_path)

    def smaller(path, overrides=()):
        rounds = [change for change in overrides if change.startswith("federation.rounds")]
        small = small_config(**{"federation": {"rounds": 3}} if rounds else {})
        return apply_overrides(small, [change for change in overrides if change not in rounds])

    monkeypatch.setattr(pilot_jax, "load_config", smaller, raising=False)
    scope: dict = {"__name__": "page"}
    examples = blocks("python")
    assert len(examples) == 5 and all(len(lines(block)) <= 14 for block in examples)
    for block in examples:
        exec(block, scope)
        if "overlap" in block:
            scores = scope["run"].summary["score_by_task"]
            restored = pilot_jax.restore(tmp_path / "runs" / "overlap")
            assert evaluate(restored.evaluation, restored.population) == scope["run"].summary["score_by_client"]
            assert any(0 < scores[task] < 1 for task in ("vqa", "caption"))
    assert capsys.readouterr().out.strip().endswith("rounds")
    assert scope["run"].summary["rounds"] < 3 and scope["run"].summary["bytes_up"] >= 2e6  # by `Budget`


def test_the_example_of_a_config_is_one():
    (text,) = blocks("yaml")
    config = parse_config(yaml.safe_load(text))
    assert config.train.of_client("phone").batch_size == 8 and config.train.microbatch == 4


@pytest.mark.long
def test_a_metric_of_a_module_on_the_command_line(call, tmp_path, monkeypatch, registered):
    """Without --use, each command says what to do; with it, a run, its resumption and its evaluation agree."""
    (tmp_path / "mine_of_test.py").write_text("import pilot_jax\n\n\n" + re.search(
        r"@pilot_jax.metric\(.*?\n\n", blocks("python")[1], re.S)[0])
    (tmp_path / "c.yaml").write_text(small_config(eval={"metrics": {"vqa": "overlap"}}).to_yaml())
    monkeypatch.chdir(tmp_path)
    code, _, err = call("run", "c.yaml", "--out", "run")
    assert code == 2 and "eval.metrics: 'overlap' is not a metric" in err and "--use MODULE" in err
    assert not (tmp_path / "run").exists()
    code, out, err = call("run", "c.yaml", "--out", "run", "--use", "mine_of_test", "--progress", "json")
    assert code == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    METRICS.pop("overlap")
    sys.modules.pop("mine_of_test")
    code, _, err = call("evaluate", "run", "--json")
    assert code == 2 and "--use MODULE" in err
    code, out, err = call("evaluate", "run", "--json", "--use", "mine_of_test")
    assert code == 0, err
    assert json.loads(out)["score_by_client"] == pytest.approx(summary["score_by_client"])
    assert call("report", "run", "--questions", 2, "--answers", 1)[0] == 0  # as the metric is known by now
    METRICS.pop("overlap")
    sys.modules.pop("mine_of_test")
    code, _, err = call("report", "run", "--questions", 2, "--answers", 1)
    assert code == 2 and "--use MODULE" in err
    with pytest.raises(Killed):  # a run that is killed after its first phase goes on with the metric
        import_own("mine_of_test", "the test")
        pilot_jax.simulate("c.yaml", out="part", observers=[DiesAt(1, "phase")])
    code, _, err = call("run", "c.yaml", "--out", "part", "--resume", "--use", "mine_of_test")
    assert code == 0, err
    again = json.loads((tmp_path / "part" / "summary.json").read_text())
    assert again["score_by_client"] == summary["score_by_client"]


def test_modules_of_use_are_checked(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call("plan", "c.yaml", "--use", "no_such_module_here")
    assert code == 2 and "--use no_such_module_here: cannot be imported" in err
    code, _, err = call("plan", "c.yaml", "--use", "../mine")
    assert code == 2 and "--use: '../mine' is not the name of a module" in err


def test_metrics_of_ones_own(registered):
    @metric("longest", corpus=True)
    def longest(answers, references):
        return max(map(len, answers)) / max(len(ref) for refs in references for ref in refs)

    assert scored("longest", ["ab", "abcd"], [["x"], ["abcde", "y"]]) == pytest.approx(0.8)
    metric("same")(lambda answer, reference: answer == reference)
    assert scored("same", ["a", "b", "c"], [["a", "z"], ["z", "b"], ["z"]]) == pytest.approx(2 / 3)
    metric("broken")(lambda answer, reference: float("nan"))
    with pytest.raises(InputError, match=r"eval\.metrics: broken returned nan for 1 answer\."):
        scored("broken", ["a"], [["a"]])
    with pytest.raises(ValueError, match="the package has a metric 'exact'"):
        metric("exact")
    with pytest.raises(InputError, match=r"'exat' is not a metric\. Did you mean 'exact'"):
        check_metrics(["exat"])


def test_images_pass_the_function_before_the_processor(federation, registered):
    model = federation[0].model
    scope = {"pilot_jax": pilot_jax}
    exec(next(block for block in blocks("python") if "image_fit" in block), scope)
    assert scope["config"].data.image_fit == "middle"
    pixels = np.random.default_rng(0).integers(256, size=(30, 50, 3)).astype(np.uint8)
    wide = Image.fromarray(pixels)
    np.testing.assert_array_equal(pixel_values(model, [wide], "middle"),
                                  pixel_values(model, [Image.fromarray(pixels[:, 10:40])]))
    image_fit("nothing")(lambda image: None)
    with pytest.raises(InputError, match=r"data\.image_fit: nothing returned NoneType for an image of 50×30"):
        pixel_values(model, [wide], "nothing")
    with pytest.raises(InputError, match=r"data\.image_fit: 'midle' is not known\. Use one of processor, pad, middle"):
        check_image_fit("midle")
    with pytest.raises(ValueError, match="the package has an image_fit 'pad'"):
        image_fit("pad")


def test_features_of_an_own_function_are_not_kept(registered):
    """Nothing says whether a function of the same name still does the same."""
    image_fit("mine")(lambda image: image)
    for fit, kept in (("processor", True), ("mine", False)):
        config = small_config(data={"image_fit": fit, "digits": {"train": 2}})
        features = prepare.prepare(config).evaluation.clients[0].features.source
        assert bool(features._key()) == kept
