"""Tests that memory, open files and compiled programs do not grow over many short rounds. Takes about ten minutes."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import small_config

from pilot_jax.federation.observer import RunObserver
from pilot_jax.runs import simulate
from pilot_jax.runs.events import CompileClock

ROUNDS = 600


def resident() -> int:
    """Returns the resident memory of this process in bytes (Linux only)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.long
@pytest.mark.parametrize("store", [False, True])
def test_a_long_run_does_not_grow(tmp_path, store):
    seen, clock = [], CompileClock()

    class Watch(RunObserver):
        def phase_ended(self, state, record, mixing, trained):
            if mixing is not None and record["round"] % 20 == 0:
                gc.collect()
                seen.append((resident(), len(os.listdir("/proc/self/fd")), clock.programs))

    config = small_config(federation={"rounds": ROUNDS, "clients_per_round": 3, "local_steps": 1},
                          system={"store": str(tmp_path / "store")} if store else {})
    simulate.simulate(config, out=tmp_path / "run", observers=[Watch()])
    clock.stop()
    memory, files, programs = np.asarray(seen).T
    half = len(seen) // 2
    print(f"rounds {ROUNDS}: memory {memory[half] / 1e6:.0f} MB half-way, {memory[-1] / 1e6:.0f} MB at the end; files "
          f"{files[half]}, {files[-1]}; programs {programs[half]}, {programs[-1]}")
    assert programs[-1] == programs[2]  # every client has had its first round by then
    assert files[-1] <= files[2]
    # A run collects about 3 kB of records per round for its result.
    assert memory[-1] - memory[half] < 0.02 * memory[half] + (ROUNDS / 2) * 6e3
