"""Opens a run directory: refuses a folder of something else or in use, locks it, and finds an earlier run in it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import filelock

from pilot_jax.config import Config, differences
from pilot_jax.data.given import PREFIX
from pilot_jax.errors import InputError
from pilot_jax.files import atomic_write
from pilot_jax.runs.manifest import config_at_start, has_ended, own_files, write_manifest, written

LOCK = ".lock"
# Keys that may differ when a run is resumed: they say where and how results are computed, not what is computed.
ROUNDED = ("system.mesh.", "system.client_chunk", "system.client_devices", "system.steps_at_once",
           "system.length_spread", "system.unroll", "system.attention")  # these change the order of sums
FREE = (*ROUNDED, "system.store", "system.tensorboard", "system.wandb", "system.mlflow", "system.cache",
        "system.compilation_cache", "system.save_every", "system.keep_saved")


class RunFolder:
    """A run directory that is new, or that has a run to go on with.

    The constructor is called before data and model are loaded. It makes the folder if there is none, locks it and then
    looks into it, so that no other run can begin in between. `begin` writes. If the run fails before that, `close`
    leaves the folder as it was.

    Args:
        resume: whether the folder may have a run, of the same config, to go on with.
        writes: whether this process writes the files.

    Raises:
        InputError: the folder is in use, is not a run directory, or is that of another run.
    """

    def __init__(self, path: str | Path, config: Config, resume: bool, writes: bool = True) -> None:
        self.path, self._config, self._writes = Path(path), config, writes
        self._lock, self._begun = filelock.FileLock(self.path / LOCK), False
        self.notes: list[str] = []
        self.resumes = self.finished = False
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--out: {self.path} is a file. Give a folder; nothing was written.")
        self._new = [p for p in (self.path, *self.path.parents) if not p.exists()]
        self._had_lock = (self.path / LOCK).exists()
        try:
            self._acquire()
            self._look(resume)
        except BaseException:
            self.close()
            raise

    def _look(self, resume: bool) -> None:
        """Finds out whether the folder is empty or has a run to go on with."""
        inside = {p.name for p in self.path.iterdir() if p.name != LOCK} if self.path.is_dir() else set()
        if inside and not resume:
            raise InputError(f"--out: {self.path} exists and is not empty. Choose another folder, or add --resume to "
                             "go on with the run in it; nothing was written.")
        self.resumes = any(not name.endswith(".partial") for name in inside)
        if self.resumes:
            earlier = config_at_start(self.path)
            if earlier is None:
                raise InputError(f"--out: {self.path} is not a run directory (no config.yaml). Choose another folder; "
                                 "nothing was written.")
            self._compare(earlier)
            self.finished = has_ended(self.path)

    def _compare(self, earlier: Config) -> None:
        free, bound = list[str](), list[str]()
        for line in differences(earlier, self._config):
            (free if line.startswith(FREE) else bound).append(line)
        if any(line.startswith("data.path:") and PREFIX in line for line in bound):
            raise InputError(f"{self.path}: data: the run began with other samples than it is given now, of which some "
                             "were given in Python. Pass the same data and partition to pilot_jax.simulate again, or "
                             "start another run.")
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
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise InputError(f"--out: {self.path} is in use by another run. Wait for its end, or choose another "
                             "folder.") from None
        except OSError as error:
            raise InputError(f"--out: {self.path} cannot be written ({error.strerror}). Choose another "
                             "folder.") from None

    def begin(self) -> None:
        """Writes the config; called once data and model are checked."""
        if not self._writes:
            return
        self._begun, text = True, self._config.to_yaml()
        write_manifest(self.path, text)
        atomic_write(self.path / "config.yaml", text)
        (self.path / "mixing").mkdir(exist_ok=True)

    def end(self, summary: dict[str, Any]) -> None:
        """Writes the checksums of all files, and `summary.json`, which marks the run as finished.

        Raises:
            OSError: a file cannot be read or written.
        """
        if not self._writes:
            return
        text = json.dumps(summary, indent=1).encode()
        files = {name: written(self.path / name) for name in own_files(self.path)}
        files["summary.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        write_manifest(self.path, self._config.to_yaml(), files)
        atomic_write(self.path / "summary.json", text)

    def close(self) -> None:
        """Unlocks the folder. If the run has not begun, what the constructor has made is removed."""
        if self._lock.is_locked and not self._begun and not self._had_lock:
            (self.path / LOCK).unlink(missing_ok=True)
        self._lock.release()
        for path in self._new if self._writes and not self._begun else ():
            with contextlib.suppress(OSError):  # another run has begun in it
                path.rmdir()
