"""Tests on the toy federation that a run that was killed, interrupted or damaged can be resumed and then ends bit for
bit as an undisturbed run does. tests/system/test_resume.py kills processes that train the real model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from conftest import DiesAt, Events, Killed, die, same_run, slow_except, toy_instead_of_model, tree_max_difference
from hypothesis import given, settings
from hypothesis import strategies as st

from pilot_jax import files
from pilot_jax.config import parse_config
from pilot_jax.errors import InputError, Interrupted
from pilot_jax.federation.observer import RunObserver
from pilot_jax.runs import folder as folder_module
from pilot_jax.runs import manifest, packing, restore, resume, simulate, snapshot_files, summary
from pilot_jax.testing.toy import toy_clients

# Only 4 of 6 clients take part in a round, so snapshots refer to files of earlier snapshots. FedDPA's clients have a
# LoRA of their own, which stays with them.
SECTIONS = {"federation": {"rounds": 4, "clients_per_round": 4, "local_steps": 2}, "eval": {"every": 2},
            "strategy": {"name": "feddpa"}, "train": {"batch_size": 4}}
CLIENTS = toy_clients((4, 8, 6, 5, 7, 4), ("t0", "t0", "t1", "t1", "t2", "t0"))


@pytest.fixture(autouse=True, scope="module")
def six_clients():
    with toy_instead_of_model(CLIENTS, client_chunk=1):
        yield


def toy_config(**sections):
    names = {*SECTIONS, *sections}
    return parse_config({name: SECTIONS.get(name, {}) | sections.get(name, {}) for name in names})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, six_clients):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return folder, simulate.simulate(toy_config(), out=folder)


def resumes(folder):
    return folder / "checkpoints" / "resume"


def contents(folder):
    """Returns the bytes of every file below a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def resign(path, **changes):
    """Writes a manifest with changed entries (None removes an entry) and a matching checksum."""
    content = json.loads(path.read_text()) | changes
    content = {k: v for k, v in content.items() if v is not None or k not in changes}
    path.write_text(files.signed(content))


def flip(path):
    """Flips one bit of a file, or of the largest file in a folder."""
    file = path if path.is_file() else max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# Where a run can be killed: at the n-th chunk or phase, or where a function is called.
DEATHS = [("chunk", 1), ("chunk", 2), ("chunk", 3), ("phase", 1), ("phase", 2), ("phase", 3),
          (snapshot_files, "_synced"), (resume, "write_arrays"), (resume.Snapshots, "prune"),
          (folder_module, "atomic_write"), (simulate, "evaluate"), (summary, "evaluate"),
          (simulate, "save_population"), (folder_module, "own_files"), (resume.Snapshots, "remove")]


def run_until(death, config, folder):
    """Starts or resumes a run that is killed at a death of `DEATHS`, or ends before it."""
    place, name = death
    observers = [DiesAt(name, place)] if isinstance(place, str) else []
    with pytest.MonkeyPatch.context() as patch:
        if not observers:
            patch.setattr(place, name, die)
        try:
            simulate.simulate(config, out=folder, resume=True, observers=observers)
        except Killed:
            return True
    return False


def ends_as(undisturbed, config, folder):
    simulate.simulate(config, out=folder, resume=True)
    if resumes(folder).exists():  # killed after the summary was written: the run had ended
        shutil.rmtree(resumes(folder))
    same_run(undisturbed[0], folder)


@pytest.mark.parametrize("death", [
    pytest.param((simulate, "save_population"), marks=pytest.mark.slow), pytest.param(("chunk", 9))])
def test_subtrees_that_clients_receive_at_different_times(tmp_path, death):
    """SCAFFOLD's clients receive the server's control when they take part. Those of one snapshot may have trained in
    different rounds, so that their controls differ."""
    config = toy_config(strategy={"name": "scaffold"})
    plain = simulate.simulate(config, out=tmp_path / "plain")
    assert run_until(death, config, tmp_path / "run")
    ends_as((tmp_path / "plain", plain), config, tmp_path / "run")


@pytest.mark.parametrize("system", slow_except([{}], [{}, {"save_every": "round"}, {"store": "store"}]))
def test_goes_on_wherever_it_died(undisturbed, tmp_path, system):
    """The run is killed in training, between phases, while a snapshot is written, while old snapshots are removed, and
    while results are written. Its adapters, metrics and mixing files equal those of the undisturbed run."""
    if "store" in system:
        system = {"store": str(tmp_path / "store")}
    config, folder = toy_config(system=system), tmp_path / "run"
    for death in [d for d in DEATHS if d not in (("chunk", 3), ("phase", 1), ("phase", 3))]:
        assert run_until(death, config, folder), death
        if death[1] == "save_population" and not system:
            back = restore.restore(folder)  # an unfinished run is restored from its snapshot
            assert tree_max_difference(back.population[0].adapters, undisturbed[1].population[0].adapters) == 0
    ends_as(undisturbed, config, folder)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True)
@given(deaths=st.lists(st.sampled_from(DEATHS), max_size=6), every=st.sampled_from(["phase", "round"]))
def test_goes_on_after_any_sequence_of_deaths(undisturbed, tmp_path_factory, deaths, every):
    config, folder = toy_config(system={"save_every": every}), tmp_path_factory.mktemp("any") / "run"
    for death in deaths:
        run_until(death, config, folder)
    ends_as(undisturbed, config, folder)


@pytest.mark.parametrize("name", slow_except({"fedadam"}, ["centralised", "fedadam", "scaffold"]))
def test_every_kind_of_state_is_saved(tmp_path, name):
    """The strategies have, in this order: no shared subtree; an optax state on the server; a server subtree that the
    clients receive."""
    config = toy_config(strategy={"name": name})
    simulate.simulate(config, out=tmp_path / "plain")
    for count in (2, 1):
        with pytest.raises(Killed):
            simulate.simulate(config, out=tmp_path / "run", resume=True, observers=[DiesAt(count, "phase")])
    simulate.simulate(config, out=tmp_path / "run", resume=True)
    same_run(tmp_path / "plain", tmp_path / "run")


@pytest.mark.parametrize(("number", "phases"), slow_except([(signal.SIGTERM, 1)], [
    (signal.SIGINT, 0), (signal.SIGTERM, 1)]))
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
    config = toy_config()
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


def test_a_damaged_snapshot_is_passed_over_loudly(undisturbed, tmp_path):
    """A snapshot with one flipped bit is renamed, not deleted, and the run goes on from the snapshot before it."""
    config, folder = toy_config(), tmp_path / "run"
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
        assert sorted(p.name for p in resumes(folder).iterdir()) == saved
    for path in resumes(folder).iterdir():
        path.rename(path.with_name(path.name + ".damaged"))
    with pytest.raises(InputError, match=r"none of the .* is whole"):
        simulate.simulate(config, out=folder, resume=True)


def needed(folder, number):
    return snapshot_files.SnapshotFolder(resumes(folder)).needs(
        json.loads((resumes(folder) / f"{number:06d}" / "manifest.json").read_text()), number)


@pytest.mark.parametrize("keep", slow_except([2], [1, 2, 3]))
def test_the_snapshots_that_are_kept_stand_alone(tmp_path, keep):
    """No two of the newest snapshots share a file, also after a resume; each alone leads to the undisturbed result."""
    config = toy_config(system={"keep_saved": keep}, federation={"rounds": 8, "clients_per_round": 1})
    folder = tmp_path / "run"
    simulate.simulate(config, out=tmp_path / "plain")
    for _ in range(2):
        with pytest.raises(Killed):
            simulate.simulate(config, out=folder, resume=True, observers=[DiesAt(4, "phase")])
        newest = sorted(int(p.name) for p in resumes(folder).iterdir())[-keep:]
        needs = [needed(folder, number) for number in newest]
        assert len(set().union(*needs)) == sum(map(len, needs)), needs
    assert max(map(len, needs)) > 1  # some refer to an earlier one
    for number, its in zip(newest, needs, strict=True):
        again = tmp_path / f"only-{number}"
        shutil.copytree(folder, again)
        for other in set(int(p.name) for p in resumes(again).iterdir()) - its:
            flip(resumes(again) / f"{other:06d}" / "manifest.json")
        simulate.simulate(config, out=again, resume=True)
        same_run(tmp_path / "plain", again)


def test_another_number_of_snapshots_from_now_on(undisturbed, tmp_path):
    folder = tmp_path / "run"
    for keep in (2, 3, 1, 4):
        with pytest.raises(Killed):
            simulate.simulate(toy_config(system={"keep_saved": keep}), out=folder, resume=True,
                              observers=[DiesAt(2, "phase")])
    newest = sorted(int(p.name) for p in resumes(folder).iterdir())[-2:]
    assert not needed(folder, newest[0]) & needed(folder, newest[1])
    ends_as(undisturbed, toy_config(), folder)


def test_what_does_not_read_back_removes_nothing(begun, tmp_path, monkeypatch):
    """A snapshot that is damaged right after it was written stops the run; the earlier ones stay."""
    folder, real = tmp_path / "run", snapshot_files._synced
    shutil.copytree(begun[0], folder)
    names = sorted(p.name for p in resumes(folder).iterdir())
    monkeypatch.setattr(snapshot_files, "_synced", lambda path: (real(path), flip(path / "server")))
    with pytest.raises(OSError, match="right after it was written"):
        simulate.simulate(toy_config(), out=folder, resume=True)
    assert sorted(p.name for p in resumes(folder).iterdir())[:-1] == names


@pytest.fixture(scope="module")
def begun(tmp_path_factory, six_clients):
    """Returns the folder of a run that was killed after two snapshots, and the bytes of their files."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    with pytest.raises(Killed):
        simulate.simulate(toy_config(), out=folder, observers=[DiesAt(3, "phase")])
    return folder, contents(resumes(folder))


@pytest.mark.parametrize(("place", "error"), [
    ((resume, "read_arrays"), InputError("x: damaged, or no checkpoint of a run (try again).")),
    ((resume, "read_arrays"), OSError(5, "Input/output error")),
    ((snapshot_files, "file_sha256"), OSError(5, "Input/output error")),
    ((snapshot_files, "read_signed"), OSError(5, "Input/output error"))], ids=lambda value: str(value)[:60])
def test_a_read_error_deletes_nothing(undisturbed, begun, tmp_path, monkeypatch, place, error):
    """A read error that may pass leads to no deletion of a snapshot."""
    def fails(*_):
        raise error

    folder = tmp_path / "run"
    shutil.copytree(begun[0], folder)
    with monkeypatch.context() as patch, pytest.raises(type(error), match=re.escape(str(error))):
        patch.setattr(*place, fails)
        simulate.simulate(toy_config(), out=folder, resume=True)
    assert contents(resumes(folder)) == begun[1]
    if place[1] == "read_arrays":
        simulate.simulate(toy_config(), out=folder, resume=True)
        same_run(undisturbed[0], folder)


@pytest.mark.parametrize(("changes", "says"), [
    ({"format": None, "pilot_jax": None}, r"another version of pilot_jax \(before snapshots named it; this is \d"),
    ({"format": 1, "pilot_jax": "0.0.7"}, r"another version of pilot_jax \(0\.0\.7; this is \d"),
    ({"format": 99, "pilot_jax": "9.9.9", "clients": None, "files": None}, r"another version of pilot_jax \(9\.9\.9;"),
])
def test_a_snapshot_of_another_version_is_refused_by_name(begun, tmp_path, changes, says):
    folder = tmp_path / "run"
    shutil.copytree(begun[0], folder)
    for path in resumes(folder).iterdir():
        resign(path / "manifest.json", **changes)
    before = contents(resumes(folder))
    with pytest.raises(InputError, match=says) as caught:
        simulate.simulate(toy_config(), out=folder, resume=True)
    assert "\n" not in str(caught.value) and str(max(resumes(folder).iterdir())) in str(caught.value)
    assert contents(resumes(folder)) == before


def test_a_snapshot_of_another_strategy_is_refused(begun, tmp_path):
    """This happens when a user has changed a strategy class: the config is the same, the adapters are not."""
    folder, other = tmp_path / "run", toy_config(strategy={"name": "fedavg"})
    shutil.copytree(begun[0], folder)
    manifest.write_manifest(folder, other.to_yaml())
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
        resign(path / "manifest.json", **changes)
    before = contents(resumes(folder))
    with pytest.raises(InputError, match=re.escape(str(resumes(folder)))):
        simulate.simulate(toy_config(), out=folder, resume=True)
    assert contents(resumes(folder)) == before


def test_another_config_or_other_data_are_refused(tmp_path):
    config, folder = toy_config(), tmp_path / "run"
    with pytest.raises(Killed):
        simulate.simulate(config, out=folder, observers=[DiesAt(2, "phase")])
    with pytest.raises(InputError, match=r"train.batch_size: 4 → 2\n"):
        simulate.simulate(toy_config(train={"batch_size": 2}), out=folder, resume=True)
    with pytest.raises(InputError, match="add --resume"):
        simulate.simulate(config, out=folder)
    newest = max(resumes(folder).iterdir()) / "manifest.json"
    resign(newest, extra=json.loads(newest.read_text())["extra"] | {"data": "other"})
    with pytest.raises(InputError, match="other training samples"):
        simulate.simulate(config, out=folder, resume=True)
    with pytest.raises(InputError, match="Give its folder"):
        simulate.simulate(config, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="not a run directory"):
        simulate.simulate(config, out=tmp_path / "other", resume=True)
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_one_run_at_a_time(tmp_path, monkeypatch):
    config, folder, refused = toy_config(), tmp_path / "run", []

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
