"""Local updates of a cohort, chunk by chunk; also of several federations' cohorts at once.

Federations that train alike (seeds, learning rates) share a program: their clients are trained side by side.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from pilot_jax.data.arrays import ClientData, visiting_order
from pilot_jax.data.features import bring
from pilot_jax.errors import Interrupted
from pilot_jax.federation.client import begin_update, continue_update, finish_update, local_update, peak_rates
from pilot_jax.federation.state import Federation, client_generator, row, stack
from pilot_jax.federation.uploads import sent
from pilot_jax.parallel.processes import here, to_host


@dataclasses.dataclass(frozen=True)
class Work:
    """What a federation wants trained: its clients' adapters, in one phase of one round."""

    fed: Federation
    adapters: Mapping[int, dict]
    round_: int
    stage: str
    label: str
    partial: Trained | None = None  # what an interrupted attempt at this has done


@dataclasses.dataclass(frozen=True)
class Trained:
    adapters: dict[int, dict]
    records: list[dict]  # one per client
    seconds: float
    prepare_seconds: float = 0.0  # spent on making the chunks' inputs, beside the device's work
    waited_seconds: float = 0.0  # of these, how long the device waited
    feature_seconds: float = 0.0  # not in `seconds`: images through the tower


@dataclasses.dataclass(frozen=True)
class _Job:
    """One client of one federation."""

    work: Work
    client: int

    @property
    def data(self) -> ClientData:
        return self.work.fed.clients[self.client]

    @property
    def steps(self) -> int:
        return self.work.fed.steps(self.client, self.work.round_)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Steps `start` to `stop` of a chunk's clients: of all their steps, or of as many as go to the devices at once."""

    members: list[_Job]
    start: int
    stop: int

    @property
    def is_first(self) -> bool:
        return self.start == 0

    @property
    def is_last(self) -> bool:
        return self.stop >= max(job.steps for job in self.members)


def _pieces(groups: list[list[_Job]], steps_max: int, at_once: int | None) -> list[_Piece]:
    size = steps_max if at_once is None else min(at_once, steps_max)
    return [_Piece(members, start, start + size) for members in groups
            for start in range(0, max(job.steps for job in members), size)]


def _chunk_inputs(piece: _Piece, shapes: tuple[int, int], mine: list[bool]) -> dict[str, Any]:
    """Arrays of one piece, padded to len(mine) clients with clients that take no step. Data are read of those that are
    `mine`; the others' are zeros."""
    (n_max, steps_max), jobs, width = shapes, piece.members, len(mine)
    whole = piece.is_first and piece.stop >= steps_max
    rows = n_max if whole else (piece.stop - piece.start) * jobs[0].work.fed.config.train.batch_size
    data = {k: np.zeros((width, rows, *v.shape[1:]), v.dtype) for k, v in jobs[0].data.train.items()}
    orders, reals, steps, rates = [], [], [], []
    for number, job in enumerate(jobs):
        config, own, count = job.work.fed.config, job.data, job.steps
        rng = client_generator(config.system.seed, own.name, job.work.round_, job.work.label)
        order, real = visiting_order(rng, own.size, config.train.batch_size, count)
        spare = ((0, max(piece.stop, steps_max) - count), (0, 0))
        order, real = (np.pad(x, spare)[piece.start:piece.stop] for x in (order, real))
        for name, array in own.train.items() if mine[number] else ():
            if whole:
                data[name][number, :own.size] = array
            else:  # these steps' samples, one after another
                data[name][number] = array[order.ravel()]
        if not whole:
            order = np.arange(order.size).reshape(order.shape)
        orders.append(order)
        reals.append(real)
        steps.append(count)
        rates.append(peak_rates(config.train, job.work.stage))
    idle = width - len(jobs)
    data["attention_mask"][len(jobs):, :, 0] = 1  # idle clients' numbers are finite, if nobody's
    return {
        "data": data,
        "order": np.stack(orders + orders[:1] * idle),
        "real": np.stack(reals + reals[:1] * idle).astype(np.float32),
        "steps": np.asarray(steps + [0] * idle, np.int32),
        "task_index": np.asarray([j.work.fed.task_index(j.client) for j in jobs + jobs[:1] * idle], np.int32),
        "rates": jax.tree.map(np.float32, stack(rates + rates[:1] * idle)),
    }


def chunks(jobs: list[_Job], width: int) -> list[list[_Job]]:
    """`jobs` in groups of at most `width` whose arrays have one shape: one program trains a group."""
    by_shape: dict[tuple[int, ...], list[_Job]] = {}
    for job in jobs:
        train = job.data.train
        by_shape.setdefault((train["input_ids"].shape[1], train["target_ids"].shape[1]), []).append(job)
    return [group[i:i + width] for _, group in sorted(by_shape.items()) for i in range(0, len(group), width)]


def train_together(works: Sequence[Work], progress: Callable[[dict], None],
                   stop: Callable[[], int] = lambda: 0) -> list[Trained]:
    """Local updates of the clients of all `works`, chunk by chunk. The works' phases must be equal.

    Raises:
        Interrupted: after a chunk, `stop` gave a signal's number; with what is done.
    """
    first = works[0]
    phase = first.fed.phase(first.stage)
    if any(w.fed.phase(w.stage) != phase for w in works[1:]):
        raise ValueError("federations that train together must train alike")
    jobs = [_Job(w, client) for w in works for client in sorted(w.adapters)
            if w.partial is None or client not in w.partial.adapters]
    feds = [w.fed for w in works]
    shapes = (max(c.size for f in feds for c in f.clients),
              max(f.full_steps(c) for f in feds for c in range(len(f.clients))))
    mesh, base = first.fed.mesh, first.fed.model.base
    devices = 1 if mesh is None else mesh.shape["clients"]
    everyone = sum(len(f.clients) for f in feds)
    width = devices * min(first.fed.config.system.client_chunk, -(-everyone // devices))
    received = phase.roles.names(scope="received")
    mine = here(mesh, width)
    apart = len(works) > 1 and bool(received)  # what was received differs from federation to federation
    trained: dict[int, dict[int, dict]] = {id(w): {} for w in works}
    records: dict[int, dict[int, dict]] = {id(w): {} for w in works}
    seconds, done, prepared, waited = dict.fromkeys(trained, 0.0), 0, 0.0, 0.0
    seeing, began = 0.0, time.perf_counter()
    for w in works:
        if w.partial is not None:
            trained[id(w)], seconds[id(w)] = dict(w.partial.adapters), w.partial.seconds
            records[id(w)] = {c: r for c, r in zip(sorted(w.partial.adapters), w.partial.records, strict=True)}
            for client in w.partial.adapters:
                w.adapters[client]  # what it was sent counts as sent

    def prepare(piece: _Piece) -> tuple[list[dict], tuple[dict, dict], dict, float]:
        """The members' adapters (with a chunk's first piece), the arrays, and the seconds it took; may read files."""
        start, adapters = time.perf_counter(), list[dict]()
        own: dict[str, Any] = {}
        given: dict[str, Any] = {}
        if piece.is_first:
            adapters = [j.work.adapters[j.client] for j in piece.members]
            padded = adapters + adapters[:1] * (width - len(adapters))
            own = stack([{n: t for n, t in a.items() if n not in received} for a in padded])
            given = (stack([{n: a[n] for n in received} for a in padded]) if apart
                     else {n: padded[0][n] for n in received})
        inputs = _chunk_inputs(piece, shapes, mine)
        return adapters, (own, given), inputs, time.perf_counter() - start

    def submit(piece: _Piece) -> Future:
        """`prepare` on its way, once the images that it needs have been seen: the devices do that, here."""
        nonlocal seeing
        start = time.perf_counter()
        if piece.is_first:
            bring([job.data.train["features"] for job in piece.members], width)
        seeing += time.perf_counter() - start
        return reader.submit(prepare, piece)

    def result() -> list[Trained]:
        return [Trained(trained[id(w)], [records[id(w)][c] for c in sorted(trained[id(w)])], seconds[id(w)], prepared,
                        waited, seeing) for w in works]

    pieces = _pieces(chunks(jobs, width), shapes[1], first.fed.config.system.steps_at_once)
    if not pieces:
        return result()
    how = {"mesh": mesh, "own_received": apart}
    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as reader:  # the next piece's, while the device works
        upcoming = submit(pieces[0])
        began += seeing
        for number, piece in enumerate(pieces):
            start = time.perf_counter()
            its_adapters, its_trees, inputs, took = upcoming.result()
            prepared, waited = prepared + took, waited + time.perf_counter() - start
            if number + 1 < len(pieces):
                before = seeing
                upcoming = submit(pieces[number + 1])
                began += seeing - before
            if piece.is_first:
                members, adapters, (own, given) = piece.members, its_adapters, its_trees
            if piece.is_first and piece.is_last:
                new, metrics = local_update(phase, base, own, given, **inputs, **how)
            else:
                arrays = base, own, given, *inputs.values()
                if piece.is_first:
                    carry = begin_update(phase, *arrays, **how)
                carry = continue_update(phase, carry, np.int32(piece.start), *arrays, **how)
                if not piece.is_last:
                    continue
                new, metrics = finish_update(phase, carry, *arrays, **how)
            new, metrics = to_host(new), to_host(metrics)
            taken = time.perf_counter() - began
            began += taken
            for k, job in enumerate(members):
                key = id(job.work)
                trained[key][job.client], told = sent(job.work.fed, job.client, job.work.round_, job.work.label,
                                                      adapters[k], {**adapters[k], **row(new, k)})
                records[key][job.client] = {
                    "round": job.work.round_, "phase": job.work.label, "client": job.data.name, "task": job.data.task,
                    "step": int(inputs["steps"][k])} | {name: float(value[k]) for name, value in metrics.items()} | told
                seconds[key] += taken / len(members)
            done += int(inputs["steps"].sum())
            progress({"kind": "chunk", "round": first.round_, "phase": first.label, "steps": done,
                      "of": sum(len(w.adapters) for w in works), "clients": sum(len(t) for t in trained.values()),
                      "loss": float(np.mean([records[id(j.work)][j.client]["last_loss"] for j in members]))})
            if number + 1 < len(pieces) and (signum := stop()):
                raise Interrupted(signum, result())
    return result()


def train_phase(fed: Federation, adapters: Mapping[int, dict], round_: int, stage: str, label: str,
                progress: Callable[[dict], None]) -> tuple[dict[int, dict], list[dict]]:
    """Local updates of the clients in `adapters`, chunk by chunk. Returns their new adapters and metric records."""
    done = train_together([Work(fed, adapters, round_, stage, label)], progress)[0]
    return done.adapters, done.records
