"""Local training of a cohort chunk by chunk, or of the cohorts of several federations together.

Federations whose phases are equal but for seeds and learning rates share a program, and their clients train side by
side. While the device trains one chunk, a thread prepares the arrays of the next.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from pilot_jax.data.arrays import halved_order, visiting_order
from pilot_jax.data.features import compute_features
from pilot_jax.errors import Interrupted
from pilot_jax.federation.chunks import Job, Piece, chunk_width, chunks
from pilot_jax.federation.client import Adapters, Carry, ClientBatch, advance, finish, local_update, start
from pilot_jax.federation.observer import RunObserver
from pilot_jax.federation.phases import peak_rates
from pilot_jax.federation.randomness import client_generator
from pilot_jax.federation.roles import Tree
from pilot_jax.federation.state import Federation, Timings, Trained, row, stack
from pilot_jax.federation.uploads import after_upload
from pilot_jax.models.lora import DROPOUT
from pilot_jax.parallel.processes import is_on_this_process, to_host


@dataclasses.dataclass(frozen=True)
class Work:
    """The clients of one federation to train, with their adapters, in one phase of one round."""

    fed: Federation
    adapters: Mapping[int, dict[str, Tree]]
    round: int
    stage: str
    label: str
    partial: Trained | None = None  # results of an interrupted attempt at the same phase


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """A piece's inputs. `before`, `adapters`: the clients' adapters one by one and stacked, in a first piece."""

    before: list[dict[str, Tree]]
    adapters: Adapters | None
    batch: ClientBatch
    seconds: float


class _Phase:
    """One phase of one or several federations during its training."""

    def __init__(self, works: Sequence[Work], client_chunk: int, steps_at_once: int | None) -> None:
        first, self.works = works[0], works
        self.spec = first.fed.phase(first.stage)
        if any(work.fed.phase(work.stage) != self.spec for work in works[1:]):
            raise ValueError("federations that train together must have equal phases")
        feds = [work.fed for work in works]
        self.base, self.mesh = first.fed.model.base, first.fed.mesh
        self.width = chunk_width(client_chunk, sum(len(f.clients) for f in feds), self.mesh)
        # Arrays have room for the largest client of all, so that all chunks have one shape.
        self.samples = max(c.size for f in feds for c in f.clients)
        self.steps = max(f.full_steps(c) for f in feds for c in range(len(f.clients)))
        self.steps_at_once = self.steps if steps_at_once is None else min(steps_at_once, self.steps)
        self.on_this_process = is_on_this_process(self.mesh, self.width)
        partial = [work.partial or Trained({}, {}) for work in works]
        self.adapters = [dict(done.adapters) for done in partial]
        self.records = [dict(done.records) for done in partial]
        self.seconds = [done.timings.seconds for done in partial]

    @property
    def jobs(self) -> list[Job]:
        """The clients that are not trained yet."""
        return [Job(number, work.fed, client, work.fed.steps(client, work.round))
                for number, work in enumerate(self.works) for client in sorted(work.adapters)
                if client not in self.adapters[number]]

    def pieces(self) -> list[Piece]:
        """Returns the pieces in the order of their training."""
        size = self.steps_at_once
        return [Piece(members, first, first + size) for members in chunks(self.jobs, self.width)
                for first in range(0, max(job.steps for job in members), size)]

    def load(self, piece: Piece) -> _Loaded:
        """Returns the inputs of a piece; may read files."""
        began, before, adapters = time.perf_counter(), list[dict[str, Tree]](), None
        if piece.is_first:
            before = [self.works[job.work].adapters[job.client] for job in piece.members]
            adapters = self._stacked(before)
        return _Loaded(before, adapters, self._batch(piece), time.perf_counter() - began)

    def compile_ahead(self) -> None:
        """Starts to compile the programs of this phase in a thread, from shapes alone."""
        if self.steps_at_once < self.steps:
            return
        for piece in {piece.largest.shape: piece for piece in self.pieces()}.values():
            before = [self.works[job.work].adapters[job.client] for job in piece.members]
            shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._stacked(before))
            local_update.compile_ahead(self.spec, self.base, *shape.divided(self.spec.received),
                                       self._batch_shapes(piece), mesh=self.mesh)

    def _batch_shapes(self, piece: Piece) -> ClientBatch:
        """Returns the shapes of what `_batch` returns for a whole phase; no features are read."""
        train, width = piece.members[0].fed.train, self.width

        def shape(*sizes: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((width, *sizes), dtype)

        data = {name: shape(self.samples, *v.shape[1:], dtype=v.dtype)
                for name, v in piece.largest.data.train.items()}
        if self.spec.lora_dropout:
            data[DROPOUT] = shape(self.samples, 2, dtype=np.uint32)
        order = self.steps, train.batch_size
        return ClientBatch(data, shape(*order, dtype=np.int32), shape(*order), shape(dtype=np.int32),
                           shape(dtype=np.int32), {name: shape() for name in peak_rates(train, self.spec.stage)})

    def _stacked(self, members: list[dict[str, Tree]]) -> Adapters:
        """Returns the members' adapters side by side; the first is repeated where members are fewer than the width."""
        padded = members + members[:1] * (self.width - len(members))
        # All clients of one federation have the same received subtrees.
        common = self.spec.received if len(self.works) == 1 else ()
        return Adapters(stack([{n: t for n, t in one.items() if n not in common} for one in padded]),
                        {n: padded[0][n] for n in common})

    def _batch(self, piece: Piece) -> ClientBatch:
        """Returns the arrays of one piece, padded to the width with clients that take no step. Only the data of clients
        on this process's devices are read; the data of the others are zeros."""
        whole = piece.is_first and piece.stop >= self.steps
        jobs, padding = piece.members, self.width - len(piece.members)
        train = jobs[0].fed.train
        rows = self.samples if whole else (piece.stop - piece.start) * train.batch_size
        data = {k: np.zeros((self.width, rows, *v.shape[1:]), v.dtype)
                for k, v in self._arrays(piece.largest).items()}
        data["attention_mask"][len(jobs):, :, 0] = 1  # so that padding clients give finite numbers
        orders, reals = [], []
        for number, job in enumerate(jobs):
            order, real = self._visits(job, piece)
            for name, array in self._arrays(job).items() if self.on_this_process[number] else ():
                columns: tuple[Any, ...] = tuple(map(slice, array.shape[1:]))  # of a shorter shape: the rest are zeros
                if whole:
                    data[name][number, :job.data.size, *columns] = array
                else:  # the samples of these steps, one after another
                    data[name][number, :, *columns] = array[order.ravel()]
            orders.append(order if whole else np.arange(order.size).reshape(order.shape))
            reals.append(real)
        rates = [peak_rates(job.fed.train_of(job.client), self.spec.stage) for job in jobs]
        return ClientBatch(
            data, np.stack(orders + orders[:1] * padding), np.stack(reals + reals[:1] * padding).astype(np.float32),
            np.asarray([job.steps for job in jobs] + [0] * padding, np.int32),
            np.asarray([job.fed.task_index(job.client) for job in jobs + jobs[:1] * padding], np.int32),
            jax.tree.map(np.float32, stack(rates + rates[:1] * padding)))

    def _arrays(self, job: Job) -> dict[str, Any]:
        """Returns a client's training arrays, leaves [n, …], with the keys of dropout if there is any."""
        if not self.spec.lora_dropout:
            return dict(job.data.train)
        work = self.works[job.work]
        rng = client_generator(job.fed.seed, job.data.name, work.round, f"{work.label} dropout")
        return {**job.data.train, DROPOUT: rng.integers(2**32, size=(job.data.size, 2), dtype=np.uint32)}

    def _visits(self, job: Job, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        """Returns the samples that a client visits in a piece: rows and whether they are real, [steps, B]."""
        work = self.works[job.work]
        rng = client_generator(job.fed.seed, job.data.name, work.round, work.label)
        visit = halved_order if self.spec.rule.halves else visiting_order
        size = job.fed.train_of(job.client).batch_size
        visits = visit(rng, job.data.size, size, job.steps)
        parts = 2 if self.spec.rule.halves else 1  # of a batch; each is padded to the size that it has for all clients
        spare = ((0, max(piece.stop, self.steps) - job.steps), (0, 0), (0, (job.fed.train.batch_size - size) // parts))
        order, real = (np.pad(x.reshape(len(x), parts, -1), spare)[piece.start:piece.stop].reshape(
            -1, job.fed.train.batch_size) for x in visits)
        return order, real

    def run(self, piece: Piece, loaded: _Loaded, carry: Carry | None) -> tuple[Carry | None, tuple[Any, Any] | None]:
        """Trains a piece. Returns (None, (adapters, metrics)) for a chunk's last piece, else (carry, None)."""
        if piece.is_first and piece.is_last:
            assert loaded.adapters is not None
            return None, to_host(local_update(self.spec, self.base, *loaded.adapters.divided(self.spec.received),
                                              loaded.batch, mesh=self.mesh))
        if piece.is_first:
            assert loaded.adapters is not None
            carry = start(self.spec, loaded.adapters, loaded.batch, mesh=self.mesh)
        assert carry is not None
        carry = advance(self.spec, self.base, carry, loaded.batch, np.int32(piece.start), mesh=self.mesh)
        return (None, to_host(finish(self.spec, carry, mesh=self.mesh))) if piece.is_last else (carry, None)

    def collect(self, members: list[Job], before: list[dict[str, Tree]], after: Tree, metrics: Mapping[str, Any],
                seconds: float) -> None:
        """Splits the results of a chunk, leaves [k, …], by client, and records them."""
        for k, job in enumerate(members):
            work = self.works[job.work]
            self.adapters[job.work][job.client], upload = after_upload(
                job.fed, job.client, work.round, work.stage, work.label, before[k],
                {**before[k], **row(after, k)})
            self.records[job.work][job.client] = {
                "round": work.round, "phase": work.label, "client": job.data.name, "task": job.data.task,
                "step": job.steps} | {name: float(value[k]) for name, value in metrics.items()} | upload
            self.seconds[job.work] += seconds / len(members)

    def progress(self, members: list[Job], steps: int) -> dict[str, Any]:
        """Returns the record for observers after a chunk; `steps`: client steps of the phase so far."""
        losses = [self.records[job.work][job.client]["last_loss"] for job in members]
        return {"round": self.works[0].round, "phase": self.works[0].label, "steps": steps,
                "of": sum(len(work.adapters) for work in self.works),
                "clients": sum(len(done) for done in self.adapters), "loss": float(np.mean(losses))}


@dataclasses.dataclass(frozen=True)
class Executor:
    """Trains phases on this process's devices, or on those of all processes."""

    client_chunk: int = 3  # clients trained at once on each row of the mesh
    steps_at_once: int | None = None  # steps whose samples are on the devices at once; None: a whole phase's

    def compile_ahead(self, fed: Federation, round_: int, adapters: Mapping[int, dict[str, Tree]]) -> None:
        """Starts to compile the programs of a round in a thread, in the order of its phases.

        Args:
            adapters: those of the clients that take part, or others of the same shapes.
        """
        for stage in dict.fromkeys(fed.strategy.stages(True, round_)):
            _Phase([Work(fed, adapters, round_, stage, stage)], self.client_chunk, self.steps_at_once).compile_ahead()

    def train(self, works: Sequence[Work], observer: RunObserver | None = None) -> list[Trained]:
        """Trains the clients of all `works`, whose phases must be equal.

        Raises:
            Interrupted: the observer requested it after a chunk; `partial` has the results of each work so far.
        """
        observer = observer or RunObserver()
        phase = _Phase(works, self.client_chunk, self.steps_at_once)
        pieces, clock = phase.pieces(), _Clock()
        carry: Carry | None = None
        before, steps = list[dict[str, Tree]](), 0
        with ThreadPoolExecutor(1, thread_name_prefix="prepare") as reader:
            upcoming = clock.submit(reader, phase, pieces[0]) if pieces else None
            for number, piece in enumerate(pieces):
                assert upcoming is not None
                loaded = clock.result(upcoming)
                if number + 1 < len(pieces):
                    upcoming = clock.submit(reader, phase, pieces[number + 1])
                before = loaded.before if piece.is_first else before
                carry, done = phase.run(piece, loaded, carry)
                if done is None:
                    continue
                phase.collect(piece.members, before, *done, clock.lap())
                steps += sum(job.steps for job in piece.members)
                observer.chunk_trained(phase.progress(piece.members, steps))
                if number + 1 < len(pieces) and (signum := observer.stop_requested()):
                    raise Interrupted(signum, _results(phase, clock))
        return _results(phase, clock)


def _results(phase: _Phase, clock: _Clock) -> list[Trained]:
    return [Trained(adapters, {c: records[c] for c in sorted(records)},
                    Timings(seconds, clock.prepared, clock.waited, clock.features))
            for adapters, records, seconds in zip(phase.adapters, phase.records, phase.seconds, strict=True)]


class _Clock:
    """Measures the seconds of a phase: training, waiting for inputs, computing image features."""

    def __init__(self) -> None:
        self.prepared = self.waited = self.features = 0.0
        self._began = time.perf_counter()

    def submit(self, reader: ThreadPoolExecutor, phase: _Phase, piece: Piece) -> Future[_Loaded]:
        """Computes the image features of a piece on the devices, then starts `phase.load(piece)` in a thread."""
        start = time.perf_counter()
        if piece.is_first:
            compute_features([job.data.train["features"] for job in piece.members], phase.width)
        taken = time.perf_counter() - start
        self.features += taken
        self._began += taken
        return reader.submit(phase.load, piece)

    def result(self, upcoming: Future[_Loaded]) -> _Loaded:
        start = time.perf_counter()
        loaded = upcoming.result()
        self.prepared += loaded.seconds
        self.waited += time.perf_counter() - start
        return loaded

    def lap(self) -> float:
        """Returns the seconds since the last lap, without those for image features."""
        now = time.perf_counter()
        taken, self._began = now - self._began, now
        return taken
