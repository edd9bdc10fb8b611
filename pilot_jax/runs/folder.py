"""Opens a run directory: refuses a folder of something else or in use, locks it, and finds an earlier run in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import filelock

from pilot_jax.config import Config, differences, load_config
from pilot_jax.errors import InputError
from pilot_jax.storage import atomic_write

LOCK = ".lock"
# Keys that may differ when a run is resumed: they say where and how results are computed, not what is computed.
ROUNDED = ("system.mesh.", "system.client_chunk", "system.client_devices", "system.steps_at_once",
           "system.length_spread", "system.unroll", "system.attention")  # these change the order of sums
FREE = (*ROUNDED, "system.store", "system.tensorboard", "system.compilation_cache", "system.save_every",
        "system.keep_saved")


class RunFolder:
    """A run directory that is new, or that has a run to go on with.

    The constructor is called before data and model are loaded. It checks the folder and changes nothing in it, except
    that it locks the folder of an earlier run. `begin` writes.

    Args:
        resume: whether the folder may have a run, of the same config, to go on with.
        writes: whether this process writes the files.

    Raises:
        InputError: the folder is in use, is not a run directory, or is that of another run.
    """

    def __init__(self, path: str | Path, config: Config, resume: bool, writes: bool = True) -> None:
        self.path, self._config, self._writes = Path(path), config, writes
        self._lock = filelock.FileLock(self.path / LOCK)
        self.notes: list[str] = []
        there = self.path.exists()
        inside = {p.name for p in self.path.iterdir()} if self.path.is_dir() else set()
        if there and not self.path.is_dir():
            raise InputError(f"--out: {self.path} is a file. Give a folder; nothing was written.")
        if inside - {LOCK} and not resume:
            raise InputError(f"--out: {self.path} exists and is not empty. Choose another folder, or add --resume to "
                             "go on with the run in it; nothing was written.")
        self.resumes = bool(inside - {LOCK, "config.yaml.partial"})
        self.finished = self.resumes and (self.path / "summary.json").is_file()
        if self.resumes:
            if not (self.path / "config.yaml").is_file():
                raise InputError(f"--out: {self.path} is not a run directory (no config.yaml). Choose another folder; "
                                 "nothing was written.")
            self._compare(load_config(self.path / "config.yaml"))
            self._acquire()

    def _compare(self, earlier: Config) -> None:
        free, bound = list[str](), list[str]()
        for line in differences(earlier, self._config):
            (free if line.startswith(FREE) else bound).append(line)
        if bound:
            raise InputError(f"{self.path}: a run can only be resumed with the config that it began with. These keys "
                             "differ (old → new):\n  " + "\n  ".join(bound) + "\nUndo these changes, or start another "
                             "run with another --out.")
        if free := [line for line in free if line.startswith(ROUNDED)]:
            self.notes.append(f"note: {'; '.join(free)}: results agree to rounding with those of an uninterrupted run, "
                              "not bit for bit.")

    def _acquire(self) -> None:
        if not self._writes:
            return
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise InputError(f"--out: {self.path} is in use by another run. Wait for its end, or choose another "
                             "folder.") from None
        except OSError as error:
            raise InputError(f"--out: {self.path} cannot be written ({error.strerror}). Choose another "
                             "folder.") from None

    def begin(self) -> None:
        """Creates the folder if it does not exist, and writes the config; called once data and model are checked."""
        if not self._writes:
            return
        if not self._lock.is_locked:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"--out: {self.path} cannot be made ({error.strerror}). Choose another folder."
                                 ) from None
            self._acquire()
        atomic_write(self.path / "config.yaml", self._config.to_yaml())
        (self.path / "mixing").mkdir(exist_ok=True)

    def end(self, summary: dict[str, Any]) -> None:
        """Writes `summary.json`, which marks the run as finished."""
        if self._writes:
            atomic_write(self.path / "summary.json", json.dumps(summary, indent=1))

    def close(self) -> None:
        self._lock.release()
