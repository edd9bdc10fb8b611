"""Writes a run's losses and scores as TensorBoard event files, into its folder `tensorboard`."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pilot_jax.errors import InputError
from pilot_jax.federation.observer import Record, RunObserver
from pilot_jax.federation.state import State

SHOWN = ("loss", "effective_neighbors", "product_gap", "bytes_up", "bytes_down", "seconds")  # keys of a phase's record


def check_installed() -> None:
    """Raises an `InputError` if tensorboardX is not installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise InputError("system.tensorboard: needs tensorboardX, which is not installed (it is in the extra "
                         "'tensorboard'). Run: pip install tensorboardX")


class EventFiles(RunObserver):
    """Writes losses over the run's client steps, and scores over rounds.

    Args:
        earlier: records of the run before it was interrupted; the event files of that time are replaced.
    """

    def __init__(self, folder: Path, earlier: Iterable[Record] = ()) -> None:
        from tensorboardX import SummaryWriter

        shutil.rmtree(folder, ignore_errors=True)
        self._writer, self._steps = SummaryWriter(str(folder), flush_secs=10), 0
        for record in earlier:
            if "score" in record:
                self.client_scored(record)
            elif "client" in record:
                self.client_trained(record)
            else:
                self._phase(record)

    def client_scored(self, record: Record) -> None:
        self._writer.add_scalar(f"validation/{record['client']}", record["score"], record["round"])

    def client_trained(self, record: Record) -> None:
        self._steps += record["step"]
        self._writer.add_scalar(f"loss/{record['client']}", record["loss"], self._steps)

    def phase_ended(self, state: State, record: Record, mixing: Mapping[str, np.ndarray] | None,
                    trained: Sequence[int]) -> None:
        self._phase(record)

    def _phase(self, record: Record) -> None:
        for name in SHOWN if "loss" in record else ():
            if name in record:
                self._writer.add_scalar(f"phase/{name}", record[name], self._steps)

    def close(self) -> None:
        self._writer.close()
