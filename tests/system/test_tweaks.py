"""Tests that the examples of docs/tweaks.md are short and that they run, on a smaller federation."""

from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import ROOT, Records, slow_except, small_config

import pilot_jax

PAGE = ROOT / "docs" / "tweaks.md"


def examples():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    return blocks[0], {re.search(r"class (\w+)", b)[1]: b for b in blocks[1:]}


@pytest.fixture
def run_example(monkeypatch, another_process):
    """Returns a function that runs an example of the page and returns (run, its records)."""
    def run(name, **sections):
        shared, blocks = examples()
        assert set(blocks) == {"OverB", "WithinTask", "Ring", "Halfway", "Rotated", "Log"}
        assert len([line for line in blocks[name].splitlines() if line.strip()]) <= 15
        small, records, real = small_config(**sections), Records(), pilot_jax.simulate
        monkeypatch.setattr(pilot_jax, "load_config", lambda path: small, raising=False)
        monkeypatch.setattr(pilot_jax, "simulate", lambda config, observers=(), **options: real(
            config, observers=[records, *observers], **options), raising=False)
        scope: dict = {"__name__": "page"}
        exec(shared + blocks[name], scope)
        return scope["run"], records

    return run


@pytest.mark.parametrize("name", slow_except((), ["OverB", "WithinTask", "Ring", "Halfway", "Rotated"],
                                             {"WithinTask", "Halfway"}))
def test_example(name, run_example):
    run, records = run_example(name, federation={"local_steps": 2}, train={"lr_lora_stage1": 0.01}, strategy={"ata": {
        "temperature": 1.0}})
    assert run.summary["strategy"] == f"page:{name}"
    first = next(iter(records.mixing.values()))
    weights, tasks = first["weights"], np.asarray([c.task for c in run.federation.clients])
    if name == "Ring":
        assert np.array_equal(weights, (np.eye(9) + np.roll(np.eye(9), 1, 1)) / 2)
    elif name == "Halfway":
        np.testing.assert_allclose(weights, 0.7 * np.eye(9) + 0.3 / 9, atol=1e-6)
    elif name == "Rotated":
        np.testing.assert_allclose(weights, 1 / 9, atol=1e-6)
        assert "text_adapter" in run.population[0].adapters
    elif name == "WithinTask":
        assert np.array_equal(weights > 0, tasks[:, None] == tasks[None])
    else:
        assert next(iter(records.mixing)) == (1, "stage1")
        assert np.all(np.count_nonzero(weights, axis=1) == 3)  # the client itself and M = 2 neighbours
        near = np.argsort(first["distances"] + 1e9 * np.eye(9), axis=1)[:, :2]
        assert all(set(np.flatnonzero(weights[k])) == {k, *near[k]} for k in range(9))


@pytest.mark.slow
def test_example_of_an_observer(run_example, capsys):
    run, records = run_example("Log")
    phases = [r for r in records.records if "bytes_up" in r]
    lines = [f"{r['round']} {r['phase']} {r['loss']}" for r in phases]
    assert lines and capsys.readouterr().out.splitlines() == [*lines, str(run.summary["score_by_task"])]
