"""Snapshots from which an interrupted run goes on: `checkpoints/resume/<number>`, written after every phase.

Snapshots form as many chains as are kept, and take turns in them: with two, the odd numbers and the even ones. A
snapshot has the adapters of the clients that have trained since the previous snapshot of its chain, and names the
snapshots of the chain that have the others. So only the cohorts of the last phases are written, however large the
population, and no damaged file spoils two of the snapshots that are kept.

Arrays are orbax checkpoints; `manifest.json` has everything else, and the checksums. A snapshot is written under
another name and then renamed, so that it exists completely or not at all. Older ones are removed once it has been read
again.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pilot_jax.errors import InputError
from pilot_jax.federation.roles import Roles
from pilot_jax.federation.state import ClientState, Population, State, Timings, Trained, row, stack, stored
from pilot_jax.federation.uploads import misfit
from pilot_jax.parallel.processes import is_writer, over_clients, wait_for_all
from pilot_jax.runs.checkpoint import over_processes, read_arrays, write_arrays
from pilot_jax.runs.packing import packed, unpacked
from pilot_jax.runs.snapshot_files import Damaged, SnapshotFolder
from pilot_jax.storage import Store

COUNTERS = ("round", "phase", "version", "fetched", "client_steps", "bytes_up", "bytes_down", "train_seconds",
            "uploads", "norms", "benched", "quarantined")


@dataclasses.dataclass
class _Chain:
    """What the next snapshot of a chain must know of the earlier ones."""

    where: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)  # by client: snapshot and row
    changed: set[int] = dataclasses.field(default_factory=set)  # clients that have trained since its last snapshot


class Snapshots(SnapshotFolder):
    """The snapshots of one run.

    Args:
        keep: how many of the newest snapshots are kept, no two of which share a file; older ones are removed.
        mesh: the devices of all processes, if several processes train.
    """

    def __init__(self, folder: Path, names: Iterable[str], roles: Roles, keep: int = 2,
                 mesh: jax.sharding.Mesh | None = None) -> None:
        super().__init__(folder, keep)
        self._names, self._roles, self._mesh = list(names), roles, mesh
        self._chains = [_Chain() for _ in range(keep)]
        self._last = 0

    def note(self, clients: Iterable[int]) -> None:
        """Records that these clients have trained; the next snapshots will have their adapters."""
        for chain in self._chains:
            chain.changed |= set(clients)

    def save(self, state: State, extra: Mapping[str, Any]) -> None:
        """Writes a snapshot, every process its part. `extra` is any JSON object; `load` returns it.

        Raises:
            OSError: the snapshot could not be written, or cannot be read again; earlier snapshots are unchanged.
        """
        number = self._last + 1
        chain = self._chains[number % self.keep]
        changed = sorted(chain.changed)
        aside = self.path(number).with_suffix(".partial")
        where = chain.where | {client: (number, at) for at, client in enumerate(changed)}
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
            self.seal(aside, manifest)
        wait_for_all("snapshot done")
        chain.where, chain.changed, self._last = where, set(), number

    def _contents(self, state: State, changed: list[int],
                  where: Mapping[int, tuple[int, int]]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Returns (manifest, shared subtrees and server state, all other subtrees) of a state."""
        values: dict[str, list[np.ndarray]] = {}
        partial = state.partial
        unfinished = [] if partial is None else sorted(partial.adapters)
        manifest = {name: getattr(state, name) for name in COUNTERS} | {
            "server": packed(state.server, values),
            "clients": {name: {"stage": c.stage, "rounds": c.rounds, "at": where.get(i)}
                        for i, (name, c) in enumerate(zip(self._names, state.population, strict=True))},
            "partial": None if partial is None else {
                "clients": unfinished, "records": [partial.records[c] for c in unfinished],
                "seconds": partial.timings.seconds}}
        server: dict[str, Any] = {"state": {kind: np.concatenate(parts) for kind, parts in values.items()}}
        clients: dict[str, Any] = {}
        for name, members in (("changed", {c: state.population[c].adapters for c in changed}),
                              ("partial", {c: partial.adapters[c] for c in unfinished} if partial is not None else {})):
            if members:
                trees = list(members.values())
                server[name] = self._stacked([self._roles.select(m, "shared") for m in trees])
                # Clients of the same version of the server have the same received subtrees, so these are written once.
                received = {_version(state.fetched, c): self._roles.select(m, "received") for c, m in members.items()}
                clients[name] = {"local": self._stacked([self._roles.select(m, "local") for m in trees]),
                                 "received": received}
        return manifest, server, clients

    def _stacked(self, members: list[dict[str, Any]]) -> dict[str, Any]:
        """Stacks n clients' adapters, [n, …]. With several processes the result is spread over the devices of all of
        them, so that each writes its own rows, and n is rounded up to a multiple of the mesh's `clients` axis."""
        if jax.process_count() == 1:
            return stack(members)
        assert self._mesh is not None  # several processes always have one
        return over_clients(stack(members + members[:1] * (-len(members) % self._mesh.shape["clients"])), self._mesh)

    def load(self, initial: State, store: Store | None, warn: Callable[[str], None],
             writing: bool = True) -> tuple[State, dict[str, Any]] | None:
        """Returns (state, extra) of the newest undamaged snapshot, or None if there is no snapshot.

        No snapshot is deleted. If an earlier one can be used, a damaged one, whose checksums are wrong, is renamed to
        `<number>.damaged`.

        Args:
            initial: the state before the first round, for clients that have not trained.
            warn: called with a warning for each damaged snapshot.
            writing: whether the run will go on; if not, damaged snapshots are not renamed.

        Raises:
            InputError: all snapshots are damaged, or they are of another version or another strategy.
            OSError: a snapshot cannot be read now.
        """
        numbers, damaged = self.numbers(), list[Damaged]()
        for number in reversed(numbers):
            try:
                found = self._loaded(number, self.verify(number), initial, store)
            except Damaged as error:
                warn(f"warning: {error}. Going back to the snapshot before it.")
                damaged.append(error)
                continue
            except InputError:
                raise
            except OSError as error:  # perhaps only for now: nothing is changed
                raise OSError(f"{error}. If it cannot be read the next time either, rename the folder "
                              f"{self.path(number)} to go on from the snapshot before it") from None
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                raise InputError(f"{self.path(number)}: its checksums are right, but it cannot be read ("
                                 f"{type(error).__name__} {error}). Start a new run, with another --out.") from None
            self._last = max(numbers)
            damaged += self._continue_other_chains(number, warn)
            wait_for_all("snapshots read")  # no process renames what another one is reading
            if writing and is_writer():
                for one in damaged:
                    self.set_aside(one.number)
            return found
        if numbers or any(self.folder.glob("*.damaged*")):
            raise InputError(f"{self.folder}: none of the snapshots is whole. Put back copies of them, or start a new "
                             "run, with another --out. Nothing was changed.")
        return None

    def _continue_other_chains(self, loaded: int, warn: Callable[[str], None]) -> list[Damaged]:
        """Finds, for every chain but that of the snapshot `loaded`, the snapshot that the chain goes on from.

        It is undamaged and needs no file of another chain; without one, the chain begins again, with all clients.
        Returns what was damaged.
        """
        damaged, used = list[Damaged](), set(self.verified[loaded])
        here = self._chains[loaded % self.keep].where
        for number in range(loaded + 1, loaded + self.keep):
            chain = self._chains[number % self.keep] = _Chain({}, set(here))
            for earlier in (n for n in reversed(self.numbers()) if n < loaded and (n - number) % self.keep == 0):
                try:
                    entries = [self.verify(earlier)["clients"][name] for name in self._names]
                except Damaged as error:
                    warn(f"warning: {error}. It is an older snapshot, which is not needed now.")
                    damaged.append(error)
                    continue
                except (InputError, KeyError, TypeError, ValueError, IndexError, AttributeError):
                    continue  # of another version or other clients
                if used & self.verified[earlier]:  # `keep` was another number
                    continue
                used |= self.verified[earlier]
                # A client's newest row is at most as old as its last training, so these are all that trained since.
                chain.where = {i: tuple(e["at"]) for i, e in enumerate(entries) if e["at"]}
                chain.changed = {client for client, (at, _) in here.items() if at > earlier}
                break
        return damaged

    def _loaded(self, number: int, manifest: dict, initial: State,
                store: Store | None) -> tuple[State, dict[str, Any]]:
        """Returns (state, extra) of an undamaged snapshot.

        Raises:
            InputError: the snapshot has other clients or another strategy.
        """
        own = self.path(number)
        if set(manifest["clients"]) != set(self._names):
            raise InputError(f"{own}: a snapshot of other clients ({', '.join(manifest['clients'])}). Use the data "
                             "that the run began with.")
        server, clients = read_arrays(own / "server"), read_arrays(own / "clients")
        population = self._population(number, manifest, (server, clients), initial, store)
        partial = manifest["partial"]
        if partial is not None:
            members = {c: _row((server, clients), "partial", k, _version(manifest["fetched"], c))
                       for k, c in enumerate(partial["clients"])}
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
        where = {i: tuple(e["at"]) for i, e in enumerate(entries) if e["at"]}
        self._chains[number % self.keep] = _Chain(where)
        for needed in sorted({at for at, _ in where.values()}):
            folder = self.path(needed)
            its = arrays if needed == number else (read_arrays(folder / "server"), read_arrays(folder / "clients"))
            for client, (at, place) in where.items():
                if at == needed:
                    adapters = _row(its, "changed", place, _version(manifest["fetched"], client))
                    if fault := misfit(adapters, initial.population[client].adapters):
                        raise InputError(f"{folder}: the snapshot of {self._names[client]} {fault}. Was the run of "
                                         "another strategy, or has its class changed? Nothing was removed.")
                    population[client] = stored(store, client, ClientState(
                        adapters, entries[client]["stage"], entries[client]["rounds"]))
        return tuple(population)


def _version(fetched: Sequence[int], client: int) -> str:
    """Returns the version of the server that a client has, as a key; see `State.fetched`."""
    return str(fetched[client] if fetched else 0)


def _row(snapshot: tuple[dict, dict], kind: str, index: int, version: str) -> dict[str, Any]:
    """Returns a copy of one client's adapters from a snapshot's arrays (server, clients).

    Orbax leaves empty dicts out, such as the shared subtrees of the strategy `local`, so they may be missing."""
    shared, clients = (part.get(kind, {}) for part in snapshot)
    own = row({**shared, **clients.get("local", {})}, index)
    return {**jax.tree.map(np.array, own), **clients.get("received", {}).get(version, {})}
