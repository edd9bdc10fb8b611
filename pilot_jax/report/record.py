"""Reads a run directory without loading a model; an unfinished run is read as far as it has been written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, FiniteFloat, ValidationError, model_validator

from pilot_jax.errors import InputError
from pilot_jax.files import read_json
from pilot_jax.runs.manifest import check_files, has_ended, run_config

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
    mixing: list[Mixing]  # of phases in which all weights are stored

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


class _Line(BaseModel, extra="allow"):
    """A line of metrics.jsonl; the models of this file list what the pages need and allow everything else."""

    round: int


class _Update(_Line):
    phase: str
    client: str
    task: str
    loss: float
    last_loss: float


class _Phase(_Line):
    phase: str
    seconds: float
    client_steps: int
    waited_seconds: float | None = None
    feature_seconds: float = 0.0
    bytes_up_by_subtree: dict[str, int] = {}
    bytes_down_by_subtree: dict[str, int] = {}


class _Score(_Line):
    client: str
    score: FiniteFloat


class _Summary(BaseModel, extra="allow"):
    strategy: str
    tasks: list[str]
    task_by_client: dict[str, str]
    score_by_client: dict[str, FiniteFloat]
    score_by_task: dict[str, FiniteFloat | None]
    score_base_by_client: dict[str, FiniteFloat]
    score_base_by_task: dict[str, FiniteFloat | None]
    score_mean: FiniteFloat | None
    score_base: FiniteFloat | None
    score_common: FiniteFloat | None = None
    score_finetuned: FiniteFloat | None = None
    client_steps: int
    client_steps_per_second: float | None
    bytes_up: int
    bytes_down: int
    wall_seconds: float
    compile_seconds: float
    peak_memory_bytes: int
    quarantined: int = 0
    epsilon: float | None = None
    best_round: int | None = None

    @model_validator(mode="after")
    def _every_client_has_a_task(self) -> _Summary:
        if not set(self.score_by_client) <= set(self.task_by_client) or (
                not set(self.task_by_client.values()) <= set(self.tasks)):
            raise ValueError("a client or a task is missing in task_by_client or tasks")
        return self


def check_record(model: type[BaseModel], record: Record, where: str) -> Record:
    """Returns a JSON object that has what a pydantic model asks for.

    Raises:
        InputError: a key is missing or of the wrong type; the message begins with `where`.
    """
    try:
        model.model_validate(record, strict=True)
    except (ValidationError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "nested too deeply"}
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"{where}: damaged, or not written by this version of pilot_jax ({key}: {first['msg']})."
                         ) from None
    return record


def _lines(file: Path) -> list[Record]:
    """Returns the objects of metrics.jsonl; a last line that a killed run has written only in part is left out."""
    out = []
    lines = file.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise InputError(f"{file}:{number}: damaged ({error}). Put back a copy of the file.") from None
        kind = (_Update if "client" in value and "phase" in value else _Phase if "seconds" in value else
                _Score if "score" in value else _Line) if isinstance(value, dict) else _Line
        out.append(check_record(kind, value, f"{file}:{number}"))
    return out


def _mixing(file: Path) -> Mixing | None:
    """Returns what a file of the folder mixing/ holds; None if it has the nearest clients alone, as of large cohorts,
    for which there is no figure."""
    try:
        _, round_, label = file.stem.split("_", 2)
        with file.open("rb") as opened, np.load(opened) as arrays:
            if "columns" in arrays:
                return None
            weights = np.asarray(arrays["weights"], np.float64)
            distances = np.asarray(arrays["distances"], np.float64) if "distances" in arrays else None
            mixing = Mixing(f"round {int(round_)}, {label}", [str(c) for c in arrays["client_ids"]], weights, distances,
                            np.asarray(arrays["effective_neighbors"], np.float64))
        count = len(mixing.clients)
        if (weights.shape != (count, count) or (distances is not None and distances.shape != (count, count))
                or mixing.effective_neighbors.shape != (count,) or not np.isfinite(weights).all()):
            raise ValueError("its arrays do not fit together")
    except Exception as error:  # np.load raises what zipfile, zlib and its own reader do
        raise InputError(f"{file}: damaged ({type(error).__name__} {error}). Put back a copy.") from None
    return mixing


def read_run(folder: str | Path) -> RunRecord:
    """Returns all that a run has written so far.

    Raises:
        InputError: the folder is not a run directory, or one of its files is damaged.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file() or not (folder / "metrics.jsonl").is_file():
        raise InputError(f"{folder}: not a run directory (no config.yaml or metrics.jsonl). Give a folder that "
                         "`pilot-jax run` wrote.")
    config = run_config(folder)
    check_files(folder, lambda name: name in ("metrics.jsonl", "summary.json") or name.startswith("mixing/"))
    lines = _lines(folder / "metrics.jsonl")
    summary: Record = {}
    if has_ended(folder):
        summary = check_record(_Summary, read_json(folder / "summary.json", ""), str(folder / "summary.json"))
    return RunRecord(
        folder.resolve().name, folder, config.model_dump(mode="json"), config.to_yaml(), summary,
        updates=[x for x in lines if "client" in x and "phase" in x],
        phases=[x for x in lines if "seconds" in x],
        validation=[x for x in lines if "score" in x],
        mixing=[m for f in sorted((folder / "mixing").glob("round_*.npz")) if (m := _mixing(f)) is not None])
