"""Checks all files of a run directory, its snapshots included."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pilot_jax.errors import InputError
from pilot_jax.runs.folder import LOCK
from pilot_jax.runs.manifest import NAME, fault, has_ended, known_files, read_manifest, run_config
from pilot_jax.runs.snapshot_files import Damaged, SnapshotFolder


@dataclasses.dataclass
class Verification:
    """What was found in a run directory; paths are relative to it."""

    ended: bool
    whole: list[str] = dataclasses.field(default_factory=list)  # files, and snapshots as `checkpoints/resume/000003`
    damaged: dict[str, str] = dataclasses.field(default_factory=dict)  # what is wrong, by path
    unknown: list[str] = dataclasses.field(default_factory=list)  # files that cannot be checked

    def add(self, name: str, what: str) -> None:
        """Adds a file or snapshot; `what` is wrong with it, or it is "" for one that is whole."""
        if what:
            self.damaged[name] = what
        else:
            self.whole.append(name)


def verify_run(folder: Path) -> Verification:
    """Checks all files of a run against what the run has written.

    Files of which nothing is known are `unknown`: those that others have added, those that an unfinished run has
    written since its last snapshot, and all files of a run of an earlier version without a manifest.

    Raises:
        InputError: the folder is not a run directory.
    """
    if not (folder / "config.yaml").is_file() and not (folder / NAME).is_file():
        raise InputError(f"{folder}: not a run directory (no config.yaml). Give a folder that `pilot-jax run` wrote.")
    out = Verification(ended=False)
    try:
        manifest, (files, growing) = read_manifest(folder), known_files(folder)
    except InputError as error:
        manifest, files, growing = None, {}, set()
        out.add(NAME, str(error))
    if manifest is not None:
        out.add(NAME, "")
        out.add("config.yaml", _message(lambda: run_config(folder)))
    for name, expected in files.items():
        out.add(name, fault(folder / name, expected, name in growing))
    for place in ("checkpoints/resume", "checkpoints/resume/best"):
        snapshots = SnapshotFolder(folder / place)
        for number in snapshots.numbers():
            out.add(f"{place}/{number:06d}", _message(partial(snapshots.verify, number)))
    if NAME not in out.damaged:
        what = _message(lambda: has_ended(folder))
        out.ended = not what and has_ended(folder)
        if what and "summary.json" not in out.damaged:
            out.add("summary.json", what)
    checked = (*out.whole, *out.damaged)
    out.unknown = [name for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LOCK
                   and (name := path.relative_to(folder).as_posix()) not in checked
                   and not name.startswith(tuple(f"{c}/" for c in checked if c.startswith("checkpoints/resume/")))]
    return out


def _message(check: Callable[[], object]) -> str:
    """Returns the message of the error that `check` raises, or ""."""
    try:
        check()
    except (Damaged, InputError, OSError) as error:
        return str(error)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        return f"cannot be read ({type(error).__name__} {error})"
    return ""
