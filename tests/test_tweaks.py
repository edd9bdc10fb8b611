"""The examples of docs/tweaks.md: each short, each run as it stands (on a smaller federation)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import small_config

import pilot_jax
from pilot_jax.federation import rounds

PAGE = Path(__file__).parent.parent / "docs" / "tweaks.md"


def examples():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    return blocks[0], {re.search(r"class (\w+)", b)[1]: b for b in blocks[1:]}


@pytest.mark.parametrize("name", ["OverB", "WithinTask", "Ring"])
def test_example(name, monkeypatch):
    shared, blocks = examples()
    assert set(blocks) == {"OverB", "WithinTask", "Ring"}
    assert len([line for line in blocks[name].splitlines() if line.strip()]) <= 15
    small = small_config(federation={"local_steps": 2}, train={"lr_lora_stage1": 0.01}, strategy={"ata": {
        "temperature": 1.0}})
    saved = {}
    real = rounds.run_round

    def spy(fed, state, round_, show, record, save, *rest):
        return real(fed, state, round_, show, record, lambda r, label, arrays: saved.update({label: arrays}), *rest)

    monkeypatch.setattr(rounds, "run_round", spy)
    monkeypatch.setattr(pilot_jax, "load_config", lambda path: small, raising=False)
    scope: dict = {}
    exec(shared + blocks[name], scope)
    run = scope["run"]
    assert run.summary["strategy"] == name.lower()
    weights = next(iter(saved.values()))["weights"]
    tasks = np.asarray([c.task for c in run.federation.clients])
    if name == "Ring":
        assert np.array_equal(weights, (np.eye(9) + np.roll(np.eye(9), 1, 1)) / 2)
    elif name == "WithinTask":
        assert np.array_equal(weights > 0, tasks[:, None] == tasks[None])
    else:
        first = saved["stage1"]
        assert np.all(np.count_nonzero(first["weights"], axis=1) == 3)  # itself and M = 2
        near = np.argsort(first["distances"] + 1e9 * np.eye(9), axis=1)[:, :2]
        assert all(set(np.flatnonzero(first["weights"][k])) == {k, *near[k]} for k in range(9))
