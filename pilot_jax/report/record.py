"""A run directory as the report reads it. No model is loaded, and an unfinished run has what it has."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from pilot_jax.config import Config, load_config
from pilot_jax.errors import InputError
from pilot_jax.storage import read_json


@dataclasses.dataclass(frozen=True)
class Mixing:
    """One phase's aggregation: row k of `weights` is what client k received."""

    name: str  # "round 1, stage1"
    clients: list[str]
    weights: np.ndarray  # [S, S]
    distances: np.ndarray | None  # [S, S]
    effective_neighbors: np.ndarray  # [S]


@dataclasses.dataclass(frozen=True)
class RunRecord:
    name: str
    folder: Path
    config: Config
    summary: dict[str, Any]  # empty where the run has not ended
    updates: list[dict[str, Any]]  # a client in a phase
    phases: list[dict[str, Any]]
    validation: list[dict[str, Any]]  # a client in a round
    mixing: list[Mixing]

    @property
    def tasks(self) -> list[str]:
        return self.summary.get("tasks") or sorted({u["task"] for u in self.updates})

    @property
    def task_of(self) -> dict[str, str]:
        return self.summary.get("task_by_client") or {u["client"]: u["task"] for u in self.updates}


def _lines(file: Path) -> list[dict[str, Any]]:
    out = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            value = json.loads(line)
        except ValueError:  # the last one, of a run that was killed
            continue
        if not isinstance(value, dict) or "round" not in value:
            raise InputError(f"{file}:{number}: not a line that `run` writes. Give what `run` wrote.")
        out.append(value)
    return out


def _mixing(file: Path) -> Mixing:
    _, round_, label = file.stem.split("_", 2)
    try:
        with np.load(file) as arrays:
            weights = np.asarray(arrays["weights"], np.float64)
            distances = np.asarray(arrays["distances"], np.float64) if "distances" in arrays else None
            return Mixing(f"round {int(round_)}, {label}", [str(c) for c in arrays["client_ids"]], weights, distances,
                          np.asarray(arrays["effective_neighbors"]))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{file}: damaged ({type(error).__name__} {error}).") from None


def read_run(folder: str | Path) -> RunRecord:
    """What a run has written so far.

    Raises:
        InputError: not a run directory, or a file of it is damaged.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file() or not (folder / "metrics.jsonl").is_file():
        raise InputError(f"{folder}: not a run directory (no config.yaml or metrics.jsonl). Give what `run` wrote.")
    lines = _lines(folder / "metrics.jsonl")
    summary = read_json(folder / "summary.json", "") if (folder / "summary.json").is_file() else {}
    return RunRecord(
        folder.resolve().name, folder, load_config(folder / "config.yaml"), summary,
        [x for x in lines if "client" in x and "phase" in x], [x for x in lines if "seconds" in x],
        [x for x in lines if "score" in x], [_mixing(f) for f in sorted((folder / "mixing").glob("round_*.npz"))])
