"""Forecasts a run on this machine: its floating-point operations, the least time that they take, and its memory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pilot_jax.federation.state import Federation, all_steps
from pilot_jax.planning.estimate import Shapes, Workload, memory, phase_shapes, step_flops
from pilot_jax.runs.outline import Outline
from pilot_jax.words import duration, scaled, size


def product_speed(devices: Sequence[jax.Device], dtype: DTypeLike) -> float:
    """Measures the speed of square matrix products on all `devices` together, in FLOPs per second."""
    side = 1024 if devices[0].platform == "cpu" else 8192
    product = jax.jit(lambda x: x @ x)
    factors = [jax.device_put(jnp.ones((side, side), dtype), device) for device in devices]
    jax.block_until_ready([product(x) for x in factors])  # compiles, which is not timed
    best = float("inf")
    for _ in range(10):  # other threads compile at the same time; the best of several is least disturbed
        start = time.perf_counter()
        jax.block_until_ready([product(x) for x in factors])
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 * len(devices) / best


def forecast(fed: Federation, run: Outline) -> dict[str, float]:
    """Returns `flops` of all training, the `seconds` that they take as matrix products, and `bytes` on each device.

    Training takes longer than `seconds`, since it is not all matrix products. Compilation and evaluation are not
    counted.
    """
    sizes = [(c.train["input_ids"].shape[1], c.train["target_ids"].shape[1]) for c in fed.clients]
    longest = max(length for length, _ in sizes), max(answers for _, answers in sizes)

    def shapes_of(size: tuple[int, int]) -> Shapes:
        work = Workload(tuple(c.size for c in fed.clients), len(fed.tasks), *size)
        return phase_shapes(dataclasses.replace(run, strategy=fed.strategy), work)

    flops, steps_of = 0, dict[tuple[str, tuple[int, int]], int]()
    for (stage, client), steps in all_steps(fed).items():
        steps_of[stage, sizes[client]] = steps_of.get((stage, sizes[client]), 0) + steps
    for (stage, lengths), steps in steps_of.items():
        flops += steps * step_flops(shapes_of(lengths), stage)
    shapes = shapes_of(longest)
    devices = list(fed.mesh.devices.ravel()) if fed.mesh is not None else jax.devices()[:1]
    return {"flops": float(flops), "seconds": flops / product_speed(devices, shapes.module.dtype),
            "bytes": float(max(kinds["total"] for kinds in memory(shapes).values()))}


def forecast_line(expected: Mapping[str, float]) -> str:
    """Returns a forecast as one line of text."""
    return (f"training needs {scaled(expected['flops'])}FLOP, which take at least {duration(expected['seconds'])} on "
            f"this machine (compilation not included), and {size(expected['bytes'])} on each device")
