"""Tests that a run that was killed, interrupted or damaged can be resumed and then ends bit for bit as an
undisturbed run does."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import killed
import pytest
from conftest import ROOT, DiesAt, Events, Killed, same_run, small_config, tree_max_difference

from pilot_jax.config import parse_config
from pilot_jax.errors import InputError
from pilot_jax.runs import resume, simulate

# Only 5 clients take part in a round, so snapshots refer to files of earlier snapshots.
SECTIONS = {"federation": {"rounds": 3, "clients_per_round": 5, "local_steps": 2}, "eval": {"every": 2}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return folder, simulate.simulate(small_config(**SECTIONS), out=folder)


@pytest.mark.long
def test_what_may_change_is_said(tmp_path):
    """A run resumed with another chunk size says that results agree to rounding, and they do."""
    config, folder, seen = small_config(train={"adam_epsilon": 1e-3}), tmp_path / "run", Events()
    with pytest.raises(Killed):
        simulate.simulate(config, out=folder, observers=[DiesAt(1, "phase")])
    other = small_config(train={"adam_epsilon": 1e-3}, system={"client_chunk": 1})
    run = simulate.simulate(other, out=folder, resume=True, observers=[seen])
    assert any("system.client_chunk: 3 → 1: results agree to rounding" in e.get("text", "") for e in seen.events)
    plain = simulate.simulate(config)
    for a, b in zip(run.population, plain.population, strict=True):
        assert tree_max_difference(a.adapters, b.adapters) <= 1e-5
    again = simulate.simulate(other, out=folder, resume=True)  # the run has ended, so nothing is trained
    assert again.summary == json.loads((folder / "summary.json").read_text()) == run.summary


@pytest.mark.long
def test_data_that_have_gone(tmp_path, call):
    """A run whose data are missing stops with an error and changes nothing. It goes on once the data are back."""
    assert call("data", "digits", tmp_path / "scenes", "--train", 8, "--validation", 2, "--test", 2)[0] == 0
    config, folder = small_config(data={"path": str(tmp_path / "scenes")}), tmp_path / "run"
    with pytest.raises(Killed):
        simulate.simulate(config, out=folder, observers=[DiesAt(2, "phase")])
    (tmp_path / "scenes").rename(tmp_path / "elsewhere")
    before = sorted(p for p in folder.rglob("*"))
    code, _, err = call("run", folder / "config.yaml", "--out", folder, "--resume")
    assert code == 2 and "data.path" in err and "neither a data file" in err and "Traceback" not in err
    assert sorted(p for p in folder.rglob("*")) == before
    (tmp_path / "elsewhere").rename(tmp_path / "scenes")
    assert call("run", folder / "config.yaml", "--out", folder, "--resume")[0] == 0


def test_determinism_is_asked_for_in_time(monkeypatch):
    from pilot_jax.parallel import devices

    asked = small_config(system={"deterministic": True}).system
    assert jax.devices() and devices.has_started()  # so that JAX does not read the flags that follow
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    monkeypatch.setattr(devices, "has_started", lambda: False)
    devices.ask_for_determinism(small_config().system)
    assert os.environ["XLA_FLAGS"] == "--xla_a=1"
    devices.ask_for_determinism(asked)
    assert os.environ["XLA_FLAGS"] == "--xla_a=1 --xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(devices, "has_started", lambda: True)
    devices.ask_for_determinism(asked)  # a CPU needs no flags
    monkeypatch.setattr(devices.jax, "default_backend", lambda: "gpu")
    with pytest.raises(InputError, match=r"system\.deterministic: JAX has started"):
        devices.ask_for_determinism(asked)


def start(config: Path, folder: Path, kind: str, seed: int, model: str) -> subprocess.CompletedProcess:
    # A folder of compiled programs of its own: a killed process may leave an entry in it that is not whole.
    env = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
                        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "programs")}
    return subprocess.run([sys.executable, killed.__file__, config, folder, kind, str(seed), model], env=env, text=True,
                          capture_output=True, timeout=600)


def kill_and_resume(tmp_path, kinds: list[str], config_of_run, model: str) -> None:
    """Starts a run again and again, killed by SIGKILL at the points `kinds` in turn, until all have been used."""
    config = tmp_path / "config.yaml"
    config.write_text(config_of_run.to_yaml())
    plain = start(config, tmp_path / "plain", "never", 0, model)
    assert plain.returncode == 0, plain.stderr[-2000:]
    kills, runs, starts = 0, 0, 0
    while kills < len(kinds):
        folder = tmp_path / f"run-{runs}"
        runs += 1
        while True:
            starts += 1  # also the seed, so that a random moment differs from start to start
            done = start(config, folder, kinds[kills] if kills < len(kinds) else "never", starts, model)
            if done.returncode == 0:
                break
            assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
            kills += 1
        assert done.stdout == plain.stdout
        if (folder / "checkpoints" / "resume").exists():  # killed after the summary
            shutil.rmtree(folder / "checkpoints" / "resume")
        same_run(tmp_path / "plain", folder)


# Of each, six clients on the toy: what is kept where, and how a phase ends, differs between them.
KINDS_OF_RUN = {
    "fedprox": {"strategy": {"name": "fedprox"}}, "feddpa": {"strategy": {"name": "feddpa"}},
    "fedadam": {"strategy": {"name": "fedadam"}}, "scaffold": {"strategy": {"name": "scaffold"}},
    "similarity": {"strategy": {"name": "similarity"}}, "centralised": {"strategy": {"name": "centralised"}},
    "fedalt": {"strategy": {"name": "fedalt"}}, "fedlease": {"strategy": {"name": "fedlease"}},
    "store": {"system": {"store": "."}},
    "privacy": {"federation": {"privacy": {"clip": 0.1, "noise_multiplier": 1.0, "seed": 3}}},
    "participation": {"federation": {"clients_per_round": 2, "dropout": 0.2}}}


def toy_config(kind: str, folder: Path):
    sections = {"federation": {"rounds": 4, "clients_per_round": 4, "local_steps": 2}, "eval": {"every": 2},
                "train": {"batch_size": 4}, "strategy": {"name": "feddpa"}}
    for name, section in KINDS_OF_RUN[kind].items():
        sections[name] = sections.get(name, {}) | section
    if kind == "store":
        sections["system"] = {"store": str(folder / "store")}
    return parse_config(sections)


@pytest.mark.slow
def test_three_kills(tmp_path):
    kill_and_resume(tmp_path, ["arrays", "mixing", "time"], toy_config("feddpa", tmp_path), "toy")


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS_OF_RUN)
def test_kills_of_every_kind_of_run(tmp_path, kind):
    """Five kills each, at random ones of the points where a kill is most dangerous, and at random moments."""
    rng = random.Random(kind)
    points = rng.sample(["time", *killed.POINTS], 5)
    kill_and_resume(tmp_path, points, toy_config(kind, tmp_path), "toy")
    assert len(list(tmp_path.glob("store/*"))) <= 2  # the last process's folder and lock, which its end by _exit leaves


@pytest.mark.long
def test_many_kills(tmp_path):
    """24 kills: about half at random moments, the others at the points where a kill is most dangerous."""
    rng = random.Random(0)
    kill_and_resume(tmp_path, ["time" if rng.random() < 0.5 else rng.choice(list(killed.POINTS)) for _ in range(24)],
                    small_config(**SECTIONS), "real")


@pytest.mark.long
def test_the_command_says_how_to_go_on(tmp_path):
    """After SIGTERM the command exits with code 143 and prints the command that resumes the run."""
    config, folder = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(small_config(federation={"rounds": 60}, system={"deterministic": True}).to_yaml())
    command = [sys.executable, "-m", "pilot_jax", "run", str(config), "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               cwd=ROOT)

    def stop():
        for _ in range(2400):
            if (folder / "metrics.jsonl").is_file() and (folder / "metrics.jsonl").stat().st_size:
                return process.send_signal(signal.SIGTERM)
            time.sleep(0.1)

    threading.Thread(target=stop).start()
    out, err = process.communicate(timeout=400)
    assert process.returncode == 143, err
    assert "Traceback" not in err and f"pilot-jax run {folder / 'config.yaml'} --out {folder} --resume" in err
    assert "stopping after the clients" in out
    assert list((folder / "checkpoints" / "resume").iterdir())


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax leaves its event loop open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_leaves_what_was_saved(undisturbed, tmp_path, call):
    """From the second snapshot on, no file may exceed 50 kB: the run ends with a message and exit code 1. Without
    that limit it goes on from the first snapshot."""
    import resource

    config, folder = tmp_path / "config.yaml", tmp_path / "a run"
    config.write_text(small_config(**SECTIONS).to_yaml())
    before, real = resource.getrlimit(resource.RLIMIT_FSIZE), resume.Snapshots.save

    def save(self, *args):
        if self._last == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        return real(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume.Snapshots, "save", save)
        try:
            code, _, err = call("run", config, "--out", folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1 and "cannot be written" in err and "Traceback" not in err
    assert f"To go on: pilot-jax run '{folder / 'config.yaml'}' --out '{folder}' --resume" in err
    assert (folder / "checkpoints" / "resume" / "000001" / "manifest.json").is_file()
    code, out, err = call("run", folder / "config.yaml", "--out", folder, "--resume")
    assert code == 0, err
    assert "going on in round 1" in out
    # Both runs were made in this process, so they used the same devices.
    same_run(undisturbed[0], folder)
    code, out, _ = call("run", folder / "config.yaml", "--out", folder, "--resume")
    assert code == 0 and "Score on held-out data" in out  # the run has ended: its results are printed again
    code, _, err = call("run", config, "--out", "/proc/nothing/here")
    assert code == 2 and "cannot be written" in err
    code, _, err = call("run", config, "--resume")
    assert code == 2 and "Give its folder as --out" in err
