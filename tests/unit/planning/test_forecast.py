"""Tests the forecast of time and memory that a run prints when it begins."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from conftest import small_config

from pilot_jax.federation.state import steps_by_stage
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
    steps = steps_by_stage(fed)
    assert steps == {"stage1": 18, "stage2": 18}  # 9 clients with 2 steps each
    assert "at least 45 s on this" in forecast.forecast_line({"flops": 1e12, "seconds": 45.0, "bytes": 1e8})
    assert "2.0 h" in forecast.forecast_line({"flops": 1e15, "seconds": 7200.0, "bytes": 1e8})


def test_speed_is_that_of_products():
    assert 1e8 < forecast.product_speed(jax.devices()[:1], np.float32) < 1e16
