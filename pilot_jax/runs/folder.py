"""The run directory while a run writes to it: whether it may, that nobody else does, and what it goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import filelock

from pilot_jax.config import Config, differences, load_config
from pilot_jax.errors import InputError
from pilot_jax.storage import atomic_write

LOCK = ".lock"
# What a run may be given otherwise when it goes on: where and how it is computed, not what.
ROUNDED = ("system.mesh.", "system.client_chunk", "system.client_devices", "system.steps_at_once",
           "system.length_spread", "system.unroll", "system.attention")  # sums are taken in another order
FREE = (*ROUNDED, "system.store", "system.tensorboard", "system.compilation_cache", "system.save_every",
        "system.keep_saved")


class RunFolder:
    """`writes`: whether this process leaves the files. Made before anything is loaded, it only looks; `begin` writes.

    Raises:
        InputError: the folder is in use, is something else, or another run's.
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
            raise InputError(f"--out: {self.path} exists and is not empty. Choose another, or add --resume to go on "
                             "with the run that is there; nothing was written.")
        self.resumes = bool(inside - {LOCK, "config.yaml.partial"})
        self.finished = self.resumes and (self.path / "summary.json").is_file()
        if self.resumes:
            if not (self.path / "config.yaml").is_file():
                raise InputError(f"--out: {self.path} is not a run directory (no config.yaml). Choose another; nothing "
                                 "was written.")
            self._compare(load_config(self.path / "config.yaml"))
            self._acquire()

    def _compare(self, earlier: Config) -> None:
        free, bound = list[str](), list[str]()
        for line in differences(earlier, self._config):
            (free if line.startswith(FREE) else bound).append(line)
        if bound:
            raise InputError(f"{self.path}: a run goes on with the config that it began with. Different are (there → "
                             "now):\n  " + "\n  ".join(bound) + "\nUndo that, or start another run with another --out.")
        if free := [line for line in free if line.startswith(ROUNDED)]:
            self.notes.append(f"note: {'; '.join(free)}: results agree to rounding with those of an undisturbed run, "
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
        """Everything is checked: make the folder, if it is not there yet."""
        if not self._writes:
            return
        if not self._lock.is_locked:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"--out: {self.path} cannot be made ({error.strerror}). Choose another "
                                 "folder.") from None
            self._acquire()
        atomic_write(self.path / "config.yaml", self._config.to_yaml())
        (self.path / "mixing").mkdir(exist_ok=True)

    def end(self, summary: dict[str, Any]) -> None:
        if self._writes:
            atomic_write(self.path / "summary.json", json.dumps(summary, indent=1))

    def close(self) -> None:
        self._lock.release()
