"""Tests everything that the package does on the real base, which is downloaded (183 MB): plan, run, resume, compare,
report, generate, export to PEFT."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, DiesAt, Killed

import pilot_jax
from pilot_jax.evaluation.personalised import used_adapters
from pilot_jax.models.vlm import variables
from pilot_jax.real.emoji import picture, pool
from pilot_jax.runs.restore import restore

pytestmark = pytest.mark.long
SMALL = ["data.emoji.tasks=[kind,colour]", "data.emoji.styles=[noto,fluent]", "data.emoji.train=16",
         "data.emoji.validation=2", "data.emoji.test=4", "federation.rounds=1", "data.template=chatml_short",
         "train.lr_connector=0.01", "train.lr_lora_stage1=0.01", "train.lr_lora_stage2=0.01"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from pilot_jax.real.base import build

    folder = tmp_path_factory.mktemp("real") / "base"
    build("smollm2-dinov2", folder, 56, print)
    return folder


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "run"
    config = pilot_jax.load_config(ROOT / "configs" / "real.yaml", [*SMALL, f"model.path={base}"])
    return folder, pilot_jax.simulate(config, out=folder)


def settings(base, *more):
    return [word for value in (*SMALL, f"model.path={base}", *more) for word in ("--set", value)]


def test_plan(base, call):
    code, out, err = call("plan", ROOT / "configs" / "real.yaml", "--set", f"model.path={base}")
    assert code == 0 and "GB" in out, err


def test_a_run_goes_on_where_it_was_killed(base, finished, call, tmp_path):
    """A run that is killed after its first phase and resumed ends with the adapters of an undisturbed run."""
    config, run = ROOT / "configs" / "real.yaml", tmp_path / "run"
    with pytest.raises(Killed):
        pilot_jax.simulate(pilot_jax.load_config(config, [*SMALL, f"model.path={base}"]), out=run,
                           observers=[DiesAt(1, "phase")])
    code, _, err = call("run", config, "--out", run, "--resume", *settings(base))
    assert code == 0, err
    assert json.loads((run / "summary.json").read_text())["adapters_sha256"] == finished[1].summary["adapters_sha256"]


def test_report_and_answers(finished, call, tmp_path):
    folder, _ = finished
    code, _, err = call("report", folder, "--out", tmp_path / "page.html", "--answers", 1, "--questions", 2)
    assert code == 0 and (tmp_path / "page.html").stat().st_size > 50_000, err
    picture(pool("test")[0], "noto").image.save(tmp_path / "x.png")
    for more in ([], ["--image", tmp_path / "x.png"]):
        code, out, err = call("generate", folder, "--client", "kind_noto", "--prompt", "What is it?", *more)
        assert code == 0 and out.strip(), err


def test_an_exported_client_in_torch(base, finished, call, tmp_path):
    """The code of docs/exported-adapters.md loads it onto the converted model: logits to 1e-3 of the largest."""
    folder, _ = finished
    code, _, err = call("export", folder, "--client", "kind_noto", "--out", tmp_path / "out")
    assert code == 0, err
    scope = {"folder": str(tmp_path / "out"), "base": str(base), "pilot_jax": pilot_jax}
    page = (ROOT / "docs" / "exported-adapters.md").read_text(encoding="utf-8")
    exec(re.findall(r"```python\n(.*?)```", page, re.S)[2], scope)
    run = restore(folder)
    fed, index = run.federation, run.client("kind_noto")
    ids = np.asarray([run.tokenizer("<image>" * 16 + "\nWhat is it?")["input_ids"]])
    pixels = np.random.default_rng(1).normal(size=(1, 3, 56, 56)).astype(np.float32)
    with torch.no_grad():
        theirs = scope["model"].float()(input_ids=torch.tensor(ids), attention_mask=torch.ones_like(torch.tensor(ids)),
                                        pixel_values=torch.tensor(pixels)).logits.numpy()
    state = run.state("kind_noto")
    ours = np.asarray(fed.model.module.apply(
        variables(fed.model.base, used_adapters(fed, state)), ids, np.ones_like(ids), fed.model.features(pixels),
        state.stage, fed.task_index(index), method="logits"))
    assert np.abs(ours - theirs).max() <= 1e-3 * np.abs(theirs).max()
    assert np.abs(ours - np.asarray(fed.model.logits(ids, None, pixels))).max() > 0.1  # the adapters matter


def test_compare(base, call, tmp_path):
    code, out, err = call("compare", ROOT / "configs" / "real.yaml", "--strategies", "local,fedavg", "--seeds", 1,
                          "--out", tmp_path / "out", *settings(base))
    assert code == 0 and "fedavg" in out, err
