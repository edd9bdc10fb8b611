"""What a run needs to go on where it stopped: `checkpoints/resume/<number>`, written after every phase.

A snapshot holds the adapters of the clients that have trained since the one before, and says in which snapshot the
others are: of a large population only the cohort is written. Arrays are orbax's; `manifest.json` has everything else,
and the checksums. A snapshot is written aside and renamed, so that one is there as a whole or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pilot_jax.errors import InputError
from pilot_jax.federation.executor import Trained
from pilot_jax.federation.roles import Roles
from pilot_jax.federation.state import ClientState, State, row, stack, stored
from pilot_jax.federation.uploads import misfit
from pilot_jax.parallel.processes import is_writer, over_clients, wait
from pilot_jax.runs.checkpoint import over_processes, read_arrays, write_arrays
from pilot_jax.storage import Store

COUNTERS = ("round", "phase", "client_steps", "bytes_up", "bytes_down", "train_seconds", "uploads", "norms", "benched",
            "quarantined")


class Damaged(Exception):
    """A snapshot that cannot be used, and why."""


def packed(tree: Any, arrays: dict[str, list[np.ndarray]]) -> Any:
    """What JSON can hold of a tree of dicts, tuples, lists, numbers, strings and arrays; the arrays' entries go to
    `arrays`, by dtype. See `unpacked`."""
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, Mapping):
        return {"dict": [[key, packed(value, arrays)] for key, value in tree.items()]}
    if hasattr(tree, "_fields"):
        return {"named": {field: packed(getattr(tree, field), arrays) for field in tree._fields}}
    if isinstance(tree, tuple | list):
        return {type(tree).__name__: [packed(value, arrays) for value in tree]}
    array = np.asarray(tree)
    before = arrays.setdefault(array.dtype.name, [])
    place = {"array": array.dtype.name, "shape": list(array.shape), "at": sum(a.size for a in before)}
    before.append(array.ravel())
    return place


def unpacked(node: Any, arrays: Mapping[str, np.ndarray], like: Any = None) -> Any:
    """The inverse of `packed`. `like`: a tree that has the named tuples (optax states) at the same places."""
    if not isinstance(node, dict):
        return node
    if "dict" in node:
        known = like if isinstance(like, Mapping) else {}
        return {key: unpacked(value, arrays, known.get(key)) for key, value in node["dict"]}
    if "named" in node:
        if tuple(node["named"]) != getattr(like, "_fields", None):
            raise Damaged(f"the server's state has {list(node['named'])} where {type(like).__name__} was expected")
        return type(like)(**{f: unpacked(value, arrays, getattr(like, f)) for f, value in node["named"].items()})
    if "array" in node:
        start, shape = node["at"], tuple(node["shape"])
        return arrays[node["array"]][start:start + int(np.prod(shape, dtype=np.int64))].reshape(shape)
    (kind, values), = node.items()
    own = like if isinstance(like, tuple | list) else ()
    return (tuple if kind == "tuple" else list)(
        unpacked(value, arrays, own[i] if i < len(own) else None) for i, value in enumerate(values))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_sha256(manifest: dict) -> str:
    return hashlib.sha256(json.dumps({k: v for k, v in manifest.items() if k != "sha256"}).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")


def _synced(folder: Path) -> None:
    """Has the system write what it holds of a folder, so that a power cut leaves no renamed but empty files."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Snapshots:
    """The snapshots of one run. `keep`: how many it can go back to; `mesh`: on which several processes train."""

    def __init__(self, folder: Path, names: Iterable[str], roles: Roles, keep: int = 2,
                 mesh: jax.sharding.Mesh | None = None) -> None:
        self.folder, self._names, self._roles, self._keep, self._mesh = folder, list(names), roles, keep, mesh
        self._where: dict[int, tuple[int, int]] = {}  # client: snapshot and row
        self._changed: set[int] = set()
        self._last = 0

    def note(self, clients: Iterable[int]) -> None:
        """These have trained; the next snapshot holds them."""
        self._changed |= set(clients)

    def save(self, state: State, extra: Mapping[str, Any]) -> None:
        """Write a snapshot, every process its part. `extra`: whatever else JSON can hold, given back by `load`.

        Raises:
            OSError: it could not be written; those before are as they were.
        """
        number, changed = self._last + 1, sorted(self._changed)
        path, aside = self.folder / f"{number:06d}", self.folder / f"{number:06d}.partial"
        where = self._where | {client: (number, at) for at, client in enumerate(changed)}
        if is_writer():
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        wait("snapshot begun")
        values: dict[str, list[np.ndarray]] = {}
        manifest = {name: getattr(state, name) for name in COUNTERS} | {
            "server": packed(state.server, values),
            "clients": {name: {"stage": c.stage, "rounds": c.rounds, "at": where.get(i)}
                        for i, (name, c) in enumerate(zip(self._names, state.population, strict=True))},
            "partial": None if state.partial is None else {
                "clients": sorted(state.partial.adapters), "records": state.partial.records,
                "seconds": state.partial.seconds},
            "extra": dict(extra)}
        server: dict[str, Any] = {"state": {kind: np.concatenate(parts) for kind, parts in values.items()}}
        clients: dict[str, Any] = {}
        for name, members in (("changed", [state.population[c].adapters for c in changed]),
                              ("partial", [] if state.partial is None else
                               [state.partial.adapters[c] for c in manifest["partial"]["clients"]])):
            if members:
                server[name] = self._shared_out([self._roles.select(m, "shared") for m in members])
                # All clients of a phase have the same received subtrees.
                clients[name] = {"local": self._shared_out([self._roles.select(m, "local") for m in members]),
                                 "received": self._roles.select(members[0], "received")}
        for part, arrays in (("server", server), ("clients", clients)):
            if is_writer() or over_processes(arrays):
                write_arrays(aside / part, arrays)
        wait("snapshot's arrays written")
        if is_writer():
            self._finish(aside, path, manifest)
        wait("snapshot done")
        self._where, self._last, self._changed = where, number, set()

    def _shared_out(self, members: list[dict[str, Any]]) -> dict[str, Any]:
        """[n, …], on the devices of all processes if there are several, so that each writes its own rows; n is then
        rounded up."""
        if jax.process_count() == 1:
            return stack(members)
        return over_clients(stack(members + members[:1] * (-len(members) % self._mesh.shape["clients"])), self._mesh)

    def _finish(self, aside: Path, path: Path, manifest: dict[str, Any]) -> None:
        """Check sums, the manifest, and the snapshot in its place."""
        manifest["files"] = {str(p.relative_to(aside)): _sha256(p) for p in _files(aside)}
        manifest = json.loads(json.dumps(manifest))  # as it will be read: tuples are lists
        manifest["sha256"] = _own_sha256(manifest)
        (aside / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        _synced(aside)
        aside.rename(path)
        self._prune()

    def _numbers(self) -> list[int]:
        return sorted(int(p.name) for p in self.folder.glob("*") if p.name.isdigit())

    def _manifest(self, number: int) -> dict:
        path = self.folder / f"{number:06d}"
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise Damaged(f"{path}: no readable manifest ({error})") from None
        if not isinstance(manifest, dict) or manifest.get("sha256") != _own_sha256(manifest):
            raise Damaged(f"{path}: the manifest is not what was written")
        return manifest

    def _needs(self, manifest: dict, number: int) -> set[int]:
        """The snapshots in which the adapters are that one speaks of."""
        return {number} | {c["at"][0] for c in manifest["clients"].values() if c["at"]}

    def _prune(self) -> None:
        wanted = set()
        for number in self._numbers()[-self._keep:]:
            try:
                wanted |= self._needs(self._manifest(number), number)
            except Damaged:  # `load` has said so, or will
                continue
        for path in self.folder.iterdir():
            if not path.name.isdigit() or int(path.name) not in wanted:
                shutil.rmtree(path, ignore_errors=True)

    def _checked(self, number: int) -> dict:
        """The manifest of a snapshot of which every byte is as it was written."""
        manifest = self._manifest(number)
        for needed in sorted(self._needs(manifest, number)):
            folder = self.folder / f"{needed:06d}"
            for name, digest in self._manifest(needed)["files"].items():
                if not (folder / name).is_file() or _sha256(folder / name) != digest:
                    raise Damaged(f"{folder / name} is not what was written")
        return manifest

    def load(self, initial: State, store: Store | None, warn: Callable[[str], None],
             writing: bool = True) -> tuple[State, dict[str, Any]] | None:
        """(state, extra) of the newest snapshot that is whole, or None if there is none.

        Args:
            initial: the state at the start, for clients that have not trained.
            warn: is told of snapshots that are damaged.
            writing: whether this process saves from here on; the damaged ones are then removed.

        Raises:
            InputError: there are snapshots, but none is whole.
        """
        numbers = self._numbers()
        for number in reversed(numbers):
            try:
                try:
                    found = self._loaded(number, initial, store)
                except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                    raise Damaged(f"{self.folder / f'{number:06d}'}: {type(error).__name__} {error}") from None
            except Damaged as error:
                warn(f"warning: {error}. Going back to the snapshot before it.")
                if writing:
                    shutil.rmtree(self.folder / f"{number:06d}", ignore_errors=True)
                continue
            self._last = number
            return found
        if numbers:
            raise InputError(f"{self.folder}: none of the {len(numbers)} snapshots is whole. Start the run anew, with "
                             "another --out.")
        return None

    def _loaded(self, number: int, initial: State, store: Store | None) -> tuple[State, dict[str, Any]]:
        manifest = self._checked(number)
        if set(manifest["clients"]) != set(self._names):
            raise Damaged(f"{self.folder}: a snapshot of other clients: {', '.join(manifest['clients'])}")
        own = self.folder / f"{number:06d}"
        population, entries = list(initial.population), [manifest["clients"][name] for name in self._names]
        server, clients = read_arrays(own / "server"), read_arrays(own / "clients")
        self._where = {i: tuple(e["at"]) for i, e in enumerate(entries) if e["at"]}
        for needed in sorted({at for at, _ in self._where.values()}):
            folder = self.folder / f"{needed:06d}"
            its = (server, clients) if needed == number else (
                read_arrays(folder / "server"), read_arrays(folder / "clients"))
            for client, (at, place) in self._where.items():
                if at == needed:
                    adapters = _row(its, "changed", place)
                    if fault := misfit(adapters, initial.population[client].adapters):
                        raise Damaged(f"{folder}: what is there of {self._names[client]} {fault}")
                    population[client] = stored(store, client, ClientState(
                        adapters, entries[client]["stage"], entries[client]["rounds"]))
        partial = manifest["partial"]
        if partial is not None:
            members = {c: _row((server, clients), "partial", k) for k, c in enumerate(partial["clients"])}
            partial = Trained(members, partial["records"], partial["seconds"])
        counters: dict[str, Any] = {n: tuple(v) if isinstance(v := manifest[n], list) else v for n in COUNTERS}
        state = dataclasses.replace(
            initial, population=tuple(population), partial=partial, **counters,
            server=unpacked(manifest["server"], server.get("state", {}), initial.server))
        return state, manifest["extra"]

    def remove(self) -> None:
        """The run has ended, its results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _row(snapshot: tuple[dict, dict], kind: str, index: int) -> dict[str, Any]:
    """One client's adapters out of a snapshot's arrays (server, clients); a copy, so that these can go. What is empty,
    as the shared scope of `local`, orbax has left out."""
    shared, clients = (part.get(kind, {}) for part in snapshot)
    own = row({**shared, **clients.get("local", {})}, index)
    return {**jax.tree.map(np.array, own), **clients.get("received", {})}
