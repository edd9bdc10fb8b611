"""The user's cache folder: files that save time in later runs, checked when they are read, and bounded in size."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import stat
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

import filelock
import numpy as np

from pilot_jax.files import atomic_write, file_sha256

DIGEST = 32  # bytes of SHA-256, at the start of every file
MAX_READ = 2**26  # bytes of a file whose content may be part of a key
READERS = ("transformers", "tokenizers", "numpy")  # libraries that `remembered` results may depend on
Result = TypeVar("Result")


class Form(NamedTuple, Generic[Result]):
    """How a kind of result is written as bytes and read from them; neither can run code."""

    write: Callable[[Result], bytes]
    read: Callable[[bytes], Result]


_prepared: Cache | None = None


def cache_folder() -> Path:
    """Returns the user's cache folder, which $PILOT_JAX_CACHE or $XDG_CACHE_HOME can move."""
    own, general = os.environ.get("PILOT_JAX_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(general) if general else Path.home() / ".cache") / "pilot_jax"


def private_folder(path: Path) -> Path | None:
    """Returns the folder, made if need be, if no other user can write to it; None if one can, or it cannot be made.

    Programs are loaded from it, so whoever can write to it can run code as this user.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError:
        return None
    if not hasattr(os, "getuid"):  # Windows, where a user's own folders are private
        return path
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        return None
    return path if os.access(path, os.W_OK) else None


def open_cache(where: str | None, name: str, limit: int) -> Cache | None:
    """Returns the cache `name` in a folder.

    Args:
        where: the value of `system.cache`: a folder, "auto" or None.
        limit: size in bytes.

    Returns: None if nothing is to be kept: with None; with "auto" if $PILOT_JAX_KEEP is 0; or if other users can write
        to the folder.
    """
    if where is None or (where == "auto" and os.environ.get("PILOT_JAX_KEEP") == "0"):
        return None
    folder = private_folder((cache_folder() if where == "auto" else Path(where).expanduser()) / name)
    return None if folder is None else Cache(folder, limit)


class Cache:
    """Files by key in a folder, of at most `limit` bytes in all; the least recently used are removed first.

    Each file begins with the SHA-256 of the rest. A file is written aside and renamed. Whatever goes wrong with a file
    makes it count as missing, and it is written again.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.kept"

    def read(self, key: str) -> memoryview | None:
        """Returns what was written with this key, or None. A damaged file is removed."""
        path = self._path(key)
        try:
            content = memoryview(path.read_bytes())
            if hashlib.sha256(content[DIGEST:]).digest() == content[:DIGEST]:
                os.utime(path)  # it is in use
                return content[DIGEST:]
            path.unlink()
        except OSError:
            pass
        return None

    def write(self, key: str, parts: Iterable[bytes | memoryview]) -> None:
        """Stores the parts, one after another. Without the space or the permission for it, nothing is stored."""
        parts = [memoryview(part).cast("B") for part in parts]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        if DIGEST + sum(map(len, parts)) > self.limit // 2:
            return

        def fill(path: Path) -> None:
            with path.open("wb") as file:
                file.writelines([digest.digest(), *parts])

        with contextlib.suppress(OSError, filelock.Timeout), filelock.FileLock(self.folder / ".lock", timeout=10):
            atomic_write(self._path(key), fill, durable=False)
            self._shrink()

    def _shrink(self) -> None:
        files = sorted((entry.stat().st_mtime, entry.stat().st_size, entry.path)
                       for entry in os.scandir(self.folder) if entry.name.endswith(".kept"))
        excess = sum(size for _, size, _ in files) - self.limit
        for _, size, path in files:
            if excess <= 0:
                return
            Path(path).unlink()
            excess -= size


def remember_in(store: Cache | None) -> None:
    """Makes `remembered` keep results in a cache; None: they are not kept."""
    global _prepared
    _prepared = store


@functools.cache
def source_digest() -> str:
    """Returns the SHA-256 of the source of this package."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def version_of(library: str) -> str | None:
    """Returns the version of an installed library, or None."""
    with contextlib.suppress(PackageNotFoundError):
        return version(library)
    return None


def digest_of_files(files: Iterable[Path]) -> str | None:
    """Returns the SHA-256 of the names and contents of the files that exist; None if one is too large, or no file."""
    digest = hashlib.sha256()
    try:
        for file in files:
            if file.is_file() and file.stat().st_size <= MAX_READ:
                digest.update(f"{file.name}\0{file_sha256(file)}\0".encode())
            elif file.exists():
                return None
    except OSError:
        return None
    return digest.hexdigest()


def as_json(kind: type[Result]) -> Form[Result]:
    """Returns the form of numbers and texts, tuples of them, and dataclasses of these; `kind` is the result's type."""
    from pydantic import TypeAdapter

    adapter = TypeAdapter(kind)
    return Form(adapter.dump_json, adapter.validate_json)


def _arrays_to_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    np.savez(out := io.BytesIO(), **cast(Any, arrays))
    return out.getvalue()


def _bytes_to_arrays(content: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(content)) as stored:
        return dict(stored)


AS_ARRAYS = Form(_arrays_to_bytes, _bytes_to_arrays)


def remembered(key: str | None, form: Form[Result], compute: Callable[[], Result]) -> Result:
    """Returns what `compute` returns, or what it has returned in an earlier run with the same key.

    Args:
        key: a text of all that the result depends on, but for the source of this package and the versions of `READERS`;
            None: nothing is kept.
        form: how the result is stored.
        compute: if it raises, nothing is kept.
    """
    if _prepared is None or key is None:
        return compute()
    key = f"{source_digest()} {[version_of(name) for name in READERS]} {key}"
    if (content := _prepared.read(key)) is not None:
        with contextlib.suppress(Exception):  # whatever cannot be read is computed again
            return form.read(bytes(content))
    result = compute()
    _prepared.write(key, [form.write(result)])
    return result
