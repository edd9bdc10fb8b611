"""A folder for what does not fit in memory: clients' adapters, one file each, and their data's arrays.

Files are written aside and renamed, so that none is ever half there. What is written is the business of a thread; what
has not been written yet is read from memory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors.numpy import load_file, save_file

from pilot_jax.errors import InputError
from pilot_jax.parallel.host_memory import empty


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Nested dicts of arrays → {"a/b/c": array}."""
    out: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        out |= flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: np.asarray(value)}
    return out


def nested(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The inverse of `flat`."""
    out: dict[str, Any] = {}
    for name, array in arrays.items():
        *path, leaf = name.split("/")
        at = out
        for part in path:
            at = at.setdefault(part, {})
        at[leaf] = array
    return out


class Rows:
    """Rows `start` to `stop` of an array in a file, read when asked for; no page of it stays mapped."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any, start: int = 0) -> None:
        self.path, self.shape, self.dtype, self.start = path, shape, np.dtype(dtype), start
        self.ndim = len(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        out = empty(self.shape, self.dtype)
        with self.path.open("rb") as file:
            self._read(file, 0, out.reshape(-1).view(np.uint8))
        return out if dtype is None else out.astype(dtype, copy=False)

    def __getitem__(self, index: Any) -> np.ndarray:
        """As an array's; of an array of rows, only those are read."""
        if not isinstance(index, np.ndarray) or index.ndim != 1 or index.dtype.kind != "i":
            return np.asarray(self)[index]
        out = empty((len(index), *self.shape[1:]), self.dtype)
        memory, each = out.reshape(-1).view(np.uint8), self._row_bytes
        with self.path.open("rb") as file:
            for at, row in enumerate(np.arange(len(self))[index]):  # negative or too large: as arrays do
                self._read(file, int(row), memory[at * each:(at + 1) * each])
        return out

    @property
    def _row_bytes(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def _read(self, file: BinaryIO, row: int, into: np.ndarray) -> None:
        """What stands from `row` on, as many bytes as `into` has."""
        file.seek((self.start + row) * self._row_bytes)
        if file.readinto(into) != len(into):  # type: ignore[attr-defined]
            raise OSError(f"{self.path} ends before it should.")

    def part(self, start: int, stop: int) -> Rows:
        return Rows(self.path, (stop - start, *self.shape[1:]), self.dtype, self.start + start)


class RowsWriter:
    """An array [n, …] of zeros in a file; rows are assigned, `rows` reads them."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any) -> None:
        self.rows = Rows(path, shape, dtype)
        self._row = self.rows._row_bytes
        with path.open("wb") as file:
            file.truncate(shape[0] * self._row)

    def __setitem__(self, rows: Sequence[int], values: np.ndarray) -> None:
        with self.rows.path.open("r+b") as file:
            for row, value in zip(rows, values, strict=True):
                file.seek(row * self._row)
                file.write(np.ascontiguousarray(value, self.rows.dtype).tobytes())


def kept(path: Path, array: np.ndarray) -> Rows:
    """An array [n, …], written behind those of the same row shape that are in the file already."""
    with path.open("ab") as file:
        start = file.tell() // max(array[:1].nbytes, 1)
        file.write(np.ascontiguousarray(array).tobytes())
    return Rows(path, array.shape, array.dtype, start)


@dataclasses.dataclass(frozen=True)
class Key:
    """One version of one client's adapters."""

    client: int
    version: int


class Store:
    """A folder of one run, which goes when the store does. A client's earlier adapters stay readable until `prune`."""

    def __init__(self, parent: str | Path, most_waiting: int = 128) -> None:
        """most_waiting: clients that may wait to be written; beyond, `write` waits too.

        Raises:
            InputError: the folder cannot be written.
        """
        try:
            Path(parent).expanduser().mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix="pilot-jax-", dir=Path(parent).expanduser()))
        except OSError as error:
            raise InputError(f"system.store: {parent}: {error.strerror}. Give a folder that can be written.") from None
        # Also when the process ends.
        self._finalizer = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.read_seconds = self.write_seconds = self.waited_seconds = 0.0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._waiting: dict[Key, tuple[dict, Future]] = {}
        self._lock, self._most, self._versions = threading.Lock(), most_waiting, 0

    def _path(self, key: Key) -> Path:
        return self.folder / f"client-{key.client:08d}-{key.version}.safetensors"

    def write(self, client: int, adapters: dict[str, Any]) -> Key:
        """Has `adapters` written; they can be read at once."""
        began = time.perf_counter()
        while len(left := self._left()) >= self._most:
            left[0].result()
        self.waited_seconds += time.perf_counter() - began
        self._versions += 1
        key = Key(client, self._versions)
        with self._lock:
            self._waiting[key] = adapters, self._writer.submit(self._put, key, adapters)
        return key

    def _left(self) -> list[Future]:
        """What waits to be written, or could not be, oldest first."""
        with self._lock:
            return [future for _, future in self._waiting.values()]

    def _put(self, key: Key, adapters: dict[str, Any]) -> None:
        began, path = time.perf_counter(), self._path(key)
        partial = path.with_suffix(".partial")
        save_file({n: np.ascontiguousarray(a) for n, a in flat(adapters).items()}, partial)
        os.replace(partial, path)
        self.write_seconds += time.perf_counter() - began
        with self._lock:
            self._waiting.pop(key, None)

    def read(self, key: Key) -> dict[str, Any]:
        with self._lock:
            waiting = self._waiting.get(key)
        if waiting is not None:
            return waiting[0]
        began = time.perf_counter()
        adapters = nested(load_file(self._path(key)))
        self.read_seconds += time.perf_counter() - began
        return adapters

    def flush(self) -> None:
        """Wait until everything is written.

        Raises:
            OSError: something could not be.
        """
        began = time.perf_counter()
        for future in self._left():
            future.result()
        self.waited_seconds += time.perf_counter() - began

    def prune(self, keep: set[Key]) -> None:
        """Remove the written versions that are not in `keep`; what waits to be written goes on waiting.

        Raises:
            OSError: something could not be written.
        """
        for future in self._left():
            if future.done():
                future.result()
        wanted = {self._path(key).name for key in keep}
        for path in self.folder.glob("client-*.safetensors"):
            if path.name not in wanted:
                path.unlink()


MOST_BYTES = 100_000_000  # of a JSON file of a checkpoint


def read_json(file: Path, remedy: str) -> dict:
    """The JSON object in `file`.

    Raises:
        InputError: it is not there or not a JSON object.
    """
    if not file.is_file():
        raise InputError(f"{file} does not exist. {remedy}")
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"{file.stat().st_size} bytes")
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON ({error}). Fetch or write it again.") from None
    if not isinstance(raw, dict):
        raise InputError(f"{file}: expected a JSON object, this is a {type(raw).__name__}.")
    return raw
