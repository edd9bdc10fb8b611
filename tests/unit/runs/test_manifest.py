"""Tests on the toy that every change to a file of a run is found, and that runs which meet do each other no harm."""

from __future__ import annotations

import json
import random
import shutil

import pytest
from conftest import DiesAt, Killed, die, toy_instead_of_model

from pilot_jax.config import parse_config
from pilot_jax.errors import InputError
from pilot_jax.federation.observer import RunObserver
from pilot_jax.report.record import read_run
from pilot_jax.runs import folder as folder_module
from pilot_jax.runs import manifest, restore, simulate
from pilot_jax.runs.verify import verify_run
from pilot_jax.testing.toy import toy_clients


def toy_config(**federation):
    return parse_config({"federation": {"rounds": 3, "clients_per_round": 2, "local_steps": 2} | federation,
                         "strategy": {"name": "feddpa"}, "train": {"batch_size": 4}})


@pytest.fixture(autouse=True, scope="module")
def four_clients():
    with toy_instead_of_model(toy_clients((4, 8, 6, 5), ("t0", "t0", "t1", "t1")), client_chunk=1):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, four_clients):
    folder = tmp_path_factory.mktemp("finished") / "run"
    simulate.simulate(toy_config(), out=folder)
    return folder


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory, four_clients):
    folder = tmp_path_factory.mktemp("unfinished") / "run"
    with pytest.raises(Killed):
        simulate.simulate(toy_config(), out=folder, observers=[DiesAt(3, "phase")])
    return folder


def flipped(path, rng, part=1):
    """Flips one bit of a file, in its first 1/`part`."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content) // part)] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def files_of(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")
                  if p.is_file() and p.stat().st_size and p.name != ".lock")


def reads(folder, name):
    """Reads a run as `evaluate` and `report` do; the part of it that reads the file `name`."""
    if name.startswith("checkpoints/") or name in ("config.yaml", "summary.json", "manifest.json"):
        restore.restore(folder)
    if not name.startswith("checkpoints/"):
        read_run(folder)


def test_an_untouched_run_is_whole(finished, unfinished):
    for folder, ended in ((finished, True), (unfinished, False)):
        found = verify_run(folder)
        assert found.ended == ended and not found.damaged and len(found.whole) > 5
        # What was written after the last snapshot will be written again.
        assert found.unknown == ([] if ended else ["mixing/round_0002_plain.npz"])
        restore.restore(folder)
        read_run(folder)
    listed = json.loads((finished / "manifest.json").read_text())["files"]
    assert set(listed) == set(files_of(finished)) - {"manifest.json", "config.yaml"} | {
        n for n in listed if (finished / n).stat().st_size == 0}


def test_every_flipped_bit_of_a_finished_run_is_found(finished, tmp_path):
    """One flip in every file at least, 60 in all: `verify` names the file, and who reads it refuses it."""
    rng, names = random.Random(0), files_of(finished)
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in [*names, *(rng.choice(names) for _ in range(max(0, 60 - len(names))))]:
        flipped(folder / name, rng)
        assert name in verify_run(folder).damaged or name == "manifest.json", name
        with pytest.raises(InputError, match="damaged"):
            if name == "manifest.json":
                manifest.read_manifest(folder)
            reads(folder, name)
        shutil.copy(finished / name, folder / name)
    assert not verify_run(folder).damaged


@pytest.mark.slow
def test_a_flipped_bit_of_an_unfinished_run_is_found(finished, unfinished, tmp_path):
    """`verify` finds it. The run is refused, or goes on from another snapshot to the same result."""
    rng, names = random.Random(1), files_of(unfinished)
    kinds = ["manifest.json", "config.yaml", "metrics.jsonl", "mixing/round_0001_plain2.npz"]
    snapshots = [name for name in names if name.startswith("checkpoints/")]
    for count, name in enumerate(kinds + rng.sample(snapshots, 8)):
        folder = tmp_path / str(count)
        shutil.copytree(unfinished, folder)
        flipped(folder / name, rng, 3 if name == "metrics.jsonl" else 1)  # its end is newer than the last snapshot
        assert verify_run(folder).damaged, name
        try:
            simulate.simulate(toy_config(), out=folder, resume=True)
        except InputError as error:
            assert "damaged" in str(error) and name.split("/")[0] in str(error)
            assert files_of(folder) == names
            continue
        assert not verify_run(folder).damaged, name
        sums = [json.loads((f / "summary.json").read_text())["adapters_sha256"] for f in (folder, finished)]
        assert sums[0] == sums[1], name


def test_a_missing_log_is_named_and_the_run_goes_on(unfinished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(unfinished, folder)
    (folder / "mixing" / "round_0001_plain1.npz").unlink()
    said = []

    class Notes(RunObserver):
        def note(self, text):
            said.append(text)

    simulate.simulate(toy_config(), out=folder, resume=True, observers=[Notes()])
    assert any("round_0001_plain1.npz is missing" in text for text in said)


@pytest.mark.parametrize(("name", "says"), [
    ("summary.json", "although the run has ended"), ("manifest.json", None), ("config.yaml", "not a run directory")])
def test_a_file_that_has_gone(finished, tmp_path, name, says):
    """Without its summary an ended run is not begun again. Without a manifest, as in earlier versions, it is read."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / name).unlink()
    before = files_of(folder)
    if says is None:
        reads(folder, "config.yaml")
        return
    with pytest.raises(InputError, match=says):
        reads(folder, "config.yaml")
    if name == "summary.json":
        with pytest.raises(InputError, match=says):
            simulate.simulate(toy_config(), out=folder, resume=True)
    assert files_of(folder) == before


def test_a_run_that_begins_between_the_look_and_the_lock(finished, tmp_path, monkeypatch):
    """Another run finishes in the folder just before this one locks it: this one sees it, and leaves it alone."""
    folder, real = tmp_path / "run", folder_module.RunFolder._acquire

    def late(self):
        shutil.copytree(finished, folder, dirs_exist_ok=True)
        real(self)

    monkeypatch.setattr(folder_module.RunFolder, "_acquire", late)
    with pytest.raises(InputError, match="exists and is not empty"):
        simulate.simulate(toy_config(), out=folder)
    assert not verify_run(folder).damaged and verify_run(folder).ended


def test_a_run_that_does_not_begin_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(simulate, "compute_all_features", die)
    with pytest.raises(Killed):
        simulate.simulate(toy_config(), out=tmp_path / "a" / "b" / "run")
    assert list(tmp_path.iterdir()) == []


def test_the_command_verify(finished, tmp_path, call):
    code, out, err = call("verify", finished)
    assert code == 0 and "finished run" in out and not err
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "notes.txt").write_text("mine")
    flipped(folder / "metrics.jsonl", random.Random(2))
    code, out, err = call("verify", folder)
    assert code == 2 and "metrics.jsonl: damaged" in err and "unknown: notes.txt" in out
    code, out, err = call("verify", folder, "--json")
    assert code == 2 and list(json.loads(out)["damaged"]) == ["metrics.jsonl"]
    code, _, err = call("verify", tmp_path)
    assert code == 2 and "not a run directory" in err
