"""Tests of files: populations on disk give the same run bit for bit, data are read as written, and no file is left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config, tree_max_difference
from safetensors.numpy import load_file

from pilot_jax.errors import InputError
from pilot_jax.federation import mixing
from pilot_jax.federation.state import StoredState
from pilot_jax.files import atomic_write, new_folder
from pilot_jax.runs import restore, simulate
from pilot_jax.storage import RowsWriter, Store, append_rows, map_on_disk, read_tree, write_tree


@pytest.mark.slow
def test_a_population_on_disk_changes_nothing(tmp_path):
    """Two rounds of four of nine clients give the same adapters, bytes and scores with a store and in memory."""
    sections = {"federation": {"rounds": 2, "clients_per_round": 4}}
    memory = simulate.simulate(small_config(**sections), out=tmp_path / "memory")
    disk = simulate.simulate(small_config(**sections, system={"store": str(tmp_path / "store")}),
                             out=tmp_path / "disk")
    for key in ("adapters_sha256", "bytes_up", "bytes_down", "client_steps", "score_by_client"):
        assert memory.summary[key] == disk.summary[key], key
    on_disk = [isinstance(state, StoredState) for state in disk.population]
    assert on_disk == [not state.is_new for state in memory.population] and 4 <= sum(on_disk) < 9
    files = list(disk.federation.store.folder.glob("client-*"))
    assert len(files) == sum(on_disk)  # one version of each client
    phases = [r for r in disk.records if "waited_seconds" in r]
    assert len(phases) >= 3 and all(p["prepare_seconds"] > 0 and p["waited_seconds"] < p["seconds"] for p in phases)
    # The run directory has the clients that have trained; the others are restored as they started.
    again = restore.restore(tmp_path / "disk")
    for a, b in zip(again.population, memory.population, strict=True):
        assert tree_max_difference(a.adapters, b.adapters) == 0 and (a.stage, a.rounds) == (b.stage, b.rounds)
    folder = disk.federation.store.folder
    disk.federation.store._finalizer()
    assert not folder.exists()


def test_versions(tmp_path, monkeypatch):
    store = Store(tmp_path / "new" / "folder", most_waiting=2)
    tree = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}, "c": np.float32([1])}
    first = store.write(3, tree)
    second = store.write(3, {"a": {"b": tree["a"]["b"] + 1}, "c": tree["c"]})
    store.flush()
    assert tree_max_difference(store.read(first), tree) == 0  # still there
    assert load_file(store._path(first)).keys() == {"a/b", "c"}  # the file's format
    assert store.read(second)["a"]["b"][1, 2] == 6
    store.prune({second})
    assert [p.name for p in store.folder.iterdir()] == [store._path(second).name]
    # A version that waits to be written is read from memory, and a full queue makes the next write wait.
    gate, put = threading.Event(), store._put
    monkeypatch.setattr(store, "_put", lambda *a: (gate.wait(), put(*a)))
    keys = [store.write(i, tree) for i in range(2)]
    assert all(store.read(key) is tree for key in keys)
    blocked = threading.Thread(target=store.write, args=(9, tree))
    blocked.start()
    blocked.join(0.2)
    assert blocked.is_alive()
    gate.set()
    blocked.join(10)
    assert not blocked.is_alive()
    store.flush()
    assert len(list(store.folder.glob("client-*"))) == 4 and not list(store.folder.glob("*.partial"))


def test_a_write_that_fails_is_reported(tmp_path):
    store = Store(tmp_path)
    store.folder.rmdir()
    store.write(1, {"a": np.zeros(3, np.float32)})
    with pytest.raises(Exception, match="No such file"):
        store.flush()


def test_an_empty_subtree_leaves_no_trace(tmp_path):
    """A file has arrays alone, so that an empty subtree is absent after reading."""
    store = Store(tmp_path)
    key = store.write(1, {"a": {}, "b": {"c": np.ones(2, np.float32), "d": {}}})
    store.flush()
    read = store.read(key)
    assert read.keys() == {"b"} and read["b"].keys() == {"c"}


def failing(path):
    path.write_text("half")
    raise RuntimeError("no more")


@pytest.mark.parametrize("durable", [True, False])
def test_atomic_write(tmp_path, durable):
    file = tmp_path / "config.yaml"
    for data, content in (("ä\n", "ä\n".encode()), (b"\x00", b"\x00"), (lambda path: path.write_text("c"), b"c")):
        atomic_write(file, data, durable=durable)
        assert file.read_bytes() == content
    with pytest.raises(RuntimeError, match="no more"):
        atomic_write(file, failing, durable=durable)
    assert file.read_bytes() == b"c" and [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "no such folder" / "file", "text", durable=durable)


def test_a_text_with_a_path_that_is_not_utf_8_is_written(tmp_path):
    atomic_write(tmp_path / "file", f"run {os.fsdecode(b'caf' + bytes([0xe9]))}")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "run caf\\udce9"


def test_new_folder(tmp_path):
    path = tmp_path / "deep" / "folder"
    code = "import os, sys; from pathlib import Path; from pilot_jax.files import OwnedFolder\n" \
        "at = OwnedFolder(Path(sys.argv[1]), '.folder.partial-'); (at.path / 'old').touch(); os._exit(9)"
    path.parent.mkdir()
    for _ in range(2):  # each is killed; the second one removes what the first one left
        assert subprocess.run([sys.executable, "-c", code, path.parent]).returncode == 9
        assert len(list(path.parent.glob(".folder.partial-*[!k]"))) == 1
    with new_folder(path) as folder:
        (folder / "new").touch()
        with new_folder(path.with_name("folder")) as other:  # another process at the same time
            assert folder.exists() and other != folder
            (other / "newer").touch()
            other_is_done = True
        assert other_is_done and path.exists()
        shutil.rmtree(path)
    assert [p.name for p in path.iterdir()] == ["new"] and [p.name for p in path.parent.iterdir()] == ["folder"]
    with pytest.raises(FileExistsError, match="exists already"), new_folder(path):
        pass
    assert [p.name for p in path.iterdir()] == ["new"]
    with pytest.raises(RuntimeError, match="no more"), new_folder(tmp_path / "other") as folder:
        failing(folder / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]


def test_append_rows(tmp_path):
    arrays = [np.arange(6, dtype=np.int32).reshape(3, 2), np.zeros((0, 2), np.int32), np.ones((2, 2), np.int32)]
    rows = [append_rows(tmp_path / "rows", array) for array in arrays]
    assert all((np.asarray(r) == a).all() and r.shape == a.shape for r, a in zip(rows, arrays, strict=True))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_rows(tmp_path, dtype):
    writer = RowsWriter(tmp_path / "rows", (5, 2, 3), dtype)
    values = np.arange(12).reshape(2, 2, 3).astype(dtype)
    writer[[1, 4]] = values
    rows = writer.rows
    assert len(rows) == 5 and rows.shape == (5, 2, 3) and np.asarray(rows).dtype == dtype
    assert (rows[np.asarray([4, 1, 4])] == np.asarray(rows)[[4, 1, 4]]).all()  # reads only these rows
    assert (np.asarray(rows)[[1, 4]] == values).all() and not np.asarray(rows)[[0, 2, 3]].any()
    part = rows.part(3, 5)
    assert part.shape == (2, 2, 3) and (part[1] == values[1]).all() and (part.part(1, 2)[0] == values[1]).all()
    assert np.pad(part, ((0, 1), (0, 0), (0, 0))).shape == (3, 2, 3)
    rows.path.write_bytes(rows.path.read_bytes()[:-1])
    for late in (lambda: np.asarray(rows), lambda: rows[np.asarray([4])]):
        with pytest.raises(OSError, match="ends before"):
            late()


@pytest.mark.slow
@pytest.mark.parametrize("space", ["factors", "product"])
def test_mixing_from_disk(tmp_path, space):
    """Weights and mixed adapters of 20 uploads in files equal those of arrays; a Gram matrix selects near pairs."""
    rng, arrays, files = np.random.default_rng(0), {"layers": {}}, {"layers": {}}
    for target in "qv":
        pair = {"a": rng.normal(size=(20, 2, 3, 8)), "b": rng.normal(size=(20, 2, 8, 3))}
        arrays["layers"][target] = {n: x.astype(np.float32) for n, x in pair.items()}
        files["layers"][target] = {}
        for name, values in arrays["layers"][target].items():
            writer = RowsWriter(tmp_path / (target + name), values.shape, np.float32)
            writer[range(20)] = values
            files["layers"][target][name] = writer.rows
    expected, weights = (mixing.ata(x, np.ones(20), neighbors=2, space=space)[0] for x in (arrays, files))
    assert (np.asarray(weights) == np.asarray(expected)).all() and np.asarray(weights).max() < 1
    mixed = map_on_disk(partial(jax.jit(mixing.apply), weights), files, tmp_path)
    np.testing.assert_allclose(np.asarray(mixed["layers"]["q"]["b"]),
                               np.einsum("ms,sldr->mldr", weights, arrays["layers"]["q"]["b"]), atol=1e-6)
    assert mixed["layers"]["v"]["a"].shape == (20, 2, 3, 8)


def test_a_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="folder that can be written"):
        Store(tmp_path / "file" / "below")


def test_a_tree_is_written_whole_and_a_damaged_one_is_refused(tmp_path):
    tree = {"a": {"x": np.arange(4, dtype=np.float32)}, "b": {"y": np.float32(3)}}
    write_tree(tmp_path / "tree", tree, {"n": 1})
    found, note = read_tree(tmp_path / "tree")
    assert note == {"n": 1} and found["b"]["y"] == 3
    np.testing.assert_array_equal(found["a"]["x"], tree["a"]["x"])
    (tmp_path / "tree").write_bytes((tmp_path / "tree").read_bytes()[:20])
    with pytest.raises(InputError, match=r"tree: damaged .* Put back a copy"):
        read_tree(tmp_path / "tree")
