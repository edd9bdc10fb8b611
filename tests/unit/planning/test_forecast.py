"""Tests the forecast of time and memory that a run prints when it begins."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from conftest import small_config

from pilot_jax.federation.state import all_steps
from pilot_jax.planning import forecast
from pilot_jax.planning.estimate import make_plan
from pilot_jax.runs.prepare import outline


@pytest.mark.slow
def test_forecast_is_the_plan_of_the_data_that_are_there(federation, monkeypatch):
    fed, config = federation[0], small_config()
    monkeypatch.setattr(forecast, "product_speed", lambda devices, dtype: 1e9)
    got, plan = forecast.forecast(fed, outline(config)), make_plan(config)
    assert got["flops"] == plan["flops"]["round_1"] and got["seconds"] == got["flops"] / 1e9
    assert got["bytes"] == max(kinds["total"] for kinds in plan["memory_per_device"].values())
    assert all_steps(fed) == {(stage, c): 2 for stage in ("stage1", "stage2") for c in range(9)}
    assert "at least 45 s on this" in forecast.forecast_line({"flops": 1e12, "seconds": 45.0, "bytes": 1e8})
    assert "2.0 h" in forecast.forecast_line({"flops": 1e15, "seconds": 7200.0, "bytes": 1e8})


def test_speed_is_that_of_products():
    assert 1e8 < forecast.product_speed(jax.devices()[:1], np.float32) < 1e16


def test_clients_with_short_samples_cost_less(federation, monkeypatch):
    """Each client's steps are counted at the length of its own arrays."""
    fed = federation[0]
    monkeypatch.setattr(forecast, "product_speed", lambda devices, dtype: 1e9)
    whole = forecast.forecast(fed, outline(small_config()))["flops"]
    short = dataclasses.replace(fed.clients[0], train={
        name: array[:, :array.shape[1] - 16] if name in ("input_ids", "attention_mask") else array
        for name, array in fed.clients[0].train.items()})
    less = forecast.forecast(dataclasses.replace(fed, clients=(short, *fed.clients[1:])), outline(small_config()))
    assert 0.85 * whole < less["flops"] < whole
