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

from pilot_jax import __version__
from pilot_jax.errors import InputError
from pilot_jax.federation.roles import Roles
from pilot_jax.federation.state import ClientState, Population, State, Timings, Trained, row, stack, stored
from pilot_jax.federation.uploads import misfit
from pilot_jax.parallel.processes import is_writer, over_clients, wait
from pilot_jax.runs.checkpoint import over_processes, read_arrays, write_arrays
from pilot_jax.runs.packing import packed, unpacked
from pilot_jax.storage import Store

FORMAT = 2  # of a snapshot; what others wrote is refused by name
COUNTERS = ("round", "phase", "version", "fetched", "client_steps", "bytes_up", "bytes_down", "train_seconds",
            "uploads", "norms", "benched", "quarantined")


class Damaged(Exception):
    """A snapshot that is not as it was written: its number, and what is wrong."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


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
        manifest, server, clients = self._contents(state, changed, where)
        manifest["extra"] = dict(extra)
        for part, arrays in (("server", server), ("clients", clients)):
            if is_writer() or over_processes(arrays):
                write_arrays(aside / part, arrays)
        wait("snapshot's arrays written")
        if is_writer():
            self._finish(aside, path, manifest)
        wait("snapshot done")
        self._where, self._last, self._changed = where, number, set()

    def _contents(self, state: State, changed: list[int],
                  where: Mapping[int, tuple[int, int]]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """(manifest, arrays of the shared scope, arrays of the others) of a state."""
        values: dict[str, list[np.ndarray]] = {}
        partial = state.partial
        unfinished = [] if partial is None else sorted(partial.adapters)
        manifest = {"format": FORMAT, "pilot_jax": __version__} | {name: getattr(state, name) for name in COUNTERS} | {
            "server": packed(state.server, values),
            "clients": {name: {"stage": c.stage, "rounds": c.rounds, "at": where.get(i)}
                        for i, (name, c) in enumerate(zip(self._names, state.population, strict=True))},
            "partial": None if partial is None else {
                "clients": unfinished, "records": [partial.records[c] for c in unfinished],
                "seconds": partial.timings.seconds}}
        server: dict[str, Any] = {"state": {kind: np.concatenate(parts) for kind, parts in values.items()}}
        clients: dict[str, Any] = {}
        for name, members in (("changed", [state.population[c].adapters for c in changed]),
                              ("partial", [partial.adapters[c] for c in unfinished] if partial is not None else [])):
            if members:
                server[name] = self._shared_out([self._roles.select(m, "shared") for m in members])
                # All clients of a phase have the same received subtrees.
                clients[name] = {"local": self._shared_out([self._roles.select(m, "local") for m in members]),
                                 "received": self._roles.select(members[0], "received")}
        return manifest, server, clients

    def _shared_out(self, members: list[dict[str, Any]]) -> dict[str, Any]:
        """[n, …], on the devices of all processes if there are several, so that each writes its own rows; n is then
        rounded up."""
        if jax.process_count() == 1:
            return stack(members)
        assert self._mesh is not None  # several processes always have one
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
            raise Damaged(number, f"{path}: no readable manifest ({error})") from None
        if not isinstance(manifest, dict) or manifest.get("sha256") != _own_sha256(manifest):
            raise Damaged(number, f"{path}: the manifest is not what was written")
        return manifest

    def _needs(self, manifest: dict, number: int) -> set[int]:
        """The snapshots in which the adapters are that one speaks of."""
        return {number} | {c["at"][0] for c in manifest["clients"].values() if c["at"]}

    def _prune(self) -> None:
        wanted = set()
        for number in self._numbers()[-self._keep:]:
            try:
                wanted |= self._needs(self._manifest(number), number)
            except Damaged:  # it may be readable the next time: nothing is removed that it may need
                return
        for path in self.folder.iterdir():
            if path.name.endswith(".partial") or (path.name.isdigit() and int(path.name) not in wanted):
                shutil.rmtree(path, ignore_errors=True)

    def _checked(self, number: int) -> dict:
        """The manifest of a snapshot of which every byte is as it was written.

        Raises:
            InputError: it was written by another version.
        """
        manifest = self._manifest(number)
        if manifest.get("format") != FORMAT:
            raise InputError(f"{self.folder / f'{number:06d}'}: was written by another version of pilot_jax ("
                             f"{manifest.get('pilot_jax', 'before snapshots named it')}; this is {__version__}). Go on "
                             "with that version, or start anew with another --out.")
        for needed in sorted(self._needs(manifest, number)):
            folder = self.folder / f"{needed:06d}"
            for name, digest in self._manifest(needed)["files"].items():
                if not (folder / name).is_file() or _sha256(folder / name) != digest:
                    raise Damaged(needed, f"{folder / name} is not what was written")
        return manifest

    def load(self, initial: State, store: Store | None, warn: Callable[[str], None],
             writing: bool = True) -> tuple[State, dict[str, Any]] | None:
        """(state, extra) of the newest snapshot of which every byte is as it was written, or None if there is none.

        No snapshot is deleted. One with a byte that is not as it was written is set aside, as `<number>.damaged`.

        Args:
            initial: the state at the start, for clients that have not trained.
            warn: is told of snapshots that are damaged.
            writing: whether this process saves from here on; the damaged ones are then set aside.

        Raises:
            InputError: there are snapshots, but none is whole; or they are of another version or another strategy.
        """
        numbers = self._numbers()
        for number in reversed(numbers):
            try:
                found = self._loaded(number, self._checked(number), initial, store)
            except Damaged as error:
                warn(f"warning: {error}. Going back to the snapshot before it.")
                if writing and is_writer():
                    self._set_aside(error.number)
                continue
            except InputError:
                raise
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                raise InputError(f"{self.folder / f'{number:06d}'}: its checksums fit, but this version cannot read it "
                                 f"({type(error).__name__} {error}). Start the run anew, with another --out.") from None
            self._last = max(numbers)
            return found
        if numbers or any(self.folder.glob("*.damaged")):  # also when the last attempt has set them all aside
            raise InputError(f"{self.folder}: none of the snapshots is whole. Start the run anew, with another --out.")
        return None

    def _set_aside(self, number: int) -> None:
        path = self.folder / f"{number:06d}"
        if path.exists():  # an earlier one may be needed by several
            aside = path.with_name(path.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)

    def _loaded(self, number: int, manifest: dict, initial: State,
                store: Store | None) -> tuple[State, dict[str, Any]]:
        """What a whole snapshot holds.

        Raises:
            InputError: it is of other clients or another strategy.
        """
        own = self.folder / f"{number:06d}"
        if set(manifest["clients"]) != set(self._names):
            raise InputError(f"{own}: a snapshot of other clients: {', '.join(manifest['clients'])}. Give the data "
                             "that the run began with.")
        server, clients = read_arrays(own / "server"), read_arrays(own / "clients")
        population = self._population(number, manifest, (server, clients), initial, store)
        partial = manifest["partial"]
        if partial is not None:
            members = {c: _row((server, clients), "partial", k) for k, c in enumerate(partial["clients"])}
            records = dict(zip(partial["clients"], partial["records"], strict=True))
            partial = Trained(members, records, Timings(partial["seconds"]))
        counters: dict[str, Any] = {n: tuple(v) if isinstance(v := manifest[n], list) else v for n in COUNTERS}
        state = dataclasses.replace(
            initial, population=population, partial=partial, **counters,
            server=unpacked(manifest["server"], server.get("state", {}), initial.server))
        return state, manifest["extra"]

    def _population(self, number: int, manifest: dict, arrays: tuple[dict, dict], initial: State,
                    store: Store | None) -> Population:
        """Every client's state: from this snapshot, from the earlier one that has it, or the initial one."""
        population, entries = list(initial.population), [manifest["clients"][name] for name in self._names]
        self._where = {i: tuple(e["at"]) for i, e in enumerate(entries) if e["at"]}
        for needed in sorted({at for at, _ in self._where.values()}):
            folder = self.folder / f"{needed:06d}"
            its = arrays if needed == number else (read_arrays(folder / "server"), read_arrays(folder / "clients"))
            for client, (at, place) in self._where.items():
                if at == needed:
                    adapters = _row(its, "changed", place)
                    if fault := misfit(adapters, initial.population[client].adapters):
                        raise InputError(f"{folder}: what is there of {self._names[client]} {fault}. Was the run of "
                                         "another strategy, or has its class changed? Nothing was removed.")
                    population[client] = stored(store, client, ClientState(
                        adapters, entries[client]["stage"], entries[client]["rounds"]))
        return tuple(population)

    def remove(self) -> None:
        """The run has ended, its results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _row(snapshot: tuple[dict, dict], kind: str, index: int) -> dict[str, Any]:
    """One client's adapters out of a snapshot's arrays (server, clients); a copy, so that these can go. What is empty,
    as the shared scope of `local`, orbax has left out."""
    shared, clients = (part.get(kind, {}) for part in snapshot)
    own = row({**shared, **clients.get("local", {})}, index)
    return {**jax.tree.map(np.array, own), **clients.get("received", {})}
