"""Tests of `pilot-jax runs`, of help and version, of completion, and that wrong options are named before loading."""

from __future__ import annotations

import json
import os
import types

import filelock
import pytest

import pilot_jax
from pilot_jax.cli.options import complete_client, complete_strategy
from pilot_jax.runs.folder import LOCK


@pytest.fixture
def folder(tmp_path):
    """Four folders of runs, written by hand: finished, interrupted, running, damaged; and one that is no run."""
    def write(name, age, **files):
        (tmp_path / name).mkdir(parents=True)
        for file, text in files.items():
            path = tmp_path / name / file.replace("_", ".")
            path.write_text(text)
            os.utime(path, (os.path.getmtime(path) - age,) * 2)

    config = "strategy: {name: fedavg}\n"
    summary = json.dumps({"score_mean": 0.5, "clients": ["vqa_0", "vqa_1"]})
    write("done", 7200, config_yaml=config, manifest_json="{}", summary_json=summary)
    write("deeper/stopped", 60, config_yaml=config, manifest_json="{}")
    write("running", 5, config_yaml=config, manifest_json="{}")
    write("torn", 90_000, config_yaml="strategy: [", manifest_json="{}")
    write("else", 1, notes_txt="x")
    lock = filelock.FileLock(tmp_path / "running" / LOCK)
    with lock:
        yield tmp_path


def test_runs_are_listed_newest_first(folder, call):
    code, out, _ = call("runs", folder, "--json")
    found = json.loads(out)
    assert code == 0 and [(os.path.basename(r["folder"]), r["strategy"], r["score"], r["state"]) for r in found] == [
        ("running", "fedavg", None, "running"), ("stopped", "fedavg", None, "interrupted"),
        ("done", "fedavg", 0.5, "finished"), ("torn", "?", None, "damaged")]
    code, out, _ = call("runs", folder)
    assert code == 0 and all(word in out for word in ("finished", "0.500", "2 h", "1 d", "1 min"))
    code, out, _ = call("runs", folder / "else")
    assert code == 0 and "No runs in" in out
    code, _, err = call("runs", folder / "gone")
    assert code == 2 and "no such folder" in err


def test_names_that_are_markup_are_listed_as_they_are(tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "[a]" / "[bold]"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("strategy: {name: '[/x]'}\n")
    (run / "manifest.json").write_text("{}")
    code, out, err = call("runs", "[a]")
    assert code == 0 and "[a]/[bold]" in out and "[/x]" in out, err


def test_help_and_version(call):
    for arguments in ((), ("data",)):
        code, out, _ = call(*arguments)
        assert code == 0 and "Commands" in out
    assert call("--version")[1] == f"pilot-jax {pilot_jax.__version__}\n"


def test_a_wrong_client_or_folder_is_named_before_anything_is_loaded(folder, call):
    for command in (("generate", folder / "done", "--prompt", "x"), ("export", folder / "done", "--out", folder / "o")):
        code, _, err = call(*command, "--client", "vqa_9")
        assert code == 2 and err == "Error: --client: 'vqa_9' is not in this run. Did you mean 'vqa_1'?\n"
    code, _, err = call("export", folder / "done", "--client", "vqa_0", "--merged", folder / "else")
    assert code == 2 and "--merged" in err and "exists already" in err


def test_completion(folder):
    context = types.SimpleNamespace(params={"run_dir": str(folder / "done")})
    assert complete_client(context, "vqa_1") == ["vqa_1"] and complete_client(context, "") == ["vqa_0", "vqa_1"]
    assert complete_client(types.SimpleNamespace(params={}), "") == []
    assert complete_strategy("fedad") == ["fedadagrad", "fedadam"]
    assert "local,fedavg" in complete_strategy("local,fedav")


def test_simulate_takes_the_path_of_a_config(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {batch_size: 0}\n")
    with pytest.raises(pilot_jax.InputError, match=r"c\.yaml: train\.batch_size: .*greater than or equal to 1"):
        pilot_jax.simulate(tmp_path / "c.yaml")
