"""The clients of a federation whose data are not in one place: who takes part, with which task and how many samples."""

from __future__ import annotations

import base64
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pilot_jax.config import read_yaml
from pilot_jax.data.arrays import ClientData
from pilot_jax.data.llava.sample import Sample, checked_name
from pilot_jax.errors import InputError
from pilot_jax.words import counted

MOST_BYTES = 100_000_000  # largest size of a roster's file


@dataclasses.dataclass(frozen=True)
class Member:
    """One client, as all others know it."""

    task: str
    samples: int  # n_k, number of training samples
    tokens: int = 0  # L of the longest training sample, rounded up as in `training_length`; 0: not known
    answer_tokens: int = 0  # A, the same of supervised tokens
    key: str = ""  # public key of its node, as in a file `*.pub` of OpenSSH


@dataclasses.dataclass(frozen=True)
class Roster:
    """All clients by name, of which the one called `own`, or none of them, has its data here."""

    members: Mapping[str, Member]
    own: str | None = None

    @property
    def names(self) -> list[str]:
        return sorted(self.members)

    @property
    def tasks(self) -> list[str]:
        return sorted({member.task for member in self.members.values()})

    @property
    def lengths(self) -> dict[str, tuple[int, int]]:
        """(L, A) of each client of which they are known."""
        return {name: (m.tokens, m.answer_tokens) for name, m in self.members.items() if m.tokens and m.answer_tokens}

    def mine(self, samples: Sequence[Sample]) -> list[Sample]:
        """Returns the samples of the own client; none without one.

        Raises:
            InputError: the client's training samples are not those that it has in the roster.
        """
        if self.own is None:
            return []
        member, found = self.members[self.own], [s for s in samples if s.client == self.own]
        train = [s for s in found if s.split == "train"]
        if {s.task for s in train} - {member.task} or len(train) != member.samples:
            raise InputError(f"clients.yaml: {self.own} has {member.samples} training samples of {member.task}, but "
                             f"data.path has {len(train)} of {', '.join(sorted({s.task for s in train})) or 'none'}. "
                             "Correct one of the two.")
        return found

    def completed(self, clients: Sequence[ClientData]) -> list[ClientData]:
        """Returns all clients in the order of their names. Those whose data are elsewhere have n_k empty samples; on a
        node at most as many as the own client, because arrays have room for the largest of all."""
        here = {client.name: client for client in clients}
        most = max((client.size for client in clients), default=None)
        return [here.get(name) or ClientData(name, member.task, {"input_ids": np.zeros(
                    (member.samples if most is None else min(member.samples, most), 0), np.int32)}, {})
                for name, member in sorted(self.members.items())]

    def text(self) -> str:
        """Returns the roster as YAML."""
        rows = {name: {k: v for k, v in dataclasses.asdict(m).items() if v} for name, m in self.members.items()}
        return yaml.safe_dump(rows, sort_keys=True, allow_unicode=True)


def roster_of(samples: Sequence[Sample], lengths: Mapping[str, tuple[int, int]] | None = None) -> Roster:
    """Returns the roster of the clients that have samples; each has one task. `lengths`: (L, A) of each client."""
    counts = Counter(s.client for s in samples if s.split == "train")
    known = lengths or {}
    return Roster({s.client: Member(s.task, counts[s.client], *known.get(s.client, (0, 0))) for s in samples})


def read_roster(path: Path, own: str | None = None) -> Roster:
    """Returns the roster in a file; `own`: the client whose data are here.

    Raises:
        InputError: the file does not exist, is not a roster, or does not have the own client.
    """
    remedy = "Write for each client `NAME: {task: TASK, samples: N}`, and its node's public key as `key`."
    try:
        members = _members(read_yaml(path, "list of clients", MOST_BYTES), str(path))
    except (ValueError, TypeError, AttributeError, InputError) as error:
        why = " ".join(str(error).removeprefix(f"{path}: ").split())
        raise InputError(f"{path}: not a list of clients ({why}). {remedy}") from None
    if not members:
        raise InputError(f"{path}: no clients. {remedy}")
    if own is not None and own not in members:
        raise InputError(f"client: {own!r} is not in {path.name}. Known: {', '.join(sorted(members))}.")
    return Roster(members, own)


def _members(raw: Any, source: str) -> dict[str, Member]:
    """Returns the members of a roster, from its YAML.

    Raises:
        ValueError, TypeError, AttributeError, InputError: it is not that of a roster.
    """
    members = {name: Member(**entry) for name, entry in raw.items()}
    for name, m in members.items():
        if not (isinstance(name, str) and name and isinstance(m.task, str) and isinstance(m.key, str)
                and all(type(n) is int and n >= 0 for n in (m.samples, m.tokens, m.answer_tokens)) and m.samples):
            raise ValueError(f"{name}: a task, a number of samples above 0, numbers of tokens and a key are expected")
        checked_name(source, "client", name)
        checked_name(f"{source}: {name}", "task", m.task)
    _check_keys({name: m.key for name, m in members.items() if m.key}, len(members))
    return members


def _check_keys(keys: Mapping[str, str], clients: int) -> None:
    """Raises a ValueError for a key that cannot be one, and unless all clients have keys of their own or none has."""
    if keys and len(keys) < clients:
        raise ValueError(f"{counted(clients, 'client')}, of which {len(keys)} with a key, and then no other can take "
                         "part: give all one, or none")
    owner: dict[str, str] = {}
    for name, key in keys.items():
        kind, text, *_ = [*key.strip().split(" "), ""]  # and a comment, with which the same key may differ
        if not key.strip().isprintable() or not _is_public_key(kind, text):
            raise ValueError(f"{name}: key: expected the line of a file `*.pub` of OpenSSH, such as "
                             "ecdsa-sha2-nistp384 AAAA…")
        if (other := owner.setdefault(text, name)) != name:
            raise ValueError(f"{name}: key: it is that of {other}")


def _is_public_key(kind: str, text: str) -> bool:
    """Whether a text is that of a public key of this kind: base64 of parts, each after its length, of which the first
    is the kind (RFC 4253, section 6.6)."""
    try:
        rest = base64.b64decode(text, validate=True)
    except ValueError:
        return False
    parts = list[bytes]()
    while rest:
        end = 4 + int.from_bytes(rest[:4], "big")
        if end > len(rest):
            return False
        parts.append(rest[4:end])
        rest = rest[end:]
    return len(parts) > 1 and parts[0] == kind.encode()
