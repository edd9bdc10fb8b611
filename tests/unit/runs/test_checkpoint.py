"""Tests checkpoints of arrays: what is written is read, wherever the run's folder is."""

from __future__ import annotations

import os
import tempfile

import numpy as np
import pytest

from pilot_jax.errors import InputError
from pilot_jax.runs.checkpoint import read_arrays, write_arrays


def arrays(value: float) -> dict:
    return {"adapter": {"w": np.full((2, 3), value, np.float32)}, "router": np.arange(4.0)}


# Names with characters that mean something in patterns or URLs, each with another that it would match as a pattern; and
# one that is not UTF-8, as from an older system.
NAMES = {"[a]": "a", "a*": "ab", "what?": "what1", "1234[5].server": "12345.server", "a {x} %20 #ü": "a",
         "old \udce9": "old"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["parent", "folder", "both"])
def test_any_path_will_do(tmp_path, name, place):
    """A checkpoint is read as it was written, in place of an older one, and without parts of one beside it."""
    def path(name):
        return tmp_path / (name if place != "folder" else "run") / (name if place != "parent" else "server")

    other = path(NAMES[name])
    for one, values in ((other, (1.0,)), (path(name), (2.0, 3.0))):
        one.parent.mkdir(parents=True, exist_ok=True)
        for value in values:
            write_arrays(one, arrays(value))
    for one, value in ((path(name), 3.0), (other, 1.0)):
        found = read_arrays(one)
        assert found.keys() == {"adapter", "router"} and (found["adapter"]["w"] == value).all()
    there = {child for one in (other, path(name)) for child in one.parent.iterdir()}
    assert there == {other, path(name)}


def test_a_temporary_folder_with_wildcards(tmp_path, monkeypatch):
    """Some clusters name the folder of an array job's part 1234[5].server."""
    (tmp_path / "[tmp]").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(tmp_path / "[tmp]"))
    (tmp_path / "[a]").mkdir()
    write_arrays(tmp_path / "[a]" / "server", arrays(2.0))
    assert (read_arrays(tmp_path / "[a]" / "server")["adapter"]["w"] == 2.0).all()


def test_what_a_killed_process_left_is_replaced(tmp_path):
    write_arrays(tmp_path / "half", arrays(1.0))
    (tmp_path / "half").rename(tmp_path / "_a].plain")  # the name under which "[a]" is written
    write_arrays(tmp_path / "[a]", arrays(2.0))
    assert (read_arrays(tmp_path / "[a]")["adapter"]["w"] == 2.0).all()
    with pytest.raises(InputError, match=r"\[b\]: no such checkpoint"):
        read_arrays(tmp_path / "[b]")
