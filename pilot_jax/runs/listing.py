"""Lists the runs in a folder, from their configs and summaries; nothing else of them is read."""

from __future__ import annotations

import dataclasses
import difflib
import time
from pathlib import Path

import filelock
import yaml

from pilot_jax.errors import InputError
from pilot_jax.files import read_json
from pilot_jax.runs.folder import LOCK


@dataclasses.dataclass(frozen=True)
class Listed:
    """A run in a list."""

    folder: str
    strategy: str
    score: float | None  # mean over clients of the test scores; None: not known yet, or no test data
    state: str  # finished, running, interrupted (`--resume` goes on with it), or damaged
    seconds: float  # since it was last written to


def list_runs(folder: Path) -> list[Listed]:
    """Returns the runs in a folder and in its sub-folders, newest first. What cannot be read is listed as damaged.

    Raises:
        InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. Give one that has run directories.")
    found = [_listed(path.parent) for path in folder.rglob("manifest.json") if (path.parent / "config.yaml").is_file()]
    return sorted(found, key=lambda run: run.seconds)


def client_names(folder: Path) -> list[str]:
    """Returns the names of a finished run's clients; of a run that has not finished, none."""
    try:
        names = read_json(folder / "summary.json", "")["clients"]
    except (InputError, KeyError):
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def check_client(folder: Path, client: str) -> None:
    """Refuses a client that a finished run does not have, before its model is loaded.

    Raises:
        InputError: it has others.
    """
    names = client_names(folder)
    if names and client not in names:
        near = difflib.get_close_matches(client, names, 1, 0.6)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(names[:20])}{' …' * (len(names) > 20)}."
        raise InputError(f"--client: {client!r} is not in this run. {hint}")


def _listed(folder: Path) -> Listed:
    files = [path for path in (folder / "summary.json", folder / "metrics.jsonl", folder / "manifest.json")
             if path.is_file()]
    age = max(0.0, time.time() - max(path.stat().st_mtime for path in files))
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        strategy = str(config["strategy"]["name"])
        if not (folder / "summary.json").is_file():
            return Listed(str(folder), strategy, None, "running" if _in_use(folder) else "interrupted", age)
        score = read_json(folder / "summary.json", "")["score_mean"]
        return Listed(str(folder), strategy, None if score is None else float(score), "finished", age)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, RecursionError, InputError):
        return Listed(str(folder), "?", None, "damaged", age)


def _in_use(folder: Path) -> bool:
    """Returns whether a process holds the folder's lock."""
    if not (folder / LOCK).exists():
        return False
    try:
        with filelock.FileLock(folder / LOCK, timeout=0):
            return False
    except filelock.Timeout:
        return True
    except OSError:  # the folder cannot be written, so no run of this user is in it
        return False
