"""Tests that the installed wheel is enough for a run, without any other file of the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from conftest import ROOT, small_config


def built(folder: Path) -> Path:
    # The wheel is built from a copy, since setuptools leaves its build folder beside the sources.
    copy = folder / "source"
    shutil.copytree(ROOT / "pilot_jax", copy / "pilot_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder,
                    copy], check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def run_outside(python: list[str], folder: Path, env: dict[str, str]) -> None:
    (folder / "config.yaml").write_text(small_config().to_yaml())
    done = subprocess.run([*python, "-m", "pilot_jax", "run", "config.yaml", "--out", "run"], cwd=folder, env=env,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Run directory: run" in done.stdout, done.stderr[-3000:]
    where = subprocess.run([*python, "-c", "import pilot_jax; print(pilot_jax.__file__)"], cwd=folder, env=env,
                           capture_output=True, text=True, check=True).stdout
    assert not where.startswith(str(ROOT / "pilot_jax")), where


@pytest.mark.slow
def test_the_wheel_runs_outside_the_repository(tmp_path):
    """Only the wheel's own files are installed; the dependencies are those of this environment."""
    wheel, there = built(tmp_path), tmp_path / "there"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", there, wheel], check=True)
    assert (there / "pilot_jax" / "py.typed").is_file() and not (there / "tests").exists()
    run_outside([sys.executable], tmp_path, os.environ | {"PYTHONPATH": str(there), "JAX_PLATFORMS": "cpu"})


@pytest.mark.long
def test_the_wheel_runs_in_an_empty_environment(tmp_path):
    """Only the wheel and its dependencies are installed."""
    wheel = built(tmp_path)
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", wheel], check=True)
    run_outside([str(python)], tmp_path, {k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
