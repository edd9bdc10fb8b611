"""Division of the clients of a phase into chunks, which train side by side, and of a chunk's steps into pieces."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from pilot_jax.data.arrays import ClientData
from pilot_jax.federation.state import Federation


@dataclasses.dataclass(frozen=True)
class Job:
    """One client to train."""

    work: int  # index of the `Work` that it belongs to
    fed: Federation
    client: int
    steps: int

    @property
    def data(self) -> ClientData:
        return self.fed.clients[self.client]

    @property
    def shape(self) -> tuple[int, int]:
        """(L, A) of the client's arrays."""
        return self.data.train["input_ids"].shape[1], self.data.train["target_ids"].shape[1]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Steps `start` to `stop` of a chunk's clients: all their steps, or as many as go to the devices at once."""

    members: list[Job]
    start: int
    stop: int

    @property
    def is_first(self) -> bool:
        return self.start == 0

    @property
    def is_last(self) -> bool:
        return self.stop >= max(job.steps for job in self.members)

    @property
    def largest(self) -> Job:
        """The member to whose shape the others' arrays are padded."""
        return _largest(self.members)


def chunk_width(client_chunk: int, clients: int, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None) -> int:
    """Returns how many clients train side by side: `client_chunk` on each row of the mesh, but not more than exist."""
    rows = 1 if mesh is None else mesh.shape["clients"]
    return rows * min(client_chunk, -(-clients // rows))


def chunks(jobs: Sequence[Job], width: int) -> list[list[Job]]:
    """Returns `jobs` in groups of at most `width` clients: one program trains a group, its arrays padded to one shape.

    A group takes as many steps as its longest client, so clients of a shape are taken in the order of their steps, and
    the longest groups come first, which leaves the shortest ones for the end. Clients that fill no group of their shape
    join such clients of a longer shape where there is room, if that takes less time.

    After some of the groups, the groups of the other jobs are the same, so that a resumed phase is the same too.
    """
    by_shape: dict[tuple[int, int], list[Job]] = {}
    for job in jobs:
        by_shape.setdefault(job.shape, []).append(job)
    out, partial = [], list[list[Job]]()
    for _, group in sorted(by_shape.items(), reverse=True):
        group.sort(key=lambda job: -job.steps)
        groups = [group[i:i + width] for i in range(0, len(group), width)]
        if len(groups[-1]) < width:
            joined = next((other for other in partial if _is_faster_joined(groups[-1], other, width)), None)
            if joined is None:
                partial.append(groups[-1])
            else:
                joined += groups.pop()
        out.append(groups)
    return [group for groups in reversed(out) for group in groups]


def _largest(members: Sequence[Job]) -> Job:
    return max(members, key=lambda job: job.shape)


def _is_faster_joined(group: list[Job], other: list[Job], width: int) -> bool:
    """Whether `group` fits into `other`, of a longer shape, and the two take less time together than apart.

    A step's time is taken to be proportional to the length L, whoever of the chunk's clients still trains."""
    (length, answers), (longer, more) = _largest(group).shape, _largest(other).shape
    own, others = (max(job.steps for job in jobs) for jobs in (group, other))
    return (len(group) + len(other) <= width and answers <= more
            and max(own, others) * longer < own * length + others * longer)
