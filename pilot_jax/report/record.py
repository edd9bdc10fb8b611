"""Reads a run directory without loading a model; an unfinished run is read as far as it has been written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from pilot_jax.config import load_config
from pilot_jax.errors import InputError
from pilot_jax.storage import read_json

Record = dict[str, Any]  # a JSON object


@dataclasses.dataclass(frozen=True)
class Mixing:
    """One phase of S clients; row k of `weights` has the weight of each upload in what client k receives."""

    name: str  # such as "round 1, stage1"
    clients: list[str]
    weights: np.ndarray  # float64 [S, S]
    distances: np.ndarray | None  # float64 [S, S]
    effective_neighbors: np.ndarray  # [S]


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """All that a run has written: its config, its summary if it has ended, and the lines of metrics.jsonl by kind."""

    name: str
    folder: Path
    config: Record  # config.yaml, with every default filled in
    config_text: str  # config.yaml as text
    summary: Record  # empty if the run has not ended
    updates: list[Record]  # one record for each client in each phase
    phases: list[Record]  # one record for each phase
    validation: list[Record]  # one record for each client in each scored round
    mixing: list[Mixing]

    @property
    def strategy(self) -> str:
        """Name of the strategy."""
        return self.config["strategy"]["name"]

    @property
    def tasks(self) -> list[str]:
        """Tasks in the order of their indices; for an unfinished run, the tasks of clients that have trained."""
        return self.summary.get("tasks") or sorted({u["task"] for u in self.updates})

    @property
    def task_of(self) -> dict[str, str]:
        """Task by client; for an unfinished run, only clients that have trained."""
        return self.summary.get("task_by_client") or {u["client"]: u["task"] for u in self.updates}


def _lines(file: Path) -> list[Record]:
    """Returns the objects of metrics.jsonl; lines that a killed run has written only in part are left out."""
    out = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if not isinstance(value, dict) or "round" not in value:
            raise InputError(f"{file}:{number}: not a line that `run` writes. Give a folder that `pilot-jax run` "
                             "wrote.")
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
    """Returns all that a run has written so far.

    Raises:
        InputError: the folder is not a run directory, or one of its files is damaged.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file() or not (folder / "metrics.jsonl").is_file():
        raise InputError(f"{folder}: not a run directory (no config.yaml or metrics.jsonl). Give a folder that "
                         "`pilot-jax run` wrote.")
    lines, config = _lines(folder / "metrics.jsonl"), load_config(folder / "config.yaml")
    summary = read_json(folder / "summary.json", "") if (folder / "summary.json").is_file() else {}
    return RunRecord(
        folder.resolve().name, folder, config.model_dump(mode="json"), config.to_yaml(), summary,
        updates=[x for x in lines if "client" in x and "phase" in x],
        phases=[x for x in lines if "seconds" in x],
        validation=[x for x in lines if "score" in x],
        mixing=[_mixing(f) for f in sorted((folder / "mixing").glob("round_*.npz"))])
