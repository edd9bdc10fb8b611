"""Computes the numbers of `summary.json`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pilot_jax import __version__
from pilot_jax.data.arrays import ClientData
from pilot_jax.evaluation.finetune import Finetuned, after_finetuning
from pilot_jax.evaluation.personalised import Evaluation, evaluate
from pilot_jax.evaluation.scores import final_scores, score_keys, score_record
from pilot_jax.federation.privacy import epsilon
from pilot_jax.federation.state import ClientState, State
from pilot_jax.runs.checkpoint import adapters_sha256


@dataclasses.dataclass
class Clocks:
    """Seconds of a run, earlier attempts included: in total, of all compilation, and of compilation in training."""

    wall: float = 0.0
    compile: float = 0.0
    train_compile: float = 0.0


def versions() -> dict[str, str]:
    """Returns the versions and the device that decide whether a resumed run can agree bit for bit."""
    device = jax.devices()[0]
    return {"jax": jax.__version__, "device": device.device_kind, "numpy": np.__version__}


def data_sha256(clients: Sequence[ClientData]) -> str:
    """Returns a SHA-256 of the clients' names, tasks and training tokens; a resumed run must have the same one."""
    digest = hashlib.sha256()
    for client in clients:
        digest.update(json.dumps([client.name, client.task, client.size]).encode())
        digest.update(np.ascontiguousarray(client.train["input_ids"]).tobytes())
    return digest.hexdigest()


def summarise(evaluation: Evaluation, state: State, tuned: Finetuned | None) -> dict[str, Any]:
    """Returns what a trained run has reached: scores and bytes. The test split is answered here.

    Args:
        state: after the last round.
        tuned: the results of fine-tuning from there; None without it.
    """
    fed, clients = evaluation.fed, evaluation.clients
    scores = score_record(evaluation, final_scores([evaluation], [state], [tuned])[0])
    scores |= score_keys(evaluation, "score_base", evaluate(evaluation, None))
    state = after_finetuning(fed, state, tuned)
    return {
        "strategy": fed.strategy.name, "seed": fed.seed, "rounds": state.round - 1,
        "clients": [c.name for c in clients], "tasks": list(fed.tasks),
        "task_by_client": {c.name: c.task for c in clients}, **scores,
        "bytes_up": state.bytes_up, "bytes_down": state.bytes_down, "client_steps": state.client_steps,
        "quarantined": state.quarantined,
        # ε of the client with the most uploads; None without differential privacy.
        "epsilon": epsilon(fed.noise_multiplier, max(state.uploads), fed.settings.privacy.delta)
        if fed.noise_multiplier else None,
        "versions": {"pilot_jax": __version__} | versions(),
        "adapters_sha256": adapters_sha256(fed.names, state.population),
    }


def speed(steps: int, training: float, total: float) -> float | None:
    """Returns steps per second of training; None if waits for compilation leave less than a fiftieth of the total.

    The clocks of both are not exact enough to divide by so small a difference.
    """
    return steps / training if training > 0.02 * total and training > 0 else None


def costs(evaluation: Evaluation, state: State, clocks: Clocks) -> dict[str, Any]:
    """Returns what a run has cost: seconds and memory."""
    training = state.train_seconds - clocks.train_compile
    return {
        # Without compilation, which has a key of its own and would hide the speed of a long run.
        "client_steps_per_second": speed(state.client_steps, training, state.train_seconds),
        "wall_seconds": clocks.wall, "compile_seconds": clocks.compile, **_memory(evaluation, state)}


def peak_memory() -> int:
    """Returns the largest number of bytes that the device has used so far; on CPU, that the process has."""
    device = jax.local_devices()[0].memory_stats() or {}
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(device.get("peak_bytes_in_use", host))


def _memory(evaluation: Evaluation, state: State) -> dict[str, Any]:
    """Returns the peak of the memory, and the bytes that the run's parts take of it, in memory or on the devices."""
    fed = evaluation.fed
    features = {id(source): source for source in (getattr(c.features, "source", None) for c in evaluation.clients)
                if source is not None}
    tokens = sum(array.nbytes for c in evaluation.clients for array in c.train.values()
                 if isinstance(array, np.ndarray))
    adapters = {id(leaf): leaf.nbytes for one in state.population if isinstance(one, ClientState)
                for leaf in jax.tree.leaves(one.adapters)}  # clients share some leaves
    return {"peak_memory_bytes": peak_memory(), "memory_bytes": {
        "base": sum(shard.data.nbytes for leaf in jax.tree.leaves(fed.model.base) for shard in leaf.addressable_shards),
        "features": sum(source.bytes_in_memory for source in features.values()), "tokens": tokens,
        "adapters": sum(adapters.values())}}
