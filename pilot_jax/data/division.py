"""Divides samples among clients and, where data have no splits, into splits; and checks what each client then has."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from pilot_jax.config import DataConfig
from pilot_jax.data.hold_out import held_out
from pilot_jax.data.llava.sample import SPLITS, Sample
from pilot_jax.errors import InputError
from pilot_jax.words import counted


def divided(samples: list[Sample], data: DataConfig, clients: int | None, seed: int) -> list[Sample]:
    """Returns the samples with the client and the split that each has in a run.

    Args:
        clients: the value of `federation.clients`.
        seed: the value of `system.seed`.

    Raises:
        InputError: see `partition` and `held_out`.
    """
    return held_out(partition(samples, data.partition, clients, data.dirichlet_alpha, seed), data.hold_out)


def check_client_count(data: DataConfig, wanted: int | None, found: int) -> None:
    """Refuses a number of clients in the config, `federation.clients`, that is not that of data which name them.

    Raises:
        InputError: the numbers differ.
    """
    if data.partition == "given" and wanted is not None and wanted != found:
        raise InputError(f"federation.clients: {wanted}, but data.path {data.path} has "
                         f"{counted(found, 'client')}. Remove the key or set data.partition.")


def client_faults(samples: Sequence[Sample]) -> list[str]:
    """Returns messages about clients that have several tasks, or no training sample; there must be none of them."""
    first: dict[str, dict[str, str]] = {}  # place of the first sample, by client and task
    for sample in samples:
        first.setdefault(sample.client, {}).setdefault(sample.task, sample.source)
    splits = splits_of(samples)
    faults = []
    for client, tasks in sorted(first.items()):
        if len(tasks) > 1:
            places = ", ".join(f"{task} at {tasks[task]}" for task in sorted(tasks))
            faults.append(f"client {client!r} has samples of several tasks ({', '.join(sorted(tasks))}), first "
                          f"{places}. Pilot "
                          "gives each client one task: split it into one client per task. A sample without the key "
                          "task has that of its file's name.")
        if "train" not in splits[client]:
            faults.append(f"client {client!r} has no training sample. Add some, or remove the client from data.path.")
    return faults


def splits_of(samples: Sequence[Sample]) -> dict[str, set[str]]:
    """Returns the splits of which each client has samples."""
    out: dict[str, set[str]] = {}
    for sample in samples:
        out.setdefault(sample.client, set()).add(sample.split)
    return out


def missing_splits(splits: Mapping[str, Collection[str]], every: int) -> list[str]:
    """Returns warnings about held-out data that are missing, without which a run has no scores.

    Args:
        splits: the splits of which each client has samples.
        every: the value of `eval.every`.
    """
    out = []
    for split, what in (("test", "the run ends without scores"),
                        ("validation", f"eval.every: {every} scores nothing")):
        without = sorted(client for client, has in splits.items() if split not in has)
        if not without or (split == "validation" and not every):
            continue
        verb = f"has no {split} samples and gets" if len(without) == 1 else f"have no {split} samples and get"
        remedy = f"Name the split of samples, or set data.hold_out.{split}, such as 0.1"
        if len(without) == len(splits):
            out.append(f"no client has {split} samples, so {what}. {remedy}")
        else:
            out.append(f"{len(without)} of {counted(len(splits), 'client')} {verb} no {split} score "
                       f"(first: {without[0]}). {remedy}")
    return out


def partition(samples: list[Sample], how: str, clients: int | None, alpha: float, seed: int) -> list[Sample]:
    """Returns the samples with the key `client` set according to `data.partition`.

    Args:
        how: "given": every sample names its client. "equal", "dirichlet": each task's samples of each split are
            shuffled and divided among clients / T clients, in equal or Dirichlet(alpha) shares of at least one sample.
        clients: the number of clients, a multiple of the number of tasks T; unused with "given".

    Raises:
        InputError: a sample names no client, `clients` is not a multiple of T, or a task has too few samples.
    """
    if how == "given":
        for sample in samples:
            if not sample.client:
                raise InputError(f"{sample.source}: client: missing. Name the sample's client, or set data.partition: "
                                 "equal.")
        return samples
    tasks = sorted({s.task for s in samples})
    if clients is None or clients % len(tasks):
        raise InputError(f"federation.clients: {clients} must be a multiple of the number of tasks, "
                         f"{len(tasks)} ({', '.join(tasks)}), with data.partition: {how}.")
    per_task = clients // len(tasks)
    out = []
    for index, task in enumerate(tasks):
        rng = np.random.default_rng([seed, index])
        equal = np.full(per_task, 1.0 / per_task)
        shares = equal if how == "equal" else rng.dirichlet(np.full(per_task, alpha))
        for split in SPLITS:
            of_split = [s for s in samples if s.task == task and s.split == split]
            if of_split:
                # Evaluation splits are divided evenly, because a score of only a few samples says little.
                out += _divided(of_split, shares if split == "train" else equal, rng)
    return out


def _divided(samples: Sequence[Sample], shares: np.ndarray, rng: np.random.Generator) -> list[Sample]:
    """Returns a task's samples, shuffled and divided among clients `<task>_<number>` in the given shares.

    Raises:
        InputError: there are fewer samples than clients.
    """
    task, clients = samples[0].task, len(shares)
    if len(samples) < clients:
        raise InputError(f"data.path: task {task!r} has {len(samples)} {samples[0].split} samples for "
                         f"{counted(clients, 'client')}. Lower federation.clients, or add samples.")
    counts = 1 + np.floor(shares * (len(samples) - clients)).astype(int)
    counts[np.argmax(shares)] += len(samples) - counts.sum()
    order = rng.permutation(len(samples))
    numbers = np.repeat(np.arange(clients), counts)
    return [dataclasses.replace(samples[i], client=f"{task}_{k}") for i, k in zip(order, numbers, strict=True)]
