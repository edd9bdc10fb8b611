"""What a run will need on this machine: floating-point operations, the least time that they take, and memory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pilot_jax.federation.state import Federation, steps_by_stage
from pilot_jax.planning.estimate import Workload, memory, phase_shapes, step_flops
from pilot_jax.runs.prepare import Outline


def product_speed(devices: Sequence[jax.Device], dtype: DTypeLike) -> float:
    """Floating-point operations a second of square matrix products, on all `devices` at once."""
    side = 1024 if devices[0].platform == "cpu" else 8192
    product = jax.jit(lambda x: x @ x)
    factors = [jax.device_put(jnp.ones((side, side), dtype), device) for device in devices]
    jax.block_until_ready([product(x) for x in factors])  # compiled
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready([product(x) for x in factors])
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 * len(devices) / best


def forecast(fed: Federation, run: Outline) -> dict[str, float]:
    """`flops` of all training; `seconds`: these at the speed of matrix products here; `bytes` on each device.

    Training takes longer than `seconds`, by what is no matrix product; compiling and answers come on top.
    """
    trained = [c.train for c in fed.clients]
    length, answers = (max(t[name].shape[1] for t in trained) for name in ("input_ids", "target_ids"))
    work = Workload(tuple(c.size for c in fed.clients), len(fed.tasks), length, answers)
    shapes = phase_shapes(dataclasses.replace(run, strategy=fed.strategy), work)
    flops = sum(steps * step_flops(shapes, stage) for stage, steps in steps_by_stage(fed).items())
    devices = list(fed.mesh.devices.ravel()) if fed.mesh is not None else jax.devices()[:1]
    return {"flops": float(flops), "seconds": flops / product_speed(devices, shapes.module.dtype),
            "bytes": float(max(kinds["total"] for kinds in memory(shapes).values()))}


def forecast_line(expected: Mapping[str, float]) -> str:
    """A forecast in one line of text."""
    seconds = expected["seconds"]
    least = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else \
        f"{seconds / 3600:.1f} h"
    return (f"{expected['flops'] / 1e12:,.1f} TFLOP to train: no less than {least} here, and compiling; "
            f"{expected['bytes'] / 1e9:.2f} GB on each device")
