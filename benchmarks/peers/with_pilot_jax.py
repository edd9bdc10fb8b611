"""Runs the work of `work.py` in pilot_jax, through the steps of `pilot_jax.runs.simulate` without evaluation.

    PILOT_JAX_CACHE=CACHE python benchmarks/peers/with_pilot_jax.py FOLDER [--chunk 3]

With an empty CACHE all programs are compiled; with that of an earlier run none is. The samples are arrays and not
files, so the image features are computed in every run, where a run of the package would keep them too.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from lora import TARGETS, first_lora, read_settings, report
from work import client_names

from pilot_jax.config import Config
from pilot_jax.data.arrays import ClientData
from pilot_jax.federation.observer import RunObserver
from pilot_jax.federation.rounds import run_round
from pilot_jax.federation.state import Federation
from pilot_jax.federation.strategies import Strategy
from pilot_jax.models.checkpoints.library import leave_out_torch
from pilot_jax.runs import prepare


class LoraAlone(Strategy):
    """FedAvg that starts from the work's LoRA."""

    lora: Any = None  # that of the work

    def initial_adapters(self, key, projector, model, rank, num_tasks):
        return {"text_adapter": self.lora}


class Losses(RunObserver):
    """Takes note of the mean loss of each client and round."""

    def __init__(self) -> None:
        self.by_round: dict[int, list[float]] = {}

    def client_trained(self, record) -> None:
        self.by_round.setdefault(record["round"], []).append(record["loss"])


def configured(folder: Path, chunk: int) -> Config:
    """Returns the config of the work."""
    given = read_settings(folder)
    return Config.model_validate({
        "model": {"path": str(folder / "base"), "lora": {"rank": given["rank"], "alpha": given["alpha"]}},
        "federation": {"rounds": given["rounds"], "local_epochs": 1, "schedule": "single"},
        "train": {"batch_size": given["batch"], "lr_lora_stage1": given["rate"], "weight_decay": given["weight_decay"],
                  "schedule": "constant", "warmup": 0.0},
        "system": {"seed": given["seed"], "client_chunk": chunk, "save_every": "never"}})


def client_data(work: dict[str, np.ndarray], learnt: int, features: np.ndarray) -> tuple[ClientData, ...]:
    """Returns the clients' samples as the package holds them; `features` [K, n, N, D] may be filled later."""
    clients, samples, length = work["input_ids"].shape
    positions = np.broadcast_to(np.arange(length - learnt, length, dtype=np.int32) - 1, (samples, learnt))
    return tuple(ClientData(name, "work", {
        "input_ids": work["input_ids"][k].astype(np.int32), "attention_mask": np.ones((samples, length), np.int32),
        "target_positions": positions, "target_ids": work["input_ids"][k, :, -learnt:].astype(np.int32),
        "target_weights": np.ones((samples, learnt), np.float32), "has_image": np.ones(samples, np.float32),
        "features": features[k]}, {}) for k, name in enumerate(client_names(clients)))


def as_tree(arrays: list[np.ndarray]) -> dict[str, Any]:
    """Returns a LoRA as the package's tree, whose leaves have all layers."""
    by_layer = [arrays[i:i + 2 * len(TARGETS)] for i in range(0, len(arrays), 2 * len(TARGETS))]
    return {"layers": {target: {"a": np.stack([layer[2 * i] for layer in by_layer]),
                                "b": np.stack([layer[2 * i + 1] for layer in by_layer])}
                       for i, target in enumerate(TARGETS)}}


def as_arrays(tree: dict[str, Any]) -> list[np.ndarray]:
    """Returns the inverse of `as_tree`."""
    layers = len(tree["layers"]["q"]["a"])
    return [np.asarray(tree["layers"][target][x][layer]) for layer in range(layers) for target in TARGETS
            for x in ("a", "b")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--chunk", type=int, default=3, help="system.client_chunk")
    args = parser.parse_args()
    leave_out_torch()  # as the command line does
    config = configured(args.folder, args.chunk)
    with np.load(args.folder / "work.npz") as stored:
        work = dict(stored)
    start = first_lora(args.folder)
    prepare.split_cpu_for(config)
    prepare.configure(config)
    model = prepare.load_model(config)
    features = np.zeros((*work["pixels"].shape[:2], model.config.num_image_tokens, model.config.vision.feature_size),
                        np.float32)
    LoraAlone.lora = as_tree(start)
    fed = Federation(LoraAlone(LoraAlone.Params(projector="frozen"), config.federation.schedule), model,
                     client_data(work, read_settings(args.folder)["learnt"], features), ("work",),
                     config.federation, config.train, config.system.seed, config.model.lora.rank)
    state, losses = prepare.initial_state(fed), Losses()
    executor = prepare.Executor(config.system.client_chunk, config.system.steps_at_once)
    executor.compile_ahead(fed, 1, {c: state.population[c].adapters for c in fed.members(1)})
    for row, computed in zip(features, [model.features(pixels) for pixels in work["pixels"]], strict=True):
        row[:] = computed
    began = time.perf_counter()
    while state.round <= config.federation.rounds:
        state, = run_round([fed], [state], executor, [losses])
    last = as_arrays(state.population[0].adapters["text_adapter"])
    report(time.perf_counter() - began, start, last, [float(np.mean(losses.by_round[r])) for r in losses.by_round])


if __name__ == "__main__":
    main()
