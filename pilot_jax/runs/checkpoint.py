"""Writes and reads adapters with orbax: shared ones in `checkpoints/server`, others in `checkpoints/clients/<id>`."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pilot_jax.errors import InputError
from pilot_jax.federation.roles import Roles
from pilot_jax.federation.state import AnyState, ClientState, Population
from pilot_jax.federation.uploads import misfit, not_finite
from pilot_jax.files import atomic_write, path_part

# What orbax cannot have in a path: it looks for files by patterns, of which the whole path is a part, and in UTF-8.
UNUSABLE = re.compile("[*?[\ud800-\udfff]")


def over_processes(tree: Any) -> bool:
    """Returns whether a part of some array of the tree lies on another process's devices."""
    return any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in jax.tree.leaves(tree))


def write_arrays(path: Path, tree: dict[str, Any]) -> None:
    """Writes a dict of arrays as an orbax checkpoint, in place of one that is already there.

    If arrays are spread over the devices of several processes, every process must call this, and each writes its part.

    Raises:
        OSError: the checkpoint could not be written.
    """
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax also raises the errors that it logs
    if over_processes(tree):
        _save(path, tree, ocp.options.MultiprocessingOptions())
        return
    needed, free = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree)), shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free", str(path))
    # The old checkpoint is removed only after orbax has renamed the finished temporary folder to its final name.
    aside = path.with_name(path.name + ".old")
    if aside.exists():
        shutil.rmtree(aside)
    if path.exists():
        path.rename(aside)
    # With several processes, only this one writes, so orbax must not wait for the others.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix="writer",
    ) if jax.process_count() > 1 else ocp.options.MultiprocessingOptions()
    _save(path, tree, alone)
    if aside.exists():
        shutil.rmtree(aside)


def _save(path: Path, tree: dict[str, Any], processes: Any) -> None:
    """Writes a checkpoint to a path that does not exist; `processes` are orbax's options for several processes."""
    import orbax.checkpoint as ocp

    with _plain_path(path.parent) as parent:
        named = parent / path.name
        plain = parent / f"{UNUSABLE.sub('_', path.name)}.plain" if UNUSABLE.search(path.name) else named
        if plain != named and plain.exists():  # of a process that was killed
            shutil.rmtree(plain)
        try:
            with ocp.StandardCheckpointer(multiprocessing_options=processes) as checkpointer:
                checkpointer.save(plain, tree | {"%": np.zeros(1)})  # orbax refuses an empty tree
                checkpointer.wait_until_finished()
        except (ValueError, RuntimeError) as error:  # tensorstore raises these when the disk is full
            raise OSError(f"{path}: cannot be written ({str(error).splitlines()[0]})") from error
        if plain != named:
            os.rename(plain, named)


@contextmanager
def _plain_path(folder: Path) -> Iterator[Path]:
    """Yields an absolute path to a folder that orbax can use: through a link, if it cannot use the folder's own path.

    It would find no file in a folder named `[a]`, in one named `a*` also those of a folder `ab`, and it cannot write to
    a folder whose name is not UTF-8."""
    folder = folder.absolute()
    if not UNUSABLE.search(str(folder)):
        yield folder
        return
    usual = tempfile.gettempdir()  # has brackets too in array jobs of some clusters
    with tempfile.TemporaryDirectory(dir="/tmp" if UNUSABLE.search(usual) else usual) as place:
        link = Path(place) / "folder"
        link.symlink_to(folder, target_is_directory=True)
        yield link


def read_arrays(path: Path) -> dict[str, Any]:
    """Returns the arrays that `write_arrays` wrote, as NumPy arrays, whichever devices and processes had them.

    Raises:
        InputError: the checkpoint does not exist or cannot be read.
    """
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if not path.is_dir():
        raise InputError(f"{path}: no such checkpoint. The run has not been saved yet, or is not a run directory.")
    with _plain_path(path) as plain, ocp.PyTreeCheckpointer() as checkpointer:
        try:
            there = checkpointer.metadata(plain).item_metadata.tree
            tree = checkpointer.restore(plain, restore_args=jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), there))
        except Exception as error:  # orbax and tensorstore raise many kinds
            why = " ".join(str(error).split())[:300]
            raise InputError(f"{path}: damaged, or not a checkpoint of a run ({why}).") from None
    tree.pop("%", None)  # the placeholder of `_save`; no `path_part` of a client is "%"
    return tree


def save_population(folder: Path, names: Iterable[str], population: Iterable[AnyState], roles: Roles) -> None:
    """Writes the adapters of all clients that have trained: shared ones to `server`, the others to `clients/<id>`."""
    names, population = list(names), list(population)
    folder.mkdir(parents=True, exist_ok=True)
    trained = [(n, c) for n, c in zip(names, population, strict=True) if c.stage != "none"]
    write_arrays(folder / "server", {path_part(n): roles.select(c.adapters, "shared") for n, c in trained})
    (folder / "clients").mkdir(exist_ok=True)
    for name, client in trained:
        rest = roles.select(client.adapters, "local") | roles.select(client.adapters, "received")
        write_arrays(folder / "clients" / path_part(name), rest)
    index = {name: {"stage": c.stage, "rounds": c.rounds} for name, c in zip(names, population, strict=True)}
    atomic_write(folder / "population.json", json.dumps(index, indent=1))


def load_population(folder: Path, names: Iterable[str], initial: dict[str, Any]) -> Population:
    """Returns the states of the clients `names`, in this order, that `save_population` wrote.

    Args:
        initial: the adapters that clients without any training get.

    Raises:
        InputError: the folder has no checkpoints, they are damaged, or they were written for another config.
    """
    index_file = folder / "population.json"
    if not index_file.is_file():
        raise InputError(f"{index_file} does not exist. Give the directory of a finished run.")
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        index = {str(n): {"stage": str(c["stage"]), "rounds": int(c["rounds"])} for n, c in index.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{index_file}: damaged ({type(error).__name__} {error}).") from None
    server = read_arrays(folder / "server")
    out: list[AnyState] = []
    for name in names:
        if name not in index:
            raise InputError(f"{index_file}: client {name!r} is not in this run. Known: {', '.join(index)}.")
        if index[name]["stage"] == "none":
            out.append(ClientState(initial))
            continue
        rest = read_arrays(folder / "clients" / path_part(name))
        adapters = {**server.get(path_part(name), {}), **rest}
        fault = misfit(adapters, initial) or not_finite(adapters)
        if fault:
            raise InputError(f"{folder}: the checkpoint of client {name!r} {fault}. Was it written by another config?")
        out.append(ClientState(adapters, index[name]["stage"], index[name]["rounds"]))
    return tuple(out)


def adapters_sha256(names: Iterable[str], population: Iterable[AnyState]) -> str:
    """Returns one SHA-256 over the adapters of all clients, in a fixed order. Equal hashes mean equal adapters."""
    digest = hashlib.sha256()
    for name, client in sorted(zip(names, population, strict=True), key=lambda pair: pair[0]):
        digest.update(name.encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(client.adapters):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.ascontiguousarray(leaf, np.float32).tobytes())
    return digest.hexdigest()
