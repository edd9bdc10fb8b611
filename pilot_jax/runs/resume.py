"""Snapshots from which an interrupted run goes on: `checkpoints/resume/<number>`, written after every phase.

A snapshot has the adapters of the clients that have trained since the previous snapshot, and names the snapshots that
have the others: even in a large population, only the cohort is written. Arrays are orbax checkpoints; `manifest.json`
has everything else, and the checksums. A snapshot is written under another name and then renamed, so that it exists
completely or not at all.
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
from pilot_jax.parallel.processes import is_writer, over_clients, wait_for_all
from pilot_jax.runs.checkpoint import over_processes, read_arrays, write_arrays
from pilot_jax.runs.packing import packed, unpacked
from pilot_jax.storage import Store

FORMAT = 2  # of a snapshot; snapshots of another format are refused
COUNTERS = ("round", "phase", "version", "fetched", "client_steps", "bytes_up", "bytes_down", "train_seconds",
            "uploads", "norms", "benched", "quarantined")


class Damaged(Exception):
    """Raised if a snapshot's bytes are not those that were written; `number` is that of the snapshot."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_sha256(manifest: dict) -> str:
    """Returns the checksum of a manifest without its own entry "sha256"."""
    return hashlib.sha256(json.dumps({k: v for k, v in manifest.items() if k != "sha256"}).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")


def _synced(folder: Path) -> None:
    """Flushes a folder to disk (fsync), so that no file is renamed but empty after a power cut."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Snapshots:
    """The snapshots of one run.

    Args:
        keep: how many of the newest snapshots are complete and usable; older ones are removed.
        mesh: the devices of all processes, if several processes train.
    """

    def __init__(self, folder: Path, names: Iterable[str], roles: Roles, keep: int = 2,
                 mesh: jax.sharding.Mesh | None = None) -> None:
        self.folder, self._names, self._roles, self._keep, self._mesh = folder, list(names), roles, keep, mesh
        self._where: dict[int, tuple[int, int]] = {}  # by client: the snapshot and row with its newest adapters
        self._changed: set[int] = set()
        self._last = 0

    def note(self, clients: Iterable[int]) -> None:
        """Records that these clients have trained; the next snapshot will have their adapters."""
        self._changed |= set(clients)

    def save(self, state: State, extra: Mapping[str, Any]) -> None:
        """Writes a snapshot, every process its part. `extra` is any JSON object; `load` returns it.

        Raises:
            OSError: the snapshot could not be written; earlier snapshots are unchanged.
        """
        number, changed = self._last + 1, sorted(self._changed)
        path, aside = self.folder / f"{number:06d}", self.folder / f"{number:06d}.partial"
        where = self._where | {client: (number, at) for at, client in enumerate(changed)}
        if is_writer():
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        wait_for_all("snapshot begun")
        manifest, server, clients = self._contents(state, changed, where)
        manifest["extra"] = dict(extra)
        for part, arrays in (("server", server), ("clients", clients)):
            if is_writer() or over_processes(arrays):
                write_arrays(aside / part, arrays)
        wait_for_all("snapshot's arrays written")
        if is_writer():
            self._finish(aside, path, manifest)
        wait_for_all("snapshot done")
        self._where, self._last, self._changed = where, number, set()

    def _contents(self, state: State, changed: list[int],
                  where: Mapping[int, tuple[int, int]]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Returns (manifest, shared subtrees and server state, all other subtrees) of a state."""
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
                server[name] = self._stacked([self._roles.select(m, "shared") for m in members])
                # The received subtrees are the same for all clients of a phase, so they are written once.
                clients[name] = {"local": self._stacked([self._roles.select(m, "local") for m in members]),
                                 "received": self._roles.select(members[0], "received")}
        return manifest, server, clients

    def _stacked(self, members: list[dict[str, Any]]) -> dict[str, Any]:
        """Stacks n clients' adapters, [n, …]. With several processes the result is spread over the devices of all of
        them, so that each writes its own rows, and n is rounded up to a multiple of the mesh's `clients` axis."""
        if jax.process_count() == 1:
            return stack(members)
        assert self._mesh is not None  # several processes always have one
        return over_clients(stack(members + members[:1] * (-len(members) % self._mesh.shape["clients"])), self._mesh)

    def _finish(self, aside: Path, path: Path, manifest: dict[str, Any]) -> None:
        """Writes the checksums and the manifest, and gives the snapshot its final name."""
        manifest["files"] = {str(p.relative_to(aside)): _sha256(p) for p in _files(aside)}
        manifest = json.loads(json.dumps(manifest))  # turns tuples into lists, as reading the file will
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
            raise Damaged(number, f"{path}: the checksum of manifest.json is wrong")
        return manifest

    def _needs(self, manifest: dict, number: int) -> set[int]:
        """Returns the numbers of all snapshots that have adapters of the snapshot `number`, itself included."""
        return {number} | {c["at"][0] for c in manifest["clients"].values() if c["at"]}

    def _prune(self) -> None:
        wanted = set()
        for number in self._numbers()[-self._keep:]:
            try:
                wanted |= self._needs(self._manifest(number), number)
            except Damaged:  # it may be readable the next time, so nothing that it may need is removed
                return
        for path in self.folder.iterdir():
            if path.name.endswith(".partial") or (path.name.isdigit() and int(path.name) not in wanted):
                shutil.rmtree(path, ignore_errors=True)

    def _checked(self, number: int) -> dict:
        """Returns the manifest of a snapshot after checking every file's checksum.

        Raises:
            Damaged: a checksum is wrong.
            InputError: the snapshot was written by another version.
        """
        manifest = self._manifest(number)
        if manifest.get("format") != FORMAT:
            raise InputError(f"{self.folder / f'{number:06d}'}: was written by another version of pilot_jax ("
                             f"{manifest.get('pilot_jax', 'before snapshots named it')}; this is {__version__}). Use "
                             "that version, or start a new run with another --out.")
        for needed in sorted(self._needs(manifest, number)):
            folder = self.folder / f"{needed:06d}"
            for name, digest in self._manifest(needed)["files"].items():
                if not (folder / name).is_file() or _sha256(folder / name) != digest:
                    raise Damaged(needed, f"{folder / name} is missing or its checksum is wrong")
        return manifest

    def load(self, initial: State, store: Store | None, warn: Callable[[str], None],
             writing: bool = True) -> tuple[State, dict[str, Any]] | None:
        """Returns (state, extra) of the newest undamaged snapshot, or None if there is no snapshot.

        No snapshot is deleted. A damaged one, whose checksums are wrong, is renamed to `<number>.damaged`.

        Args:
            initial: the state before the first round, for clients that have not trained.
            warn: called with a warning for each damaged snapshot.
            writing: whether the run will go on; if not, damaged snapshots are not renamed.

        Raises:
            InputError: all snapshots are damaged, or they are of another version or another strategy.
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
                raise InputError(f"{self.folder / f'{number:06d}'}: its checksums are right, but it cannot be read ("
                                 f"{type(error).__name__} {error}). Start a new run, with another --out.") from None
            self._last = max(numbers)
            return found
        if numbers or any(self.folder.glob("*.damaged")):  # an earlier attempt may have renamed all of them
            raise InputError(f"{self.folder}: none of the snapshots is whole. Start a new run, with another --out.")
        return None

    def _set_aside(self, number: int) -> None:
        path = self.folder / f"{number:06d}"
        if path.exists():  # several snapshots may need the same earlier one, which is then already renamed
            aside = path.with_name(path.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)

    def _loaded(self, number: int, manifest: dict, initial: State,
                store: Store | None) -> tuple[State, dict[str, Any]]:
        """Returns (state, extra) of an undamaged snapshot.

        Raises:
            InputError: the snapshot has other clients or another strategy.
        """
        own = self.folder / f"{number:06d}"
        if set(manifest["clients"]) != set(self._names):
            raise InputError(f"{own}: a snapshot of other clients ({', '.join(manifest['clients'])}). Use the data "
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
        """Returns every client's state, from this snapshot, from an earlier one, or the initial state."""
        population, entries = list(initial.population), [manifest["clients"][name] for name in self._names]
        self._where = {i: tuple(e["at"]) for i, e in enumerate(entries) if e["at"]}
        for needed in sorted({at for at, _ in self._where.values()}):
            folder = self.folder / f"{needed:06d}"
            its = arrays if needed == number else (read_arrays(folder / "server"), read_arrays(folder / "clients"))
            for client, (at, place) in self._where.items():
                if at == needed:
                    adapters = _row(its, "changed", place)
                    if fault := misfit(adapters, initial.population[client].adapters):
                        raise InputError(f"{folder}: the snapshot of {self._names[client]} {fault}. Was the run of "
                                         "another strategy, or has its class changed? Nothing was removed.")
                    population[client] = stored(store, client, ClientState(
                        adapters, entries[client]["stage"], entries[client]["rounds"]))
        return tuple(population)

    def remove(self) -> None:
        """Removes all snapshots; called once the results of the run are written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _row(snapshot: tuple[dict, dict], kind: str, index: int) -> dict[str, Any]:
    """Returns a copy of one client's adapters from a snapshot's arrays (server, clients).

    Orbax leaves empty dicts out, such as the shared subtrees of the strategy `local`, so they may be missing."""
    shared, clients = (part.get(kind, {}) for part in snapshot)
    own = row({**shared, **clients.get("local", {})}, index)
    return {**jax.tree.map(np.array, own), **clients.get("received", {})}
