"""Tests that the user's cache gives back what was written or nothing, stays within its size, and is the user's own."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest

from pilot_jax import cache
from pilot_jax.cache import Cache, open_cache, private_folder


def test_what_was_written_is_read(tmp_path):
    kept = Cache(tmp_path, 10_000)
    assert kept.read("a") is None
    kept.write("a", [b"one", memoryview(b"two")])
    kept.write("b", [b""])
    assert bytes(kept.read("a")) == b"onetwo" and bytes(kept.read("b")) == b""
    assert bytes(Cache(tmp_path, 10_000).read("a")) == b"onetwo"


@pytest.mark.parametrize("damage", [
    lambda content: content[:-1], lambda content: b"", lambda content: content + b"x",
    lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:],
    lambda content: bytes([content[0] ^ 128]) + content[1:]])
def test_a_damaged_file_is_missing_and_written_again(tmp_path, damage):
    kept = Cache(tmp_path, 10_000)
    kept.write("a", [b"0123456789" * 10])
    file, = tmp_path.glob("*.kept")
    file.write_bytes(damage(file.read_bytes()))
    assert kept.read("a") is None and not file.exists()
    kept.write("a", [b"again"])
    assert bytes(kept.read("a")) == b"again"


def test_the_least_recently_used_files_go_first(tmp_path):
    kept = Cache(tmp_path, 1_000)
    for number, key in enumerate("abc"):
        kept.write(key, [bytes(300)])
        os.utime(kept._path(key), (number, number))
    assert kept.read("a") is not None  # which makes b the oldest
    kept.write("d", [bytes(300)])
    assert [kept.read(key) is not None for key in "abcd"] == [True, False, True, True]
    kept.write("e", [bytes(600)])  # more than half of all
    assert kept.read("e") is None and kept.read("d") is not None


def test_only_a_folder_that_no_other_user_can_write_to(tmp_path):
    assert private_folder(tmp_path / "new" / "one") == tmp_path / "new" / "one"
    assert (tmp_path / "new" / "one").stat().st_mode & 0o777 == 0o700
    shared, link, file = tmp_path / "shared", tmp_path / "link", tmp_path / "file"
    shared.mkdir()
    shared.chmod(0o777)
    link.symlink_to(tmp_path / "new")
    file.touch()
    assert [private_folder(p) for p in (shared, link, file, file / "below")] == [None] * 4


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has no user ids")
def test_another_users_folder_is_not_used(tmp_path, monkeypatch):
    folder = private_folder(tmp_path / "mine")
    monkeypatch.setattr(cache.os, "getuid", lambda: 12_345)
    assert folder is not None and private_folder(folder) is None


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PILOT_JAX_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("PILOT_JAX_KEEP", "1")
    assert open_cache("auto", "programs", 10).folder == tmp_path / "own" / "programs"
    assert open_cache(str(tmp_path / "other"), "programs", 10).folder == tmp_path / "other" / "programs"
    assert open_cache(None, "programs", 10) is None
    monkeypatch.setenv("PILOT_JAX_KEEP", "0")
    assert open_cache("auto", "programs", 10) is None


def test_without_space_nothing_is_kept_and_nothing_fails(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    kept = Cache(tmp_path, 10_000)
    monkeypatch.setattr(cache, "atomic_write", full)
    kept.write("a", [b"one"])
    assert kept.read("a") is None


@pytest.fixture
def calls(tmp_path):
    """Returns a function that asks for a remembered result, and a list of what was computed."""
    computed = []

    def ask(key, value="result"):
        return cache.remembered(key, cache.as_json(dict[str, str]), lambda: computed.append(key) or {"value": value})

    cache.remember_in(Cache(tmp_path, 10_000))
    yield ask, computed
    cache.remember_in(None)


def test_a_result_is_computed_once_for_each_key(calls):
    ask, computed = calls
    assert [ask("a"), ask("a"), ask("b"), ask(None), ask(None)] == [{"value": "result"}] * 5
    assert computed == ["a", "b", None, None]


def test_without_a_cache_everything_is_computed(calls):
    ask, computed = calls
    cache.remember_in(None)
    assert ask("a") == ask("a") and computed == ["a", "a"]


@pytest.mark.parametrize("what", ["source", "library"])
def test_a_result_of_another_version_is_not_used(calls, monkeypatch, what):
    ask, computed = calls
    ask("a")
    if what == "source":
        monkeypatch.setattr(cache, "source_digest", lambda: "another")
    else:
        monkeypatch.setattr(cache, "version_of", lambda name: "99")
    ask("a")
    assert computed == ["a", "a"]


def test_what_cannot_be_read_is_computed_and_written_again(calls, monkeypatch):
    ask, computed = calls
    ask("a")
    monkeypatch.setattr(Cache, "read", lambda self, key, read=Cache.read: read(self, key) and memoryview(b"nonsense"))
    assert ask("a") == {"value": "result"} and computed == ["a", "a"]
    monkeypatch.undo()
    assert ask("a") == {"value": "result"} and computed == ["a", "a"]


def test_a_failure_is_not_remembered(calls):
    ask, computed = calls

    def fail():
        raise ValueError

    for _ in range(2):
        with pytest.raises(ValueError):
            cache.remembered("a", cache.as_json(int), fail)
    assert ask("a") == {"value": "result"} and computed == ["a"]


def test_digests_differ_where_files_do(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    seen = [cache.digest_of_files([one, two])]
    for path, content in ((one, b""), (one, b"ab"), (two, b""), (two, b"ab"), (one, b"a"), (two, b"b")):
        path.write_bytes(content)
        seen.append(cache.digest_of_files([one, two]))
    assert len(set(seen)) == len(seen) and None not in seen
    assert cache.digest_of_files([tmp_path]) is None  # a folder


def test_forms_give_back_what_they_are_given():
    arrays = {"ids": np.arange(5, dtype=np.int32), "none": np.zeros((0, 3), bool), "number": np.asarray(2.5)}
    back = cache.AS_ARRAYS.read(cache.AS_ARRAYS.write(arrays))
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].dtype == array.dtype
    form = cache.as_json(tuple[int, ...])
    assert form.read(form.write((2, 7))) == (2, 7)


def test_arrays_that_hold_objects_are_not_read():
    np.savez(out := io.BytesIO(), ids=np.asarray([{}], object))
    with pytest.raises(ValueError, match="allow_pickle"):
        cache.AS_ARRAYS.read(out.getvalue())
