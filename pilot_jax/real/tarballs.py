"""Reads members of npm tarballs in memory, after their checksums were compared."""

from __future__ import annotations

import dataclasses
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from pilot_jax.errors import InputError
from pilot_jax.files import file_sha256

MOST_BYTES = 20_000_000  # of a member; no file that is read has a tenth of it


@dataclasses.dataclass(frozen=True)
class Tarball:
    """An npm package of one version, with the checksum of its tarball."""

    package: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        """The name that `npm pack` gives the tarball."""
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def command(self) -> str:
        """The command that downloads it."""
        return f"npm pack {self.package}@{self.version}"


def read_members(folder: Path, tarball: Tarball, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Returns the members of a tarball in `folder` whose names are wanted.

    Raises:
        InputError: the tarball is missing, has another checksum, cannot be read, or has a member with an absolute path
            or one that leads out of its folder, or a wanted member that is too large or no plain file.
    """
    file = folder / tarball.file
    if not file.is_file():
        raise InputError(f"{file}: does not exist. Download it into this folder: {tarball.command}.")
    found = file_sha256(file)
    if found != tarball.sha256:
        raise InputError(f"{file}: SHA-256 {found}, expected {tarball.sha256}. Download it again: {tarball.command}.")
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(file, "r:gz") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise InputError(f"{file}: the member {member.name!r} leads out of the tarball. Do not use it.")
                if not wanted(member.name):
                    continue
                content = archive.extractfile(member) if member.isreg() and member.size <= MOST_BYTES else None
                if content is None:
                    raise InputError(f"{file}: the member {member.name!r} is no plain file of at most {MOST_BYTES} "
                                     f"bytes. Download it again: {tarball.command}.")
                members[member.name] = content.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise InputError(f"{file}: cannot be read ({error}). Download it again: {tarball.command}.") from None
    return members
