"""The server's side of a run whose clients are elsewhere: the run directory without what only clients have."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pilot_jax.config import Config
from pilot_jax.data.roster import Roster
from pilot_jax.federation.observer import Observers, Record, RunObserver
from pilot_jax.federation.parcels import Parcel
from pilot_jax.federation.remote import serve
from pilot_jax.federation.state import Federation, State
from pilot_jax.runs.events import MetricsFile, MixingFiles
from pilot_jax.runs.folder import RunFolder
from pilot_jax.runs.prepare import configure, initial_state, prepare
from pilot_jax.runs.resume import Snapshots
from pilot_jax.runs.summary import peak_memory
from pilot_jax.words import counted

ByName = Callable[[str, Sequence[str], Callable[[str], Parcel]], Mapping[str, Parcel | str]]


class Saver(RunObserver):
    """Saves the state after every phase, with what the run's files had then."""

    def __init__(self, snapshots: Snapshots, metrics: MetricsFile, mixing: MixingFiles,
                 say: Callable[[str], None]) -> None:
        self.snapshots, self.metrics, self.mixing, self.say = snapshots, metrics, mixing, say

    def note(self, text: str) -> None:
        self.say(text)

    def phase_ended(self, state: State, record: Record, mixing: Mapping[str, np.ndarray] | None,
                    trained: Sequence[int]) -> None:
        self.say(f"round {record['round']} {record['phase']}: {counted(record['clients'], 'client')}")
        self.snapshots.note(trained)
        self.snapshots.save(state, {"metrics": self.metrics.synced(), "mixing": self.mixing.written})


def summary(fed: Federation, state: State, seconds: float) -> dict[str, Any]:
    """Returns what a server knows after a run; it has no data, so there are no scores. `seconds`: since its start."""
    tasks = {client.name: client.task for client in fed.clients}
    return {
        "deployed": True, "strategy": fed.strategy.name, "seed": fed.seed, "rounds": state.round - 1,
        "clients": list(tasks), "tasks": list(fed.tasks), "task_by_client": tasks,
        "score_by_client": {}, "score_by_task": {}, "score_base_by_client": {}, "score_base_by_task": {},
        "score_mean": None, "score_base": None, "bytes_up": state.bytes_up, "bytes_down": state.bytes_down,
        "client_steps": state.client_steps, "quarantined": state.quarantined, "client_steps_per_second": None,
        "wall_seconds": seconds, "compile_seconds": 0.0, "peak_memory_bytes": peak_memory()}


def serve_run(config: Config, roster: Roster, out: str | Path, exchange: ByName, dtype: str,
              say: Callable[[str], None]) -> State:
    """Runs a federation in a run directory, or goes on with the run in it, and returns the last state.

    Args:
        exchange: see `federation.remote.serve`, with names in place of indices. say: is called with lines for people.

    Raises:
        InputError: the config or the roster are wrong, or `out` is another run's.
    """
    folder, metrics = RunFolder(out, config, resume=True), MetricsFile(None)
    try:
        configure(config)
        setup = prepare(config, roster=roster)
        fed, names = setup.federation, setup.federation.names
        first = initial_state(fed)
        snapshots = Snapshots(folder.path / "checkpoints" / "resume", names, fed.strategy.ownership(),
                              setup.system.keep_saved)
        state, extra = (snapshots.load(first, fed.store, say) if folder.resumes else None) or (first, {})
        folder.begin()
        metrics = MetricsFile(folder.path / "metrics.jsonl", extra.get("metrics", {"bytes": 0})["bytes"])
        mixing = MixingFiles(folder.path / "mixing", extra.get("mixing"))

        def by_index(kind: str, clients: Sequence[int], make: Callable[[int], Parcel]) -> dict[int, Parcel | str]:
            replies = exchange(kind, [names[c] for c in clients], lambda name: make(names.index(name)))
            return {names.index(name): reply for name, reply in replies.items()}

        began = time.monotonic()
        state = serve(fed, state, by_index, Observers(metrics, mixing, Saver(snapshots, metrics, mixing, say)), dtype,
                      first.population)
        folder.end(summary(fed, state, time.monotonic() - began))
        return state
    finally:
        metrics.close()
        folder.close()
