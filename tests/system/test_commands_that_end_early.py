"""Tests that a command which is killed, or finds the disk full, leaves nothing that is taken for whole, and that the
same command then gives what an undisturbed one gives. Runs that are killed are in test_resume.py."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import killed_command
import pytest
from conftest import ROOT, small_config
from safetensors import safe_open

PRETRAIN = "{vision_steps: 2, language_steps: 2, batch: 4, width: 32, layers: 1, heads: 2}"
COMMANDS = {
    "data digits": ["data", "digits", "out", "--train", "3", "--validation", "1", "--test", "1"],
    "pretrain": ["pretrain", "p.yaml", "out"],
    "export": ["export", "run", "--client", "ocr_0", "--out", "out"],
    "report": ["report", "run", "--out", "out/page.html", "--answers", "0", "--questions", "0"],
    "compare": ["compare", "c.yaml", "--strategies", "local,fedavg", "--seeds", "1", "--out", "out"],
    "report of a comparison": ["report", "comparison", "--out", "out/page.html"],
}
NEW_FOLDER = ("data digits", "pretrain", "export")  # appear as a whole or not at all
TIMES = re.compile(rb'"(\w*seconds\w*|peak_memory_bytes)": [0-9.e+-]+|The variants took .*')


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    """Gives the commands a folder of compiled programs of their own: a killed one may leave an entry that is torn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("programs")))
        yield


def start(folder: Path, how: str, args: list[str]) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    return subprocess.run([sys.executable, killed_command.__file__, how, *args], cwd=folder, env=env, text=True,
                          capture_output=True, timeout=600)


def content(folder: Path) -> dict[str, bytes]:
    """Returns all files below a folder but locks, without the times in them; of safetensors what a reader reads."""
    return {str(p.relative_to(folder)): _read(p) for p in sorted(folder.rglob("*"))
            if p.is_file() and p.suffix != ".lock" and p.name != "results.md"}  # a table of results.json, with times


def _read(file: Path) -> bytes:
    if file.suffix != ".safetensors":
        return TIMES.sub(b"", file.read_bytes())
    with safe_open(file, "np") as tensors:  # the order of the header's entries is random
        values = sorted((k, tensors.get_tensor(k).tobytes()) for k in tensors.keys())  # noqa: SIM118
        return repr((sorted(tensors.metadata().items()), values)).encode()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Returns a folder with what the commands read, made by commands."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "p.yaml").write_text(PRETRAIN)
    (folder / "c.yaml").write_text(small_config().to_yaml())
    for args in (["run", "c.yaml", "--out", "run"], [*COMMANDS["compare"][:-1], "comparison"]):
        done = start(folder, "count", args)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def inputs(name, request, tmp_path_factory):
    return tmp_path_factory.mktemp("empty") if name == "data digits" else request.getfixturevalue("made")


def copy_of(inputs: Path, folder: Path) -> Path:
    shutil.copytree(inputs, folder)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_commands(inputs, tmp_path, name):
    """Each command is killed at four random ones of its writes, twice in a row, then given again."""
    rng = random.Random(name)
    plain = start(copy_of(inputs, tmp_path / "plain"), "count", COMMANDS[name])
    assert plain.returncode == 0, plain.stderr
    whole, writes = content(tmp_path / "plain"), int(plain.stdout.split()[-1])
    assert writes >= 4
    for k in range(2):
        folder = copy_of(inputs, tmp_path / f"killed-{k}")
        for _ in range(2):
            done = start(folder, f"kill:{rng.randint(1, writes)}", COMMANDS[name])
            if done.returncode == 0:  # the second start had less to write
                break
            assert done.returncode == -signal.SIGKILL, done.stderr
            if name in NEW_FOLDER and (folder / "out").exists():
                assert content(folder / "out") == content(tmp_path / "plain" / "out")
                break
        if not (name in NEW_FOLDER and (folder / "out").exists()):
            done = start(folder, "count", COMMANDS[name])
            assert done.returncode == 0, done.stderr
        assert content(folder) == whole


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_full_disks(inputs, tmp_path, name):
    """No file can be as large as the command needs: it ends with one message, and nothing it read has changed."""
    before = content(inputs)
    for k, size in enumerate((0, 200)):
        folder = copy_of(inputs, tmp_path / str(k))
        done = start(folder, f"disk:{size}", COMMANDS[name])
        assert done.returncode == 1, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        left = content(folder)
        assert {n: left[n] for n in before} == before
        assert not [n for n in left if n.startswith("out") and name in NEW_FOLDER]
        done = start(folder, "count", COMMANDS[name])
        assert done.returncode == 0, done.stderr
