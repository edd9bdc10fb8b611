"""Files: atomic writing, folders that appear complete or not at all, checksums, and JSON objects."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import filelock
import numpy as np

from pilot_jax.errors import InputError


def atomic_write(path: Path, data: str | bytes | Callable[[Path], object], *, durable: bool = True) -> None:
    """Writes a file so that a reader, even after a crash, finds either all of the new content or the old content.

    Args:
        path: the file; its folder must exist.
        data: a text, bytes, or a function that writes the file at the path it is given, which is `<name>.partial` in
            the same folder. A text is written as UTF-8, with escapes for the bytes of a path that is not UTF-8.
        durable: whether to wait until the disk has the content before the file gets its name. False for files that
            need not outlive the machine.

    Raises:
        OSError: the file could not be written. The file at `path` is unchanged, and the partial file is removed.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        if callable(data):
            data(partial)
        else:
            partial.write_bytes(data.encode(errors="backslashreplace") if isinstance(data, str) else data)
        if durable:
            with partial.open("r+b") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, readable for whom the umask says.

    Raises:
        OSError: the file could not be written. (The library itself raises an error of its own kind.)
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(errno.EIO, " ".join(str(error).split()), str(path)) from None
    path.chmod(mode)  # the library replaces the file by one that only its owner can read


SAFETENSORS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
               "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}  # the format's names of dtypes


@dataclasses.dataclass(frozen=True)
class LateTensor:
    """A tensor that is made when it is written. `make` returns an array of this shape and dtype."""

    shape: tuple[int, ...]
    dtype: str  # a key of SAFETENSORS
    make: Callable[[], np.ndarray]

    @property
    def itemsize(self) -> int:
        """The bytes of an element; NumPy itself does not know bfloat16."""
        return 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """The size of the tensor."""
        return self.itemsize * math.prod(self.shape)


def stream_safetensors(path: Path, tensors: Mapping[str, LateTensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file of which one tensor at a time is in memory; the library's writer needs all of them.

    Raises:
        OSError: the file could not be written.
    """
    # The largest elements come first, as the library writes them, so that every tensor is aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        one = tensors[name]
        start, end = end, end + one.nbytes
        table[name] = {"dtype": SAFETENSORS[one.dtype], "shape": list(one.shape), "data_offsets": [start, end]}
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            value = tensors[name].make()
            if value.shape != tensors[name].shape or value.dtype.name != tensors[name].dtype:
                raise ValueError(f"{name}: {value.dtype} {value.shape}, expected {tensors[name]}")
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
            del value  # before the next one is made
        file.flush()
        os.fsync(file.fileno())


def path_part(name: str) -> str:
    """Returns any text as a valid file name: without separators and dots, and with at most 200 bytes.

    Different texts get different names; a long one keeps its beginning and gets a checksum.
    """
    safe = quote(name, safe=" +=,@()[]").replace(".", "%2E")
    if len(safe) <= 200:
        return safe
    return f"{safe[:150]}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:32]}"


def file_sha256(path: Path, size: int = -1) -> str:
    """Returns the SHA-256 of a file, or of its first `size` bytes.

    Raises:
        OSError: the file cannot be read.
    """
    digest, left = hashlib.sha256(), size
    with path.open("rb") as file:
        while block := file.read(2**20 if left < 0 else min(left, 2**20)):
            digest.update(block)
            left -= len(block) if left > 0 else 0
    return digest.hexdigest()


def signed(record: Mapping[str, Any]) -> str:
    """Returns a JSON object as text, with its own checksum as the entry "sha256"."""
    plain = json.loads(json.dumps({k: v for k, v in record.items() if k != "sha256"}))  # with lists for tuples
    return json.dumps(plain | {"sha256": _own_sha256(plain)}, indent=1)


def read_signed(text: str) -> dict[str, Any]:
    """Returns the JSON object that `signed` has written as `text`.

    Raises:
        ValueError: the text is not that of `signed`, or was changed since.
    """
    try:
        record = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(record, dict) or record.get("sha256") != _own_sha256(record):
        raise ValueError("its checksum is wrong")
    return record


def _own_sha256(record: Mapping[str, Any]) -> str:
    """Returns the checksum of a JSON object without its entry "sha256"."""
    return hashlib.sha256(json.dumps({k: v for k, v in record.items() if k != "sha256"}).encode()).hexdigest()


class OwnedFolder:
    """A new folder that belongs to this process. One whose process has been killed is removed by the next one.

    A file `<name>.lock` beside the folder is locked while the folder is in use; the system unlocks it when the process
    ends, however it ends.

    Args:
        parent: an existing folder.
        prefix: what the names of such folders begin with. Abandoned folders with this prefix are removed.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        _remove_abandoned(parent, prefix)
        for _ in range(20):
            self.path = parent / f"{prefix}{secrets.token_hex(4)}"
            self._lock = filelock.FileLock(_lock_of(self.path))
            try:
                self._lock.acquire(timeout=0)
                break
            except filelock.Timeout:  # another process is just looking whether this new folder is abandoned
                continue
        else:
            raise PermissionError(errno.EACCES, "no file can be locked here", str(parent))
        self.path.mkdir()

    def remove(self) -> None:
        """Removes what is left of the folder; it may have been renamed."""
        _remove(self.path, self._lock)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")


def _remove(folder: Path, lock: filelock.BaseFileLock) -> None:
    """Removes a folder and its lock file; `lock` is held by this process."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        _lock_of(folder).unlink(missing_ok=True)
    lock.release()


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Removes the folders of an `OwnedFolder` whose process has ended; those of others' that may not be are left."""
    for path in parent.iterdir():
        if path.name.startswith(prefix) and path.name.endswith(".lock"):
            lock = filelock.FileLock(path)
            with contextlib.suppress(filelock.Timeout, OSError):
                lock.acquire(timeout=0)
                _remove(path.with_suffix(""), lock)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`, and renames it to `path` if the block ends without error.

    On an error the folder is removed, and one that a killed process has left behind is removed at the start.

    Raises:
        FileExistsError: `path` exists; nothing was written.
        OSError: the folder cannot be written.
    """
    if path.exists():
        raise FileExistsError(errno.EEXIST, "exists already", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = OwnedFolder(path.parent, f".{path.name}.partial-")
    try:
        yield partial.path
        partial.path.rename(path)
    finally:
        partial.remove()


MOST_JSON_BYTES = 100_000_000  # far above any JSON file of a checkpoint or a run


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object of a JSON text's keys and values; for `json.loads(object_pairs_hook=…)`.

    Raises:
        ValueError: a key occurs twice. Readers differ in which of the values they take.
    """
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the key {key!r} occurs twice")
        out[key] = value
    return out


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """Returns the JSON object in `file`; `remedy` says what to do if the file does not exist.

    Raises:
        InputError: the file does not exist, is too large, or is not a JSON object.
    """
    if not file.is_file():
        raise InputError(f"{file} does not exist. {remedy}")
    try:
        if file.stat().st_size > MOST_JSON_BYTES:
            raise ValueError(f"{file.stat().st_size} bytes, more than the limit of {MOST_JSON_BYTES}")
        raw = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=without_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON ({error}). Fetch or write it again.") from None
    if not isinstance(raw, dict):
        raise InputError(f"{file}: expected a JSON object, this is a {type(raw).__name__}.")
    return raw
