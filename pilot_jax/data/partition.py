"""Who holds which samples."""

from __future__ import annotations

import dataclasses

import numpy as np

from pilot_jax.data.llava import Sample
from pilot_jax.errors import InputError


def partition(samples: list[Sample], how: str, clients: int | None, alpha: float, seed: int) -> list[Sample]:
    """The samples with `client` filled in, as `data.partition` asks.

    given: as the data say (every sample needs `client`). equal, dirichlet: each task's samples of each split are
    shuffled and dealt to clients/T clients, in equal or Dirichlet(alpha) shares of at least one sample.

    Raises:
        InputError: a sample without client, or clients that do not divide among the tasks.
    """
    if how == "given":
        for sample in samples:
            if not sample.client:
                raise InputError(f"{sample.source}: client: missing. Name it, or set data.partition: equal.")
        return samples
    tasks = sorted({s.task for s in samples})
    if clients is None or clients % len(tasks):
        raise InputError(f"federation.clients: {clients} must be a multiple of the {len(tasks)} tasks "
                         f"({', '.join(tasks)}) with data.partition: {how}.")
    per_task = clients // len(tasks)
    out = []
    for index, task in enumerate(tasks):
        rng = np.random.default_rng([seed, index])
        shares = np.full(per_task, 1.0 / per_task) if how == "equal" else rng.dirichlet(np.full(per_task, alpha))
        for split in ("train", "validation", "test"):
            mine = [s for s in samples if s.task == task and s.split == split]
            if not mine:
                continue
            if len(mine) < per_task:
                raise InputError(f"data.path: task {task!r} has {len(mine)} {split} samples for {per_task} clients.")
            # Evaluation splits are dealt evenly: a score from three samples says nothing.
            split_shares = shares if split == "train" else np.full(per_task, 1.0 / per_task)
            counts = 1 + np.floor(split_shares * (len(mine) - per_task)).astype(int)
            counts[np.argmax(split_shares)] += len(mine) - counts.sum()
            order = rng.permutation(len(mine))
            owner = np.repeat(np.arange(per_task), counts)
            out += [dataclasses.replace(mine[i], client=f"{task}_{k}") for i, k in zip(order, owner, strict=True)]
    return out
