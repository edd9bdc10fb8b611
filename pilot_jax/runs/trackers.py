"""Sends a run's losses and scores to TensorBoard, Weights & Biases or MLflow, if the config asks for it.

Each tool's own environment variables say where it is (WANDB_MODE, WANDB_ENTITY, MLFLOW_TRACKING_URI, …). A tool that
fails during the run costs its own record alone: the run says so and goes on.
"""

from __future__ import annotations

import abc
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pilot_jax.config import SystemConfig
from pilot_jax.errors import InputError
from pilot_jax.federation.observer import Record, RunObserver
from pilot_jax.federation.state import State
from pilot_jax.files import atomic_write, read_json

SHOWN = ("loss", "effective_neighbors", "product_gap", "bytes_up", "bytes_down", "seconds")  # keys of a phase's record
# The key of the config, the module that it needs, and the package that has it.
TOOLS = {"tensorboard": ("tensorboardX", "tensorboardX"), "wandb": ("wandb", "wandb"), "mlflow": ("mlflow", "mlflow")}
IDENTITIES = "trackers.json"  # file of the run folder: under which name each tool knows the run


def check_installed(system: SystemConfig) -> None:
    """Raises an `InputError` if the package of a tool that the config asks for is not installed."""
    for key, (module, package) in TOOLS.items():
        if getattr(system, key) and importlib.util.find_spec(module) is None:
            raise InputError(f"system.{key}: needs {package}, which is not installed (it is in the extra '{key}'). "
                             f"Run: pip install {package}")


class Tracker(RunObserver, abc.ABC):
    """An observer that sends numbers to a tool: losses over the run's client steps, and scores over rounds."""

    steps = 0  # client steps so far

    @abc.abstractmethod
    def send(self, values: Mapping[str, float], axis: str, at: int) -> None:
        """Sends values by name. `at`: where they belong on the axis, "client_steps" or "round"."""

    def client_scored(self, record: Record) -> None:
        self.send({f"validation/{record['client']}": record["score"]}, "round", record["round"])

    def client_trained(self, record: Record) -> None:
        self.steps += record["step"]
        self.send({f"loss/{record['client']}": record["loss"]}, "client_steps", self.steps)

    def phase_ended(self, state: State, record: Record, mixing: Mapping[str, np.ndarray] | None,
                    trained: Sequence[int]) -> None:
        self.send_phase(record)

    def send_phase(self, record: Record) -> None:
        """Sends a phase's record, if something was aggregated."""
        if "loss" in record:
            self.send({f"phase/{name}": record[name] for name in SHOWN if name in record}, "client_steps", self.steps)


class EventFiles(Tracker):
    """Writes TensorBoard's event files into a folder.

    Args:
        earlier: records of the run before it was interrupted; the event files of that time are replaced.
    """

    def __init__(self, folder: Path, earlier: Iterable[Record] = ()) -> None:
        from tensorboardX import SummaryWriter

        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder), flush_secs=10)
        for record in earlier:
            if "score" in record:
                self.client_scored(record)
            elif "client" in record:
                self.client_trained(record)
            else:
                self.send_phase(record)

    def send(self, values: Mapping[str, float], axis: str, at: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, at)

    def close(self) -> None:
        self._writer.close()


class Remote(Tracker):
    """A tracker of a service, which knows the run under an identity and may fail. Subclasses say how to reach it.

    Args:
        identity: that of the run before it was interrupted; None: the run is new.
        config: the config, as nested dicts.
        steps: client steps that the service has been told of.
        observer: is told once if the service fails.
    """

    key: str  # of the section `system`
    remedy: str  # what to do if the service cannot be reached

    def __init__(self, destination: str, folder: Path, identity: str | None, config: Mapping[str, Any], steps: int,
                 observer: RunObserver) -> None:
        self.steps, self._observer, self._failed, self._ended = steps, observer, False, False
        try:
            self.identity = self.connect(destination, folder, identity, config)
        except Exception as error:  # the services' own errors have no common class
            raise InputError(f"system.{self.key}: {destination!r} cannot be reached ({_first_line(error)}). "
                             f"{self.remedy}") from None

    @abc.abstractmethod
    def connect(self, destination: str, folder: Path, identity: str | None, config: Mapping[str, Any]) -> str:
        """Begins the run at the service, or goes on with it, and returns its identity there."""

    @abc.abstractmethod
    def deliver(self, values: Mapping[str, float], axis: str, at: int) -> None:
        """Sends values; may raise."""

    @abc.abstractmethod
    def conclude(self, scores: Mapping[str, float] | None) -> None:
        """Ends the run at the service with its final numbers; None: it did not finish. May raise."""

    def send(self, values: Mapping[str, float], axis: str, at: int) -> None:
        self._try(lambda: self.deliver(values, axis, at))

    def run_ended(self, summary: Record) -> None:
        self._ended = True
        self._try(lambda: self.conclude(dict(_numbers(summary))))

    def close(self) -> None:
        if not self._ended:
            self._try(lambda: self.conclude(None))

    def _try(self, call: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            call()
        except Exception as error:  # see `__init__`
            self._failed = True
            self._observer.note(f"warning: system.{self.key}: {_first_line(error)}. The run goes on without it; its "
                                "folder has all numbers.")


class WandbRun(Remote):
    """A run at Weights & Biases; its files are in the run folder's `wandb`."""

    key, remedy = "wandb", "Set WANDB_API_KEY or run `wandb login`; WANDB_MODE=offline needs neither."

    def connect(self, destination: str, folder: Path, identity: str | None, config: Mapping[str, Any]) -> str:
        import wandb

        self._run = wandb.init(project=destination, name=folder.name, dir=folder, config=dict(config), id=identity,
                               resume="allow", settings=wandb.Settings(silent=True))
        for axis in ("client_steps", "round"):
            self._run.define_metric(axis, hidden=True)
        self._run.define_metric("validation/*", step_metric="round")
        for group in ("loss", "phase"):
            self._run.define_metric(f"{group}/*", step_metric="client_steps")
        return str(self._run.id)

    def deliver(self, values: Mapping[str, float], axis: str, at: int) -> None:
        self._run.log({**values, axis: at})

    def conclude(self, scores: Mapping[str, float] | None) -> None:
        self._run.summary.update(dict(scores or {}))
        self._run.finish(exit_code=1 if scores is None else 0)


class MlflowRun(Remote):
    """A run of an MLflow experiment."""

    key, remedy = "mlflow", "Set MLFLOW_TRACKING_URI to your server, or to sqlite:///mlflow.db for a local file."

    def connect(self, destination: str, folder: Path, identity: str | None, config: Mapping[str, Any]) -> str:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        if identity is not None:
            self._client.update_run(identity, status="RUNNING")
            return identity
        experiment = self._client.get_experiment_by_name(destination)
        number = self._client.create_experiment(destination) if experiment is None else experiment.experiment_id
        run = str(self._client.create_run(number, run_name=folder.name).info.run_id)
        params = [Param(name, str(value)[:500]) for name, value in _leaves(config)]
        for start in range(0, len(params), 100):  # the most that one request may have
            self._client.log_batch(run, params=params[start:start + 100])
        return run

    def deliver(self, values: Mapping[str, float], axis: str, at: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self.identity, name, value, step=at)

    def conclude(self, scores: Mapping[str, float] | None) -> None:
        for name, value in (scores or {}).items():
            self._client.log_metric(self.identity, name, value)
        self._client.set_terminated(self.identity, "FINISHED" if scores is not None else "FAILED")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("section.key", value) of nested dicts."""
    if isinstance(node, Mapping) and node:
        for name, value in node.items():
            yield from _leaves(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, node


def _numbers(summary: Record) -> Iterator[tuple[str, float]]:
    """Yields the final numbers of a run, as ("score_by_task/vqa", 0.5)."""
    for name, value in _leaves(summary):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name.replace(".", "/"), float(value)


def _identity(known: Mapping[str, Any], key: str) -> str | None:
    identity = known.get(key)
    return identity if isinstance(identity, str) else None


def open_services(system: SystemConfig, folder: Path, earlier: Sequence[Record],
                  observer: RunObserver) -> list[Remote]:
    """Returns a tracker for each service that the config asks for.

    Args:
        folder: the run folder, which has config.yaml.
        earlier: records of the run before it was interrupted.
        observer: is told of services that fail.

    Raises:
        InputError: a service cannot be reached.
    """
    steps = sum(record["step"] for record in earlier if "client" in record and "score" not in record)
    path, services = folder / IDENTITIES, list[Remote]()
    known = read_json(path, "Remove it: the services then get a new run") if path.exists() else {}
    for kind in (WandbRun, MlflowRun):
        if destination := getattr(system, kind.key):
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            one = kind(destination, folder, _identity(known, kind.key), config, steps, observer)
            known[kind.key] = one.identity
            services.append(one)
    if services:
        atomic_write(path, json.dumps(known, indent=1) + "\n")
    return services
