"""Arrays of which only some rows are read from disk, and clients' adapters on disk."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from pilot_jax.errors import InputError
from pilot_jax.files import OwnedFolder, atomic_write, write_safetensors
from pilot_jax.parallel.host_memory import empty


class Rows:
    """Rows `start` to `start + shape[0]` of an array in a file; they are read on access and never memory-mapped."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: DTypeLike, start: int = 0) -> None:
        self.path, self.shape, self.dtype, self.start = path, shape, np.dtype(dtype), start
        self.ndim = len(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        out = empty(self.shape, self.dtype)
        with self.path.open("rb") as file:
            self._read(file, 0, out.reshape(-1).view(np.uint8))
        return out if dtype is None else out.astype(dtype, copy=False)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Indexes as an array does; a one-dimensional integer array reads the rows it names and no others."""
        if not isinstance(index, np.ndarray) or index.ndim != 1 or index.dtype.kind != "i":
            return np.asarray(self)[index]
        out = empty((len(index), *self.shape[1:]), self.dtype)
        memory, size = out.reshape(-1).view(np.uint8), self.row_bytes
        with self.path.open("rb") as file:
            for i, row in enumerate(np.arange(len(self))[index]):  # negative or too large indices: as arrays do
                self._read(file, int(row), memory[i * size:(i + 1) * size])
        return out

    @property
    def row_bytes(self) -> int:
        """The size of one row."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def _read(self, file: BinaryIO, row: int, buffer: np.ndarray) -> None:
        """Fills `buffer`, uint8 [bytes], with the content of the file from `row` on."""
        file.seek((self.start + row) * self.row_bytes)
        if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
            raise OSError(f"{self.path} ends before its last row. It was cut off or changed during the run.")

    def part(self, start: int, stop: int) -> Rows:
        """Returns rows `start` to `stop`, without reading them."""
        return Rows(self.path, (stop - start, *self.shape[1:]), self.dtype, self.start + start)


class RowsWriter:
    """A new file that holds an array [n, …] of zeros; assignment writes rows, the attribute `rows` reads them."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.rows = Rows(path, shape, dtype)
        with path.open("wb") as file:
            file.truncate(shape[0] * self.rows.row_bytes)

    def __setitem__(self, rows: Sequence[int] | np.ndarray, values: np.ndarray) -> None:
        with self.rows.path.open("r+b") as file:
            for row, value in zip(rows, values, strict=True):
                file.seek(int(row) * self.rows.row_bytes)
                file.write(np.ascontiguousarray(value, self.rows.dtype).tobytes())


def map_on_disk(function: Callable[[np.ndarray], Any], tree: Any, folder: Path) -> Any:
    """Applies a function [n, …] → [m, …] to every leaf of a tree of `Rows`, one leaf in memory at a time.

    The results are files in `folder`; returns a tree of `Rows`.
    """
    leaves, structure = jax.tree.flatten(tree)
    out = []
    for number, leaf in enumerate(leaves):
        result = np.asarray(function(np.asarray(leaf)))
        writer = RowsWriter(folder / f"mapped-{number}", result.shape, result.dtype)
        writer[range(len(result))] = result
        out.append(writer.rows)
    return jax.tree.unflatten(structure, out)


def append_rows(path: Path, array: np.ndarray) -> Rows:
    """Appends an array [n, …] to a file of rows of the same shape and dtype, and returns these n rows."""
    with path.open("ab") as file:
        start = file.tell() // max(array[:1].nbytes, 1)
        file.write(np.ascontiguousarray(array).tobytes())
    return Rows(path, array.shape, array.dtype, start)


def write_tree(path: Path, tree: Any, note: Any) -> None:
    """Writes nested dicts of arrays as one safetensors file, with a note that JSON can represent, atomically.

    Raises:
        OSError: the file could not be written.
    """
    flat = {name: np.ascontiguousarray(leaf) for name, leaf in flatten_dict(tree, sep="/").items()}
    atomic_write(path, lambda partial: write_safetensors(partial, flat, {"note": json.dumps(note)}))


def read_tree(path: Path) -> tuple[dict[str, Any], Any]:
    """Returns the nested dicts of arrays and the note that `write_tree` wrote.

    Raises:
        InputError: the file is damaged, or not one of `write_tree`.
        OSError: the file cannot be read.
    """
    try:
        with safe_open(path, "np") as file:
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            return unflatten_dict(flat, sep="/"), json.loads(file.metadata()["note"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged ({' '.join(str(error).split())}). Put back a copy.") from None


@dataclasses.dataclass(frozen=True)
class Key:
    """The name of one version of one client's adapters in a `Store`."""

    client: int
    version: int


class Store:
    """The clients' adapters of one run, one safetensors file for each version, in a folder that goes with the store.

    A thread writes; adapters that have not been written yet are read from memory. A client's earlier versions stay
    readable until `prune`. The attributes `read_seconds`, `write_seconds` and `waited_seconds` sum up durations.
    """

    def __init__(self, parent: str | Path, most_waiting: int = 128) -> None:
        """Makes a folder of its own inside `parent`, and removes those of runs that were killed.

        Args:
            parent: is made if it does not exist.
            most_waiting: versions that may wait to be written; with more, `write` waits.

        Raises:
            InputError: the folder cannot be written.
        """
        try:
            Path(parent).expanduser().mkdir(parents=True, exist_ok=True)
            owned = OwnedFolder(Path(parent).expanduser(), "pilot-jax-")
        except OSError as error:
            raise InputError(f"system.store: {parent}: {error.strerror}. Give a folder that can be written.") from None
        # The folder is removed with the store, at the latest when the process ends; if it is killed, by the next run.
        self.folder, self._finalizer = owned.path, weakref.finalize(self, owned.remove)
        self.read_seconds = self.write_seconds = self.waited_seconds = 0.0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._waiting: dict[Key, tuple[dict[str, Any], Future[None]]] = {}
        self._lock, self._most_waiting, self._versions = threading.Lock(), most_waiting, 0

    def _path(self, key: Key) -> Path:
        return self.folder / f"client-{key.client:08d}-{key.version}.safetensors"

    def write(self, client: int, adapters: dict[str, Any]) -> Key:
        """Queues `adapters`, nested dicts of arrays, to be written, and returns the key that reads them from now on.

        Raises:
            OSError: an earlier version could not be written.
        """
        start = time.perf_counter()
        while len(futures := self._futures()) >= self._most_waiting:
            futures[0].result()
        self.waited_seconds += time.perf_counter() - start
        self._versions += 1
        key = Key(client, self._versions)
        with self._lock:
            self._waiting[key] = adapters, self._writer.submit(self._put, key, adapters)
        return key

    def _futures(self) -> list[Future[None]]:
        """Returns the writes that are waiting or have failed, oldest first."""
        with self._lock:
            return [future for _, future in self._waiting.values()]

    def _put(self, key: Key, adapters: dict[str, Any]) -> None:
        start = time.perf_counter()
        arrays = {name: np.ascontiguousarray(leaf) for name, leaf in flatten_dict(adapters, sep="/").items()}
        # The folder does not outlive the process, so nothing is gained by waiting for the disk.
        atomic_write(self._path(key), lambda partial: write_safetensors(partial, arrays), durable=False)
        self.write_seconds += time.perf_counter() - start
        with self._lock:
            self._waiting.pop(key, None)

    def read(self, key: Key) -> dict[str, Any]:
        """Returns the adapters as nested dicts of NumPy arrays; until they are written, the object given to `write`."""
        with self._lock:
            waiting = self._waiting.get(key)
        if waiting is not None:
            return waiting[0]
        start = time.perf_counter()
        adapters = unflatten_dict(load_file(self._path(key)), sep="/")
        self.read_seconds += time.perf_counter() - start
        return adapters

    def flush(self) -> None:
        """Waits until everything is written.

        Raises:
            OSError: something could not be written.
        """
        start = time.perf_counter()
        for future in self._futures():
            future.result()
        self.waited_seconds += time.perf_counter() - start

    def prune(self, keep: set[Key]) -> None:
        """Removes the written versions that are not in `keep`; versions that wait to be written are not affected.

        Raises:
            OSError: something could not be written.
        """
        for future in self._futures():
            if future.done():
                future.result()
        names = {self._path(key).name for key in keep}
        for path in self.folder.glob("client-*.safetensors"):
            if path.name not in names:
                path.unlink()
