"""The files of snapshots: a folder `<number>` each, with a manifest of checksums, which may need earlier snapshots."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

from pilot_jax import __version__
from pilot_jax.errors import InputError
from pilot_jax.files import file_sha256, read_signed, signed

FORMAT = 4  # of a snapshot; snapshots of another format are refused


class Damaged(Exception):
    """Raised if a snapshot's bytes are not those that were written; `number` is that of the snapshot."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")


def _synced(folder: Path) -> None:
    """Flushes a folder to disk (fsync), so that no file is renamed but empty after a power cut.

    Where the system allows it, the files are dropped from memory, so that they are next read from the disk itself.
    """
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            if hasattr(os, "posix_fadvise") and path.is_file():
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


class SnapshotFolder:
    """The folder of a run's snapshots.

    Args:
        keep: how many of the newest snapshots are kept.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self.verified: dict[int, set[int]] = {}  # by snapshot that could be read: all snapshots that it needs

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}"

    def seal(self, partial: Path, manifest: dict[str, Any]) -> None:
        """Completes a snapshot, whose arrays are in the folder `<number>.partial`, and removes old snapshots.

        Raises:
            OSError: the snapshot could not be written, or cannot be read again.
        """
        manifest["format"], manifest["pilot_jax"] = FORMAT, __version__
        manifest["files"] = {str(p.relative_to(partial)): file_sha256(p) for p in _files(partial)}
        (partial / "manifest.json").write_text(signed(manifest), encoding="utf-8")
        _synced(partial)
        partial.rename(partial.with_suffix(""))
        try:
            self.verify(int(partial.stem))
        except Damaged as error:
            raise OSError(f"{error}, right after it was written. Check the disk") from None
        self.prune()

    def numbers(self) -> list[int]:
        return sorted(int(p.name) for p in self.folder.glob("*") if p.name.isdigit())

    def manifest(self, number: int) -> dict:
        path = self.path(number) / "manifest.json"
        try:
            return read_signed(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:
            raise Damaged(number, f"{path}: damaged ({error})") from None

    def needs(self, manifest: dict, number: int) -> set[int]:
        """Returns the numbers of all snapshots that have adapters of the snapshot `number`, itself included."""
        return {number} | {c["at"][0] for c in manifest["clients"].values() if c["at"]}

    def prune(self) -> None:
        """Removes the snapshots that are older than the ones to keep and that none of these needs.

        As long as fewer than the wanted number are known to be readable, nothing is removed.
        """
        kept = sorted(self.verified)[-self.keep:]
        wanted = set[int]().union(*(self.verified[number] for number in kept))
        old = [n for n in self.numbers() if n < kept[0] and n not in wanted] if len(kept) == self.keep else []
        for path in (*(self.path(n) for n in old), *self.folder.glob("*.partial")):
            shutil.rmtree(path, ignore_errors=True)
        self.verified = {number: self.verified[number] for number in kept}

    def verify(self, number: int) -> dict:
        """Returns the manifest of a snapshot after checking every file that the snapshot needs.

        Raises:
            Damaged: a file is missing, or its checksum is wrong.
            InputError: the snapshot was written by another version.
            OSError: a file cannot be read.
        """
        manifest = self.manifest(number)
        if manifest.get("format") != FORMAT:
            raise InputError(f"{self.path(number)}: was written by another version of pilot_jax ("
                             f"{manifest.get('pilot_jax', 'before snapshots named it')}; this is {__version__}). Use "
                             "that version, or start a new run with another --out.")
        needed = self.needs(manifest, number)
        for other in sorted(needed - set[int]().union(*self.verified.values())):
            folder = self.path(other)
            for name, digest in self.manifest(other)["files"].items():
                if not (folder / name).is_file() or file_sha256(folder / name) != digest:
                    raise Damaged(other, f"{folder / name} is missing or its checksum is wrong")
        self.verified[number] = needed
        return manifest

    def set_aside(self, number: int) -> None:
        """Renames a damaged snapshot to a name that is free, such as `000003.damaged`."""
        path = self.path(number)
        names = (path.with_name(f"{path.name}.damaged{'' if k == 1 else f'-{k}'}") for k in itertools.count(1))
        if path.exists():  # several snapshots may need the same earlier one, which is then already renamed
            path.rename(next(name for name in names if not name.exists()))

    def remove(self) -> None:
        """Removes all snapshots; called once the results of the run are written."""
        shutil.rmtree(self.folder, ignore_errors=True)
