"""Tests that a run that was killed, interrupted or damaged can be resumed and then ends bit for bit as an
undisturbed run does."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import killed
import numpy as np
import pytest
from conftest import ROOT, Events, small_config, tree_max_difference

from pilot_jax.errors import InputError, Interrupted
from pilot_jax.federation.observer import RunObserver
from pilot_jax.runs import packing, restore, resume, simulate, summary

SECONDS = ("seconds", "prepare_seconds", "waited_seconds", "feature_seconds")
# Only 5 clients take part in a round, so snapshots refer to files of earlier snapshots.
SECTIONS = {"federation": {"rounds": 3, "clients_per_round": 5, "local_steps": 2}, "eval": {"every": 2}}


class Killed(BaseException):
    """Ends a run as SIGKILL would: nothing catches it, so nothing more is written to disk."""


def told(folder):
    """Returns the lines of metrics.jsonl without their times, and the contents of the mixing files."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    mixing = {}
    for file in sorted((folder / "mixing").iterdir()):
        with np.load(file) as arrays:
            mixing[file.name] = {n: arrays[n].tolist() for n in arrays.files}
    return [{k: v for k, v in line.items() if k not in SECONDS} for line in lines], mixing


def same_run(folder, other):
    one, two = (json.loads((f / "summary.json").read_text()) for f in (folder, other))
    timed = {"wall_seconds", "compile_seconds", "client_steps_per_second", "peak_memory_bytes"}
    assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in two.items() if k not in timed}
    assert told(folder) == told(other)
    assert not (other / "checkpoints" / "resume").exists()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return folder, simulate.simulate(small_config(**SECTIONS), out=folder)


def die(*_, **__):
    raise Killed


class DiesAt(Events):
    """An observer that ends the run with `Killed` at the `count`-th event of a kind."""

    def __init__(self, count, kind="chunk"):
        super().__init__()
        self.count, self.kind = count, kind

    def _add(self, kind, **event):
        super()._add(kind, **event)
        if kind == self.kind and sum(e["kind"] == kind for e in self.events) == self.count:
            die()


def resumes(folder):
    return folder / "checkpoints" / "resume"


def contents(folder):
    """Returns the bytes of every file below a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def signed(manifest, **changes):
    """Writes a manifest with changed entries (None removes an entry) and a matching checksum."""
    content = json.loads(manifest.read_text()) | changes
    content = {k: v for k, v in content.items() if v is not None or k not in changes}
    content["sha256"] = resume._own_sha256(content)
    manifest.write_text(json.dumps(content))


def flip(path):
    """Flips one bit of a file, or of the largest file in a folder."""
    file = path if path.is_file() else max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("system", [{}, {"save_every": "round"}, {"store": "store"}])
def test_goes_on_wherever_it_died(undisturbed, tmp_path, monkeypatch, system):
    """The run is killed in training, between phases, while a snapshot is written, while old snapshots are removed, and
    while results are written. Its adapters, scores, metrics and mixing files equal those of the undisturbed run."""
    if "store" in system:
        system = {"store": str(tmp_path / "store")}
    config, folder = small_config(**SECTIONS, system=system), tmp_path / "run"
    for observer in (DiesAt(1), DiesAt(2), DiesAt(2, "phase")):
        with pytest.raises(Killed):
            simulate.simulate(config, out=folder, resume=True, observers=[observer])
    for owner, name in ((resume, "_synced"), (resume.Snapshots, "_prune"), (simulate, "evaluate"),
                        (summary, "evaluate"), (simulate, "save_population"), (resume.Snapshots, "remove")):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, die)
            simulate.simulate(config, out=folder, resume=True)
        if name == "save_population" and not system:
            back = restore.restore(folder)  # an unfinished run is restored from its snapshot
            assert tree_max_difference(back.population[0].adapters, undisturbed[1].population[0].adapters) == 0
    simulate.simulate(config, out=folder, resume=True)
    if (folder / "checkpoints" / "resume").exists():  # killed after the summary was written: the run had ended
        shutil.rmtree(folder / "checkpoints" / "resume")
    same_run(undisturbed[0], folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["centralised", "fedadam", "scaffold"])
def test_every_kind_of_state_is_saved(tmp_path, name):
    """The strategies have, in this order: no shared subtree; an optax state on the server; a server subtree that the
    clients receive."""
    config = small_config(strategy={"name": name}, federation={"rounds": 2, "local_steps": 1})
    simulate.simulate(config, out=tmp_path / "plain")
    for count in (2, 1):
        with pytest.raises(Killed):
            simulate.simulate(config, out=tmp_path / "run", resume=True, observers=[DiesAt(count, "phase")])
    simulate.simulate(config, out=tmp_path / "run", resume=True)
    same_run(tmp_path / "plain", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "phases"), [(signal.SIGINT, 0), (signal.SIGTERM, 1)])
def test_a_signal_saves_the_clients_that_have_trained(request, tmp_path, number, phases):
    """The signal arrives in the middle of a phase. The current chunk is finished, and its clients are not trained
    again after the run is resumed."""
    class Kicks(Events):
        def _add(self, kind, **event):
            super()._add(kind, **event)
            done = sum(e["kind"] == "phase" for e in self.events)
            if kind == "chunk" and done == phases and event["clients"] < event["of"]:
                os.kill(os.getpid(), number)

    before = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGINT, signal.SIGTERM)}
    request.addfinalizer(lambda: [signal.signal(n, handler) for n, handler in before.items()])
    config = small_config(**SECTIONS, system={"client_chunk": 1, "client_devices": 1})
    folder = tmp_path / "run"
    with pytest.raises(Interrupted) as caught:
        simulate.simulate(config, out=folder, observers=[Kicks()])
    assert caught.value.signum == number and not (folder / "summary.json").exists()
    assert signal.getsignal(number) is signal.default_int_handler
    with pytest.raises(Interrupted):  # interrupted a second time, after it was resumed
        simulate.simulate(config, out=folder, resume=True, observers=[Kicks()])
    seen = Events()
    simulate.simulate(config, out=folder, resume=True, observers=[seen])
    first = next(e for e in seen.events if e["kind"] == "chunk")
    assert first["steps"] < 2 * first["clients"]  # 2 steps per client: some had been trained before
    plain = tmp_path / "plain"
    simulate.simulate(config, out=plain)
    same_run(plain, folder)


class Listing(Events):
    """Also records which snapshots a run's folder holds when training begins."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.names = folder, []

    def run_started(self, fed, state):
        self.names = sorted(p.name for p in resumes(self.folder).iterdir())


@pytest.mark.slow
def test_a_damaged_snapshot_is_passed_over_loudly(undisturbed, tmp_path):
    """A snapshot with one flipped bit is renamed, not deleted, and the run goes on from the snapshot before it."""
    config, folder = small_config(**SECTIONS), tmp_path / "run"
    with pytest.raises(Killed):
        simulate.simulate(config, out=folder, observers=[DiesAt(3, "phase")])
    saved = sorted(p.name for p in resumes(folder).iterdir())
    assert len(saved) >= 2
    for victim in ("manifest.json", "server", "clients"):
        again = tmp_path / victim
        shutil.copytree(folder, again)
        flip(resumes(again) / saved[-1] / victim)
        before, seen = contents(resumes(again) / saved[-1]), Listing(again)
        with pytest.raises(Killed):  # the damaged snapshot stays unchanged, whatever the run does next
            simulate.simulate(config, out=again, resume=True, observers=[seen, DiesAt(2, "phase")])
        warnings = [e["text"] for e in seen.events if e["kind"] == "note" and "Going back" in e["text"]]
        assert len(warnings) == 1 and saved[-1] in warnings[0]
        assert seen.names == [*saved[:-1], saved[-1] + ".damaged"]
        assert contents(resumes(again) / (saved[-1] + ".damaged")) == before
        seen = Events()
        simulate.simulate(config, out=again, resume=True, observers=[seen])
        assert not any("Going back" in e.get("text", "") for e in seen.events)  # the warning is not repeated
        same_run(undisturbed[0], again)
    for path in resumes(folder).iterdir():
        (path / "manifest.json").write_text("{")
    for _ in range(2):  # the second attempt does not start from nothing either
        with pytest.raises(InputError, match=r"none of the .* is whole"):
            simulate.simulate(config, out=folder, resume=True)
        assert sorted(p.name for p in resumes(folder).iterdir()) == [f"{name}.damaged" for name in saved]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Returns the folder of a run that was killed after two snapshots, and the bytes of their files."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    with pytest.raises(Killed):
        simulate.simulate(small_config(**SECTIONS), out=folder, observers=[DiesAt(3, "phase")])
    return folder, contents(resumes(folder))


@pytest.mark.parametrize("error", [InputError("x: damaged, or no checkpoint of a run (try again)."),
                                   OSError(5, "Input/output error")], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ["read_arrays", "_sha256"])
def test_a_read_error_deletes_nothing(undisturbed, begun, tmp_path, monkeypatch, place, error):
    """A read error that may pass leads to no deletion of a snapshot."""
    def fails(*_):
        raise error

    folder = tmp_path / "run"
    shutil.copytree(begun[0], folder)
    with monkeypatch.context() as patch, pytest.raises(type(error), match=re.escape(str(error))):
        patch.setattr(resume, place, fails)
        simulate.simulate(small_config(**SECTIONS), out=folder, resume=True)
    assert contents(resumes(folder)) == begun[1]
    if place == "read_arrays":
        simulate.simulate(small_config(**SECTIONS), out=folder, resume=True)
        same_run(undisturbed[0], folder)


def test_a_read_error_while_old_snapshots_are_removed_deletes_nothing(begun, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(begun[0], folder)
    names, real = sorted(p.name for p in resumes(folder).iterdir()), resume.Snapshots._manifest

    def fails(self, number):
        if number != max(self._numbers()):
            raise resume.Damaged(number, "no answer")
        return real(self, number)

    prune = resume.Snapshots._prune

    def pruned(self):
        with monkeypatch.context() as patch:
            patch.setattr(resume.Snapshots, "_manifest", fails)
            prune(self)
        die()

    monkeypatch.setattr(resume.Snapshots, "_prune", pruned)
    with pytest.raises(Killed):
        simulate.simulate(small_config(**SECTIONS), out=folder, resume=True)
    assert names == sorted(p.name for p in resumes(folder).iterdir())[:-1]


@pytest.mark.parametrize(("changes", "says"), [
    ({"format": None, "pilot_jax": None}, r"another version of pilot_jax \(before snapshots named it; this is \d"),
    ({"format": 1, "pilot_jax": "0.0.7"}, r"another version of pilot_jax \(0\.0\.7; this is \d"),
    ({"format": 99, "pilot_jax": "9.9.9", "clients": None, "files": None}, r"another version of pilot_jax \(9\.9\.9;"),
])
def test_a_snapshot_of_another_version_is_refused_by_name(begun, tmp_path, changes, says):
    folder = tmp_path / "run"
    shutil.copytree(begun[0], folder)
    for path in resumes(folder).iterdir():
        signed(path / "manifest.json", **changes)
    before = contents(resumes(folder))
    with pytest.raises(InputError, match=says) as caught:
        simulate.simulate(small_config(**SECTIONS), out=folder, resume=True)
    assert "\n" not in str(caught.value) and str(max(resumes(folder).iterdir())) in str(caught.value)
    assert contents(resumes(folder)) == before


def test_a_snapshot_of_another_strategy_is_refused(begun, tmp_path):
    """This happens when a user has changed a strategy class: the config is the same, the adapters are not."""
    folder, other = tmp_path / "run", small_config(**SECTIONS, strategy={"name": "fedavg"})
    shutil.copytree(begun[0], folder)
    (folder / "config.yaml").write_text(other.to_yaml())
    with pytest.raises(InputError, match=r"Was the run of another strategy, or has its class changed"):
        simulate.simulate(other, out=folder, resume=True)
    assert contents(resumes(folder)) == begun[1]


@pytest.mark.parametrize("changes", [
    {"clients": {}}, {"clients": 3}, {"files": None}, {"server": {"array": "float32", "shape": [-1], "at": "x"}},
    {"partial": {"clients": [0]}}, {"uploads": None}])
def test_a_snapshot_that_lies_is_refused(begun, tmp_path, changes):
    """A snapshot whose checksum is right but whose entries are wrong causes an error, and nothing is deleted."""
    folder = tmp_path / "run"
    shutil.copytree(begun[0], folder)
    for path in resumes(folder).iterdir():
        signed(path / "manifest.json", **changes)
    before = contents(resumes(folder))
    with pytest.raises(InputError, match=re.escape(str(resumes(folder)))):
        simulate.simulate(small_config(**SECTIONS), out=folder, resume=True)
    assert contents(resumes(folder)) == before


def test_another_config_or_other_data_are_refused(tmp_path):
    config, folder = small_config(), tmp_path / "run"
    with pytest.raises(Killed):
        simulate.simulate(config, out=folder, observers=[DiesAt(2, "phase")])
    with pytest.raises(InputError, match=r"train.batch_size: 4 → 2\n"):
        simulate.simulate(small_config(train={"batch_size": 2}), out=folder, resume=True)
    with pytest.raises(InputError, match="add --resume"):
        simulate.simulate(config, out=folder)
    manifest = next((folder / "checkpoints" / "resume").iterdir()) / "manifest.json"
    signed(manifest, extra=json.loads(manifest.read_text())["extra"] | {"data": "other"})
    with pytest.raises(InputError, match="other training samples"):
        simulate.simulate(config, out=folder, resume=True)
    with pytest.raises(InputError, match="Give its folder"):
        simulate.simulate(config, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="not a run directory"):
        simulate.simulate(config, out=tmp_path / "other", resume=True)
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]


@pytest.mark.slow
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


@pytest.mark.slow
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
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    assert jax.devices() and devices.has_started()
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


def test_one_run_at_a_time(tmp_path, monkeypatch):
    config, folder, refused = small_config(), tmp_path / "run", []

    class Second(RunObserver):
        def run_started(self, fed, state):
            with pytest.raises(InputError, match="in use by another run"):
                simulate.simulate(config, out=folder, resume=True)
            refused.append(1)
            die()

    with pytest.raises(Killed):
        simulate.simulate(config, out=folder, observers=[Second()])
    assert refused == [1]


def test_server_state_of_any_shape_comes_back():
    import optax

    tree = {"round": 3, "bank": {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, "none": None, "empty": {},
            "members": {4: {"size": 7, "adapter": {"b": np.float32([1, 2])}}},
            "optimizer": optax.adam(1e-3).init({"w": np.ones(3, np.float32)}), "list": [1.5, (np.int32(4), "x")]}
    arrays: dict = {}
    node = json.loads(json.dumps(packing.packed(tree, arrays)))
    back = packing.unpacked(node, {k: np.concatenate(v) for k, v in arrays.items()}, tree)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert np.array_equal(a, b) and np.asarray(a).dtype == np.asarray(b).dtype
    with pytest.raises(InputError, match="where NoneType was expected"):
        packing.unpacked(node, {k: np.concatenate(v) for k, v in arrays.items()}, {})


def start(config: Path, folder: Path, kind: str, seed: int, cache: Path) -> subprocess.CompletedProcess:
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                        "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, killed.__file__, config, folder, kind, str(seed)], env=env, text=True,
                          capture_output=True, timeout=600)


def kill_and_resume(tmp_path, kinds: list[str]) -> None:
    """Starts a run again and again, killed by SIGKILL at the points `kinds` in turn, until all have been used."""
    config, cache = tmp_path / "config.yaml", tmp_path / "cache"
    config.write_text(small_config(**SECTIONS).to_yaml())
    plain = start(config, tmp_path / "plain", "never", 0, cache)
    assert plain.returncode == 0, plain.stderr[-2000:]
    kills, runs, starts = 0, 0, 0
    while kills < len(kinds):
        folder = tmp_path / f"run-{runs}"
        runs += 1
        while True:
            starts += 1  # also the seed, so that a random moment differs from start to start
            done = start(config, folder, kinds[kills] if kills < len(kinds) else "never", starts, cache)
            if done.returncode == 0:
                break
            assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
            kills += 1
        assert done.stdout == plain.stdout
        if (folder / "checkpoints" / "resume").exists():  # killed after the summary
            shutil.rmtree(folder / "checkpoints" / "resume")
        same_run(tmp_path / "plain", folder)


@pytest.mark.slow
def test_two_kills(tmp_path):
    kill_and_resume(tmp_path, ["arrays", "mixing"])


@pytest.mark.long
def test_many_kills(tmp_path):
    """24 kills: about half at random moments, the others at the points where a kill is most dangerous."""
    rng = random.Random(0)
    kill_and_resume(tmp_path, ["time" if rng.random() < 0.5 else rng.choice(list(killed.POINTS)) for _ in range(24)])


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax leaves its event loop open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_leaves_what_was_saved(undisturbed, tmp_path, call):
    """From the second snapshot on, no file may exceed 50 kB: the run ends with a message and exit code 1. Without
    that limit it goes on from the first snapshot."""
    import resource

    config, folder = tmp_path / "config.yaml", tmp_path / "run"
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
    assert f"To go on: pilot-jax run {folder / 'config.yaml'} --out {folder} --resume" in err
    assert (folder / "checkpoints" / "resume" / "000001" / "manifest.json").is_file()
    code, out, err = call("run", folder / "config.yaml", "--out", folder, "--resume")
    assert code == 0, err
    assert "going on in round 1" in out
    # Both runs were made in this process, so they used the same devices.
    same_run(undisturbed[0], folder)
    code, out, _ = call("run", folder / "config.yaml", "--out", folder, "--resume")
    assert code == 0 and "Score on held-out data" in out  # the run has ended: its results are printed again
    code, _, err = call("run", config, "--out", "/proc/nothing/here")
    assert code == 2 and "cannot be made" in err
    code, _, err = call("run", config, "--resume")
    assert code == 2 and "Give its folder as --out" in err
