"""Observers that write `metrics.jsonl` and `mixing/*.npz` during a run, and a clock for XLA compilation."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from pilot_jax.federation.observer import Record, RunObserver
from pilot_jax.federation.state import State
from pilot_jax.files import atomic_write
from pilot_jax.programs import WAITED, in_compiling_thread
from pilot_jax.runs.manifest import Written, written


class MetricsFile(RunObserver):
    """Collects the run's records in memory and appends each of them to a file, as a line of JSON.

    Args:
        path: the file; None writes no file.
        keep: how many bytes of an earlier attempt's file are valid (see `check_written`). The rest is cut off.
    """

    def __init__(self, path: Path | None, keep: int = 0) -> None:
        self.records: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        if path is None:
            return
        self._file = path.open("ab")
        self._file.truncate(keep)
        content = path.read_bytes()
        self._digest.update(content)
        self.records = [json.loads(line) for line in content.splitlines()]

    def client_trained(self, record: Record) -> None:
        self._append(record)

    def phase_ended(self, state: State, record: Record, mixing: Mapping[str, np.ndarray] | None,
                    trained: Sequence[int]) -> None:
        self._append(record)

    def client_scored(self, record: Record) -> None:
        self._append(record)

    def _append(self, record: Record) -> None:
        self.records.append(dict(record))
        if self._file is not None:
            line = (json.dumps(record) + "\n").encode()
            self._file.write(line)
            self._file.flush()
            self._digest.update(line)

    def synced(self) -> Written:
        """Flushes the file to disk (fsync) and returns its size and checksum; those of an empty file without one."""
        if self._file is None:
            return {"bytes": 0, "sha256": self._digest.hexdigest()}
        os.fsync(self._file.fileno())
        return {"bytes": self._file.tell(), "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class MixingFiles(RunObserver):
    """Writes each phase's mixing matrix and distances into a folder, as files like `round_0001_stage1.npz`. Of a large
    cohort these are the nearest clients' alone (`Aggregated`).

    Args:
        written: the files of earlier attempts.
    """

    def __init__(self, folder: Path, written: Mapping[str, Written] | None = None) -> None:
        self._folder = folder
        self.written: dict[str, Written] = dict(written or {})  # by file name

    def phase_ended(self, state: State, record: Record, mixing: Mapping[str, np.ndarray] | None,
                    trained: Sequence[int]) -> None:
        if mixing is not None:
            path = self._folder / f"round_{record['round']:04d}_{record['phase']}.npz"
            self._write(path, mixing)
            self.written[path.name] = written(path)

    @staticmethod
    def _write(path: Path, mixing: Mapping[str, np.ndarray]) -> None:
        def save(partial: Path) -> None:
            with partial.open("wb") as file:
                np.savez(file, **mixing)  # type: ignore[arg-type]

        atomic_write(path, save)


class CompileClock:
    """Counts the programs compiled since the clock was created, and the seconds that compilation has held up the run.

    A program that a thread compiles ahead (`programs.KeptJit`) holds the run up only while the run waits for it.
    """

    def __init__(self) -> None:
        self.seconds, self.programs = 0.0, 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)  # type: ignore[arg-type]

    def _heard(self, event: str, duration: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            self.programs += 1
            self.seconds += 0.0 if in_compiling_thread() else duration
        elif event == WAITED:
            self.seconds += duration

    def stop(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)  # type: ignore[arg-type]
