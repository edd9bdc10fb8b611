"""A run's losses and scores as TensorBoard event files, in its `tensorboard` folder."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pilot_jax.errors import InputError


def check_installed() -> None:
    if importlib.util.find_spec("tensorboardX") is None:
        raise InputError("system.tensorboard: needs the extra 'tensorboard'. Run: pip install "
                         "'pilot-jax[tensorboard]'")


class EventFiles:
    """Called with the records that `metrics.jsonl` gets. Losses are over the run's client steps, scores over rounds."""

    def __init__(self, folder: Path, earlier: Iterable[dict[str, Any]] = ()) -> None:
        """earlier: records of the run before it was interrupted; files of then are replaced."""
        from tensorboardX import SummaryWriter

        shutil.rmtree(folder, ignore_errors=True)
        self._writer, self._steps = SummaryWriter(str(folder), flush_secs=10), 0
        for record in earlier:
            self(record)

    def __call__(self, record: dict[str, Any]) -> None:
        scalar = self._writer.add_scalar
        if "score" in record:
            scalar(f"validation/{record['client']}", record["score"], record["round"])
        elif "client" in record:
            self._steps += record["step"]
            scalar(f"loss/{record['client']}", record["loss"], self._steps)
        elif "loss" in record:
            for name in ("loss", "effective_neighbors", "product_gap", "bytes_up", "bytes_down", "seconds"):
                if name in record:
                    scalar(f"phase/{name}", record[name], self._steps)

    def close(self) -> None:
        self._writer.close()
