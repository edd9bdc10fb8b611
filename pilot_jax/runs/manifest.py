"""The manifest of a run directory: its config, and the sizes and checksums of the files that the run has written.

The run writes it with its config at the start, and with all other files at the end, just before `summary.json`. Until
then the snapshots have the checksums of what has been written (see `snapshot_files.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

from pilot_jax import __version__
from pilot_jax.config import Config, load_config, parse_config, parse_yaml
from pilot_jax.errors import InputError
from pilot_jax.files import atomic_write, file_sha256, read_signed, signed
from pilot_jax.runs.snapshot_files import Damaged, SnapshotFolder

NAME = "manifest.json"
REMEDY = "Put back a copy; `pilot-jax verify` checks all files of a run"
class Written(TypedDict):
    bytes: int
    sha256: str  # what is known of a file


def written(path: Path) -> Written:
    """Returns the size and the checksum of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def fault(path: Path, expected: Written, grows: bool = False) -> str:
    """Returns how a file differs from what was written; "" if it does not.

    Args:
        grows: whether the file may be longer than `expected`, of which then only the beginning is compared.
    """
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size < expected["bytes"] or (size > expected["bytes"] and not grows):
        return f"damaged: it has {size} bytes, and the run had written {expected['bytes']}"
    same = file_sha256(path, expected["bytes"]) == expected["sha256"]
    return "" if same else "damaged: its checksum is not that of what the run has written"


def own_files(folder: Path) -> Iterator[str]:
    """Yields the relative paths of the files that a finished run leaves in its folder, except manifest and summary."""
    yield "metrics.jsonl"
    for part in ("mixing", "tensorboard", "checkpoints"):
        for path in sorted((folder / part).rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and not name.startswith("checkpoints/resume/"):
                yield name


def write_manifest(folder: Path, config_text: str, files: Mapping[str, Written] | None = None) -> None:
    """Writes the manifest; `files` are all files of a run that ends, or None at its start."""
    record = {"format": 1, "pilot_jax": __version__, "config": config_text, "files": files}
    atomic_write(folder / NAME, signed(record))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Returns the manifest of a run directory; None if there is none, as in those of earlier versions.

    Raises:
        InputError: the manifest is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        record = read_signed(path.read_text(encoding="utf-8"))
        files, texts = record["files"], (record["config"], record["pilot_jax"])
        entries = [] if files is None else [(e["bytes"] + 0, e["sha256"] + "") for e in files.values()]
        if not all(isinstance(text, str) for text in texts) or len(entries) != len(files or ()):
            raise ValueError("an entry is of the wrong type")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({error}). Put back a copy.") from None
    return record


def known_files(folder: Path) -> tuple[dict[str, Written], set[str]]:
    """Returns what is known of the files of a run, and the names of those that may have grown since.

    Of an unfinished run, this is what its newest snapshot says; without a snapshot or a manifest, nothing is known.

    Raises:
        InputError: the manifest is damaged.
    """
    manifest, snapshots = read_manifest(folder), SnapshotFolder(folder / "checkpoints" / "resume")
    if manifest is None:
        return {}, set()
    if manifest["files"] is not None and ((folder / "summary.json").is_file() or not snapshots.folder.is_dir()):
        return manifest["files"], set()
    for number in reversed(snapshots.numbers()):
        try:
            return written_before(snapshots.manifest(number)["extra"]), {"metrics.jsonl"}
        except (Damaged, KeyError, TypeError):
            continue
    return {}, set()


def written_before(extra: Mapping[str, Any]) -> dict[str, Written]:
    """Returns the files that had been written when a snapshot was, by relative path; `extra` is the snapshot's."""
    return {"metrics.jsonl": extra["metrics"]} | {f"mixing/{name}": entry for name, entry in extra["mixing"].items()}


def check_files(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Checks the files of a run whose relative path is `wanted`; see `known_files`.

    Raises:
        InputError: a file is missing or damaged, or the manifest is.
    """
    files, growing = known_files(folder)
    for name, expected in files.items():
        if wanted(name) and (what := fault(folder / name, expected, name in growing)):
            raise InputError(f"{folder / name}: {what}. {REMEDY}.")


def has_ended(folder: Path) -> bool:
    """Returns whether a run has ended.

    Raises:
        InputError: the run has ended, but its summary is missing.
    """
    if (folder / "summary.json").is_file():
        return True
    manifest = read_manifest(folder)
    if manifest is None or manifest["files"] is None or (folder / "checkpoints" / "resume").is_dir():
        return False
    raise InputError(f"{folder / 'summary.json'}: is missing, although the run has ended. {REMEDY}.")


def run_config(folder: Path) -> Config:
    """Returns the config of a run directory.

    Raises:
        InputError: there is no config, it cannot be read, or it is not the one that the run has written.
    """
    path, manifest = folder / "config.yaml", read_manifest(folder)
    if manifest is not None and path.is_file() and path.read_bytes() != manifest["config"].encode():
        raise InputError(f"{path}: damaged or changed: it is not what the run has written. {REMEDY}, and `--resume` "
                         "with the config that the run began with writes this file again.")
    return load_config(path)


def config_at_start(folder: Path) -> Config | None:
    """Returns the config that a run began with, from the manifest if there is one; None if there is no run.

    Raises:
        InputError: the manifest or, without one, the config is damaged.
    """
    manifest = read_manifest(folder)
    if manifest is not None:
        return parse_config(parse_yaml(manifest["config"].encode(), folder / NAME), str(folder / NAME))
    return load_config(folder / "config.yaml") if (folder / "config.yaml").is_file() else None
