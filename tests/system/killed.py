"""Runs a federation in a process that kills itself: `python killed.py CONFIG OUT KIND SEED MODEL`. For test_resume.py.

MODEL is "toy" or "real". KIND is "never", "time" (a random moment of training) or a key of `POINTS`, such as "arrays":
before or after a snapshot's arrays are written, at a random one of these calls. The process kills itself by SIGKILL,
without any cleanup.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading

import conftest

from pilot_jax.config import load_config
from pilot_jax.federation import mixing
from pilot_jax.federation.observer import RunObserver
from pilot_jax.runs import checkpoint, events, folder, resume, simulate, snapshot_files
from pilot_jax.testing.toy import toy_clients

POINTS = {
    "mixing": (mixing, "check_rows"), "mixing file": (events, "atomic_write"),
    "metrics": (events.MetricsFile, "_append"), "snapshot": (resume.Snapshots, "save"),
    "arrays": (resume, "write_arrays"), "sync": (snapshot_files, "_synced"), "prune": (resume.Snapshots, "prune"),
    "results": (checkpoint, "write_arrays"), "summary": (folder.RunFolder, "end"),
    "manifest": (folder, "write_manifest"), "removal": (resume.Snapshots, "remove"),
}


CLIENTS = toy_clients((4, 8, 6, 5, 7, 4), ("t0", "t0", "t1", "t1", "t2", "t0"))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(point: str, count: int, before: bool) -> None:
    """Kills the process before or after the `count`-th call of a function."""
    owner, name = POINTS[point]
    real, calls = getattr(owner, name), []

    def passed(*args, **options):
        calls.append(None)
        if before and len(calls) == count:
            kill()
        out = real(*args, **options)
        if not before and len(calls) == count:
            kill()
        return out

    setattr(owner, name, passed)


def main() -> None:
    config, out, kind, seed, model = sys.argv[1:]
    rng = random.Random(int(seed))
    if kind in POINTS:
        kill_at(kind, rng.randint(1, 40 if kind == "metrics" else 2), rng.random() < 0.5)

    class Clock(RunObserver):
        def run_started(self, fed, state):
            if kind == "time":
                threading.Timer(rng.uniform(0.0, 4.0 if model == "real" else 1.0), kill).start()

    with conftest.toy_instead_of_model(CLIENTS, client_chunk=1) if model == "toy" else contextlib.nullcontext():
        run = simulate.simulate(load_config(config), out=out, resume=True, observers=[Clock()])
    print(run.summary["adapters_sha256"])
    os._exit(0)  # does not wait for the timer


if __name__ == "__main__":
    main()
