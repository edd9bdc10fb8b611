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


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Returns a folder with the wheel's own files alone; the dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder / "there",
                    built(folder)], check=True)
    return folder / "there"


@pytest.mark.slow
def test_the_wheel_runs_outside_the_repository(there, tmp_path):
    assert (there / "pilot_jax" / "py.typed").is_file() and not (there / "tests").exists()
    run_outside([sys.executable], tmp_path, os.environ | {"PYTHONPATH": str(there), "JAX_PLATFORMS": "cpu"})


# What a user writes. The first part makes the data, each other one is a program behind it.
DATA = """
import PIL.Image, pilot_jax
colours = ("red", "green", "blue")
rows = [{"image": PIL.Image.new("RGB", (48, 48), colours[i % 3]), "task": f"task_{i // 12}",
         "client": f"client_{i // 12}", "conversations": [
             {"from": "human", "value": "<image>\\nwhat colour?"}, {"from": "gpt", "value": colours[i % 3]}]}
        for i in range(24)]
keys = {"data": {"template": "vicuna_short"}, "federation": {"rounds": 2, "local_steps": 12}, "system": {"unroll": 1}}
"""
MERGED = """
from transformers import AutoProcessor, LlavaForConditionalGeneration
run = pilot_jax.simulate(pilot_jax.Config(**keys, strategy={"name": "fedavg"}), data=rows)
pilot_jax.merge_client(run, "client_0", "merged")
model = LlavaForConditionalGeneration.from_pretrained("merged")
processor = AutoProcessor.from_pretrained("merged")
content = [{"type": "image", "image": rows[1]["image"]}, {"type": "text", "text": "what colour?"}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                       tokenize=True, return_dict=True, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1]:]
print("merged:", processor.decode(tokens, skip_special_tokens=True).strip())
"""
ADAPTERS = """
import pilot_jax.torch
run = pilot_jax.simulate(pilot_jax.Config(**keys, strategy={"name": "pilot"}), data=rows)
pilot_jax.export_client(run, "client_0", "adapters")
client = pilot_jax.torch.load("adapters")
print("torch:", client.ask(rows[1]["image"], "what colour?", 16))
"""
OURS = """
print("ours:", run.ask("client_0", rows[1]["image"], "what colour?", max_new_tokens=16))
"""


@pytest.mark.long
def test_own_data_become_a_model_that_answers_elsewhere(there, tmp_path):
    """From a list of dicts to an answer in transformers, and in torch with Pilot's connector, in 25 lines each."""
    for part in (MERGED, ADAPTERS):
        assert len((DATA + part).split("\n")) - 2 <= 25
    check_that_all_answer_alike(sys.executable, tmp_path, os.environ | {
        "PYTHONPATH": str(there), "JAX_PLATFORMS": "cpu"})


def check_that_all_answer_alike(python, folder, env):
    (folder / "mine.py").write_text(DATA + MERGED + OURS + ADAPTERS + OURS)
    done = subprocess.run([python, "mine.py"], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line.split(": ", 1) for line in done.stdout.splitlines() if line.startswith(("merged:", "torch:", "ours:"))]
    assert [name for name, _ in said] == ["merged", "ours", "torch", "ours"]
    assert [text for _, text in said] == ["green"] * 4


@pytest.mark.long
def test_the_wheel_runs_in_an_empty_environment(tmp_path):
    """Only the wheel and its dependencies are installed."""
    wheel = built(tmp_path)
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", wheel], check=True)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run_outside([str(python)], tmp_path, env)
    subprocess.run([python, "-m", "pip", "install", "-q", "torch==2.13.0", f"{wheel}[torch]"], check=True)
    check_that_all_answer_alike(python, tmp_path, env)
