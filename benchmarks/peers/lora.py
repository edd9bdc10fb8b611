"""What a system needs beside torch: the first LoRA as a list of arrays, and the line that it prints for `run.py`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
Arrays = list[np.ndarray]  # A and B of each layer's targets: layer 0's q_a, q_b, k_a, …, then layer 1's


def read_settings(folder: str | Path) -> dict:
    """Returns the numbers of the work."""
    return json.loads((Path(folder) / "work.json").read_text(encoding="utf-8"))


def first_lora(folder: str | Path) -> Arrays:
    """Returns the LoRA that all clients start with."""
    settings, out = read_settings(folder), []
    with np.load(Path(folder) / "work.npz") as work:
        factors = {target: work[f"{target}_a"] for target in TARGETS}
    for layer in range(len(factors["q"])):
        for target in TARGETS:
            a = factors[target][layer]
            out += [a, np.zeros((settings["d_out"][target], len(a)), np.float32)]
    return out


def report(seconds: float, first: Arrays, last: Arrays, losses: list[float]) -> None:
    """Prints a system's results: seconds of training, norms of LoRA and of its change, mean losses of two rounds."""
    print(json.dumps({"seconds_training": seconds, "lora_norm": norm(last),
                      "change_norm": norm([b - a for a, b in zip(first, last, strict=True)]),
                      "loss_first_round": losses[0], "loss_last_round": losses[-1]}), flush=True)


def norm(arrays: Arrays) -> float:
    """Returns the L2 norm of all arrays together."""
    return float(np.sqrt(sum(np.sum(np.square(a, dtype=np.float64)) for a in arrays)))
