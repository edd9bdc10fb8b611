"""One round: who takes part, local updates in chunks, uploads, aggregation, downloads."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pilot_jax.config import Config
from pilot_jax.data.batches import ClientData, num_steps, visiting_order
from pilot_jax.errors import InputError
from pilot_jax.federation import mixing
from pilot_jax.federation.client import Phase, local_update
from pilot_jax.federation.population import ClientState, row, stack, to_host
from pilot_jax.federation.strategies.base import Strategy
from pilot_jax.models.pretrained import PretrainedModel


def client_devices(wanted: int | None, base: Mapping[str, Any]) -> int:
    """How many devices train clients side by side.

    By default, on CPU, all there are, as long as a copy of the base for each is small change; elsewhere one.
    """
    there = jax.device_count()
    if wanted is not None:
        if wanted > there:
            raise InputError(f"system.client_devices: {wanted} asked for, {there} there. Lower it; on CPU, `run` makes "
                             "as many as there are cores before JAX starts.")
        return wanted
    small = sum(leaf.nbytes for leaf in jax.tree.leaves(base)) < 500e6
    return there if jax.default_backend() == "cpu" and small else 1


@dataclasses.dataclass(frozen=True)
class Federation:
    """What does not change during a run."""

    config: Config
    strategy: Strategy
    model: PretrainedModel
    clients: tuple[ClientData, ...]  # ordered by name; a client's index is its id in mixing
    tasks: tuple[str, ...]  # global task order

    @functools.cached_property
    def training(self) -> tuple[jax.sharding.Mesh | None, dict[str, Any]]:
        """The devices that train clients side by side (None: one), and the base as they see it."""
        count = client_devices(self.config.system.client_devices, self.model.base)
        if count == 1:
            return None, self.model.base
        mesh = jax.make_mesh((count,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,),
                             devices=jax.devices()[:count])
        return mesh, jax.device_put(self.model.base, NamedSharding(mesh, PartitionSpec()))

    def task_index(self, client: int) -> int:
        return self.tasks.index(self.clients[client].task)


@dataclasses.dataclass(frozen=True)
class State:
    """What a run carries from phase to phase."""

    population: tuple[ClientState, ...]
    server: dict[str, Any]
    client_steps: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    train_seconds: float = 0.0


def client_generator(seed: int, client: str, round_: int, phase: str) -> np.random.Generator:
    """A client's stream of randomness: fold_in(root, client, round, phase), whoever else takes part.

    Names, not positions, go in, so that a client's draws do not depend on the others.
    """
    key = jax.random.key(seed)
    for part in (client, str(round_), phase):
        key = jax.random.fold_in(key, int.from_bytes(hashlib.sha256(part.encode()).digest()[:4], "big"))
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def cohort(config: Config, names: tuple[str, ...], round_: int) -> list[int]:
    """Indices of the clients that take part in `round_` (from 1), in order."""
    f = config.federation
    if f.participation != "uniform":
        for entry in f.participation:
            if entry.round == round_:
                unknown = sorted(set(entry.clients) - set(names))
                if unknown or not entry.clients:
                    raise InputError(f"federation.participation: round {round_}: unknown or no clients {unknown}. "
                                     f"Known: {', '.join(names)}.")
                return sorted(names.index(name) for name in set(entry.clients))
        return list(range(len(names)))
    size = min(f.clients_per_round or len(names), len(names))
    if size == len(names):
        return list(range(size))
    rng = client_generator(config.system.seed, "server", round_, "sampling")
    return sorted(rng.choice(len(names), size, replace=False).tolist())


def _chunk_inputs(fed: Federation, members: list[int], round_: int, label: str, shapes: tuple[int, int],
                  width: int) -> dict[str, Any]:
    """Arrays of one chunk, padded to `width` clients with clients that take no step."""
    n_max, steps_max = shapes
    train, fl, seed = fed.config.train, fed.config.federation, fed.config.system.seed
    data, orders, reals, steps = [], [], [], []
    for client in members:
        own = fed.clients[client]
        count = num_steps(own.size, train.batch_size, fl.local_epochs, fl.local_steps)
        rng = client_generator(seed, own.name, round_, label)
        order, real = visiting_order(rng, own.size, train.batch_size, count)
        spare = ((0, steps_max - count), (0, 0))
        orders.append(np.pad(order, spare))
        reals.append(np.pad(real, spare))
        steps.append(count)
        data.append({k: np.pad(v, ((0, n_max - own.size), *((0, 0),) * (v.ndim - 1))) for k, v in own.train.items()})
    idle = width - len(members)
    return {
        "data": stack(data + data[:1] * idle),
        "order": np.stack(orders + orders[:1] * idle),
        "real": np.stack(reals + reals[:1] * idle).astype(np.float32),
        "steps": np.asarray(steps + [0] * idle, np.int32),
        "task_index": np.asarray([fed.task_index(c) for c in members + members[:1] * idle], np.int32),
    }


def chunks(fed: Federation, members: list[int], width: int) -> list[list[int]]:
    """`members` in groups of at most `width` clients whose arrays have one shape: one program trains a group."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for client in members:
        train = fed.clients[client].train
        by_shape.setdefault((train["input_ids"].shape[1], train["target_ids"].shape[1]), []).append(client)
    return [group[i:i + width] for _, group in sorted(by_shape.items()) for i in range(0, len(group), width)]


def train_phase(fed: Federation, adapters: Mapping[int, dict], round_: int, stage: str, label: str,
                progress: Callable[[dict], None]) -> tuple[dict[int, dict], list[dict]]:
    """Local updates of the clients in `adapters`, chunk by chunk. Returns their new adapters and metric records."""
    f, train = fed.config.federation, fed.config.train
    roles = fed.strategy.roles()
    phase = Phase(fed.model.module, roles, stage, train)
    sizes = [c.size for c in fed.clients]
    shapes = (max(sizes), max(num_steps(n, train.batch_size, f.local_epochs, f.local_steps) for n in sizes))
    mesh, base = fed.training
    devices = 1 if mesh is None else mesh.size
    width = devices * min(fed.config.system.client_chunk, -(-len(fed.clients) // devices))
    received = roles.names(scope="received")
    everyone = sorted(adapters)
    trained, records, done = {}, {}, 0
    for members in chunks(fed, everyone, width):
        inputs = _chunk_inputs(fed, members, round_, label, shapes, width)
        first = adapters[members[0]]
        padded = members + members[:1] * (width - len(members))
        own = stack([{n: t for n, t in adapters[c].items() if n not in received} for c in padded])
        new, metrics = local_update(phase, base, own, {n: first[n] for n in received}, **inputs, mesh=mesh)
        new, metrics = to_host(new), to_host(metrics)
        for k, client in enumerate(members):
            trained[client] = {**adapters[client], **row(new, k)}
            record = {"round": round_, "phase": label, "client": fed.clients[client].name,
                      "task": fed.clients[client].task, "step": int(inputs["steps"][k])}
            records[client] = record | {name: float(value[k]) for name, value in metrics.items()}
        done += int(inputs["steps"].sum())
        progress({"kind": "chunk", "round": round_, "phase": label, "clients": len(trained), "of": len(everyone),
                  "steps": done, "loss": float(np.mean([records[c]["last_loss"] for c in members]))})
    return trained, [records[c] for c in everyone]


def _check_uploads(fed: Federation, uploads: Mapping[str, Any], members: list[int], label: str) -> None:
    for name, tree in uploads.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            bad = ~np.isfinite(leaf).reshape(len(members), -1).all(axis=1)
            if bad.any():
                who = ", ".join(fed.clients[members[i]].name for i in np.flatnonzero(bad))
                raise FloatingPointError(f"{label}: the upload of {who} is not finite in {name}"
                                         f"{jax.tree_util.keystr(path)}. Lower train.lr_*.")


def _fetch(fed: Federation, population: list[ClientState], taking: list[int], server: Mapping[str, Any]) -> int:
    """Bring `taking` up to date with the server, in place; returns the bytes of what they did not have yet."""
    total = 0
    for client in taking:
        old = population[client].adapters
        new = to_host(fed.strategy.fetch(old, server, fed.task_index(client)))
        for name, size in fed.strategy.sent_bytes(new)[1].items():
            same = all(a is b for a, b in zip(jax.tree.leaves(old[name]), jax.tree.leaves(new[name]), strict=True))
            total += 0 if same else size
        population[client] = dataclasses.replace(population[client], adapters=new)
    return total


def run_round(fed: Federation, state: State, round_: int, progress: Callable[[dict], None],
              record: Callable[[dict], None], save_mixing: Callable[[int, str, dict], None]) -> State:
    """All phases of one round. Pure in `state`: what it returns is complete after a phase's aggregation."""
    strategy, population = fed.strategy, list(state.population)
    roles = strategy.roles()
    members = cohort(fed.config, tuple(c.name for c in fed.clients), round_)
    newcomers = {c for c in members if population[c].is_new}
    server = {**state.server, "round": round_}
    phases = {c: strategy.stages(c in newcomers, round_) for c in members}
    longest = max(phases.values(), key=len)
    for number, stage in enumerate(longest):
        label = stage if longest.count(stage) == 1 else f"{stage}{number + 1}"
        # Shorter schedules are the end of the longest: everyone's last phase is the round's last.
        taking = [c for c in members if number >= len(longest) - len(phases[c])]
        if not taking:
            continue
        fetched = _fetch(fed, population, taking, server)
        began = time.perf_counter()
        trained, records = train_phase(fed, {c: population[c].adapters for c in taking}, round_, stage, label, progress)
        seconds = time.perf_counter() - began
        for entry in records:
            record(entry)
        uploads = stack([roles.select(trained[c], "shared") for c in taking])
        _check_uploads(fed, uploads, taking, f"round {round_} {label}")
        sizes = np.asarray([fed.clients[c].size for c in taking])
        tasks = np.asarray([fed.task_index(c) for c in taking])
        downloads, server, log = strategy.aggregate(jax.tree.map(jnp.asarray, uploads), sizes, tasks,
                                                    np.asarray(taking), server)
        mixing.check_rows(log["weights"])
        downloads = to_host(downloads)
        received = roles.names(scope="received")
        for k, client in enumerate(taking):
            down = {n: t if n in received else row(t, k) for n, t in downloads.items()}
            # Fetching again puts the server's own arrays in place of equal copies.
            adapters = strategy.fetch({**trained[client], **down}, server, fed.task_index(client))
            population[client] = dataclasses.replace(population[client], adapters=adapters, stage=stage)
        up, down = strategy.sent_bytes(population[taking[0]].adapters)
        log = {"effective_neighbors": np.asarray(mixing.effective_neighbors(log["weights"]))} | log
        names = [fed.clients[c].name for c in taking]
        save_mixing(round_, label, log | {"client_ids": np.asarray(names)})
        steps = sum(r["step"] for r in records)
        summary = {"round": round_, "phase": label, "clients": len(taking), "client_steps": steps,
                   "seconds": round(seconds, 3), "bytes_up": len(taking) * sum(up.values()),
                   "bytes_down": len(taking) * sum(down.values()) + fetched,
                   "loss": float(np.average([r["loss"] for r in records], weights=[r["step"] for r in records])),
                   "effective_neighbors": float(np.mean(log["effective_neighbors"]))}
        if "product_gap" in log:
            summary["product_gap"] = float(np.mean(log["product_gap"]))
        record(summary | {"bytes_up_by_subtree": {n: v * len(taking) for n, v in up.items()},
                          "bytes_down_by_subtree": {n: v * len(taking) for n, v in down.items()}})
        progress({"kind": "phase"} | summary)
        state = dataclasses.replace(
            state, population=tuple(population), server=server, client_steps=state.client_steps + steps,
            bytes_up=state.bytes_up + summary["bytes_up"], bytes_down=state.bytes_down + summary["bytes_down"],
            train_seconds=state.train_seconds + seconds)
    for client in members:
        population[client] = dataclasses.replace(population[client], rounds=population[client].rounds + 1)
    return dataclasses.replace(state, population=tuple(population), server=server)
