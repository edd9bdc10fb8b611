"""One round: participants, local training, uploads, aggregation, downloads.

`run_round` plans each federation's next phase (`begin_phase`), has the phases trained, and aggregates the results
(`finish_phase`), until no phase is left (`end_round`).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pilot_jax.errors import Interrupted
from pilot_jax.federation import mixing
from pilot_jax.federation.cohort import Cohort
from pilot_jax.federation.executor import Executor, Work
from pilot_jax.federation.halves import SKETCH, no_evidence, with_phase
from pilot_jax.federation.lora_options import common, fitted
from pilot_jax.federation.observer import Observers, RunObserver
from pilot_jax.federation.privacy import epsilon
from pilot_jax.federation.roles import Tree
from pilot_jax.federation.state import (
    ClientState,
    Federation,
    Population,
    State,
    Trained,
    row,
    stack,
    stored,
    up_to_date,
)
from pilot_jax.federation.uploads import REMEMBERED, refusals
from pilot_jax.parallel.mesh import spread
from pilot_jax.parallel.processes import to_host


class CurrentAdapters(Mapping[int, dict[str, Tree]]):
    """The clients' adapters, up to date with the server. Each is read on access, because it may be on disk."""

    def __init__(self, fed: Federation, population: Population, clients: Sequence[int],
                 server: Mapping[str, Any]) -> None:
        self._fed, self._population, self._clients, self._server = fed, population, clients, server

    def __getitem__(self, client: int) -> dict[str, Tree]:
        return to_host(up_to_date(self._fed.strategy, self._fed.task_index(client),
                                  self._population[client].adapters, self._server))

    def __iter__(self) -> Iterator[int]:
        return iter(self._clients)

    def __len__(self) -> int:
        return len(self._clients)


@dataclasses.dataclass(frozen=True)
class PhasePlan:
    """A phase before it is trained."""

    round: int
    number: int  # number of the phase in its round, from 0
    stage: str
    label: str  # the stage, with a number if a round has it twice
    clients: tuple[int, ...]  # indices of the clients that train
    adapters: Mapping[int, dict[str, Tree]]
    bytes_fetched: int  # size of the downloads that bring clients up to date


def begin_phase(fed: Federation, state: State) -> PhasePlan | None:
    """Returns the next phase of round `state.round`; None if no phase is left."""
    members = fed.members(state.round)
    phases = {c: fed.strategy.stages(state.population[c].is_new, state.round) for c in members}
    longest = max(phases.values(), key=len)
    for number in range(state.phase, len(longest)):
        # A shorter schedule is the end of the longest, so that all clients share the round's last phase.
        clients = tuple(c for c in members
                        if number >= len(longest) - len(phases[c]) and c not in state.benched)
        if clients:
            stage = longest[number]
            label = stage if longest.count(stage) == 1 else f"{stage}{number + 1}"
            return PhasePlan(state.round, number, stage, label, clients,
                             CurrentAdapters(fed, state.population, clients, state.server),
                             _bytes_fetched(fed, state, clients))
    return None


def _bytes_fetched(fed: Federation, state: State, clients: Sequence[int]) -> int:
    """Returns the bytes of the server's changes since these clients last downloaded from it."""
    versions = _versions(fed, state)
    behind = collections.Counter((versions[c], fed.rank_of(c)) for c in clients if versions[c] != state.version)
    one_of = {(versions[c], fed.rank_of(c)): c for c in clients}  # clients of a version and rank have the same to fetch
    return sum(_changed_bytes(fed, state, one_of[kind]) * count for kind, count in behind.items())


def _changed_bytes(fed: Federation, state: State, client: int) -> int:
    """Returns the bytes of the subtrees in which a client differs from what it would download now."""
    old = state.population[client].adapters
    new = up_to_date(fed.strategy, fed.task_index(client), old, state.server)

    def same(one: Tree, other: Tree) -> bool:  # equal values count too: a client on disk or of a snapshot is a copy
        return one is other or all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))

    sizes = fed.strategy.traffic(new, None, fed.rank_of(client), fed.rank)[1]
    return sum(size for name, size in sizes.items() if not same(new[name], old[name]))


def _versions(fed: Federation, state: State) -> tuple[int, ...]:
    return state.fetched or (0,) * len(fed.clients)


def finish_phase(fed: Federation, state: State, plan: PhasePlan, trained: Trained, observer: RunObserver) -> State:
    """Returns the state after a phase's uploads and aggregation.

    Raises:
        FloatingPointError: an upload was refused and `federation.on_bad_client` is stop, or all clients were refused.
    """
    for record in trained.records.values():
        observer.client_trained(record)
    refused = refusals(fed.settings, trained.records, state.norms.get(plan.stage, []))
    _report_refused(fed, state, plan, refused, observer)
    used = [c for c in plan.clients if c not in refused]
    record = _phase_record(fed, state, plan, trained, refused)
    state = _counted(fed, state, plan, trained, refused, record)
    if not used:  # only new clients were in this phase, and all were refused
        observer.phase_ended(state, record, None, ())
        return state
    new = np.asarray([state.population[c].is_new for c in used])
    after, server, log = _aggregated(fed, plan, trained, used, new, state.server)
    population, fetched = list(state.population), list(_versions(fed, state))
    for client, adapters in after.items():
        stage = fed.strategy.answering_stage or plan.stage
        population[client] = ClientState(adapters, stage, population[client].rounds)
        fetched[client] = state.version + 1
    state = dataclasses.replace(state, population=tuple(population), server=server, version=state.version + 1,
                                fetched=tuple(fetched))
    record |= _mixing_record(trained, used, log)
    observer.phase_ended(state, record, log | {"client_ids": np.asarray([fed.clients[c].name for c in used])}, used)
    return state


def _report_refused(fed: Federation, state: State, plan: PhasePlan, refused: Mapping[int, str],
                    observer: RunObserver) -> None:
    """Reports each refused upload and why; raises if `on_bad_client` is stop or no client is left in the round."""
    nobody = {*refused, *state.benched} >= set(fed.members(plan.round))
    for client, why in refused.items():
        text = f"round {plan.round} {plan.label}: the upload of {fed.clients[client].name} {why}"
        if fed.settings.on_bad_client == "stop" or nobody:
            raise FloatingPointError(f"{text}. Lower train.lr_*, or check the client's data.")
        observer.note(f"warning: {text}. The client is left out of this round and stays as it was before.")


def _phase_record(fed: Federation, state: State, plan: PhasePlan, trained: Trained,
                  refused: Mapping[int, str]) -> dict[str, Any]:
    """Returns a phase's line of metrics.jsonl, without the values that its aggregation adds."""
    timings, clients = trained.timings, [c for c in plan.clients if c not in refused]
    up = fed.bytes_of(0, plan.stage, trained.adapters, plan.clients)
    down = fed.bytes_of(1, plan.stage, trained.adapters, clients)
    record = {
        "round": plan.round, "phase": plan.label, "clients": len(clients),
        "client_steps": sum(r["step"] for r in trained.records.values()), "seconds": round(timings.seconds, 3),
        "prepare_seconds": round(timings.prepare_seconds, 3), "waited_seconds": round(timings.waited_seconds, 3),
        "feature_seconds": round(timings.feature_seconds, 3), "bytes_up": sum(up.values()),
        "bytes_down": sum(down.values()) + plan.bytes_fetched, "bytes_up_by_subtree": up,
        "bytes_down_by_subtree": down,
        "quarantined": [fed.clients[c].name for c in refused]}
    if fed.noise_multiplier:
        record["epsilon"] = epsilon(fed.noise_multiplier, max(_uploads(fed, state, plan)), fed.settings.privacy.delta)
    return record


def _uploads(fed: Federation, state: State, plan: PhasePlan) -> tuple[int, ...]:
    """Returns each client's number of uploads after a phase. In some stages (Ditto's "personal") there is none."""
    sends = plan.clients if fed.strategy.ownership().uploaded(plan.stage) else ()
    return tuple(n + (c in sends) for c, n in enumerate(state.uploads or (0,) * len(fed.clients)))


def _counted(fed: Federation, state: State, plan: PhasePlan, trained: Trained, refused: Mapping[int, str],
             record: Mapping[str, Any]) -> State:
    """Returns the state with a phase's steps, bytes, uploads and refusals counted."""
    accepted = [r["update_norm"] for c, r in trained.records.items() if c not in refused]
    return dataclasses.replace(
        state, phase=plan.number + 1, partial=None, uploads=_uploads(fed, state, plan),
        norms={**state.norms, plan.stage: [*state.norms.get(plan.stage, []), *accepted][-REMEMBERED:]},
        benched=(*state.benched, *refused), quarantined=state.quarantined + len(refused),
        client_steps=state.client_steps + record["client_steps"], bytes_up=state.bytes_up + record["bytes_up"],
        bytes_down=state.bytes_down + record["bytes_down"],
        train_seconds=state.train_seconds + trained.timings.seconds)


def _aggregated(fed: Federation, plan: PhasePlan, trained: Trained, used: Sequence[int], new: np.ndarray,
                server: dict[str, Any]) -> tuple[dict[int, dict[str, Tree]], dict[str, Any], dict[str, np.ndarray]]:
    """Aggregates the uploads of the clients `used`, of which some are `new`, bool [S]. Returns (each one's adapters
    afterwards, the server's state, arrays to log)."""
    roles = fed.strategy.ownership()

    def stacked(adapters: Mapping[int, dict[str, Tree]]) -> dict[str, Tree]:
        return spread(stack([common(roles.upload(adapters[c], plan.stage), adapters[c]) for c in used]),
                      fed.server_mesh)

    cohort = Cohort(stacked(trained.adapters), np.asarray([fed.weight(c) for c in used]),
                    np.asarray([fed.task_index(c) for c in used]), np.asarray(used), plan.round,
                    stacked(plan.adapters) if fed.strategy.needs_starts else None, new)
    evidence = dict[str, Any]()
    if SKETCH in cohort.uploads:
        cohort, evidence = with_ratio(cohort, server, len(fed.clients))
    downloads, server, log = fed.strategy.aggregate(cohort, server)
    server, log = server | evidence, log | {
        "ratio" if name == "text_adapter" else f"ratio_{name}": ratio for name, ratio in cohort.ratios.items()}
    mixing.check_rows(log["weights"])
    downloads, received, after = to_host(downloads), roles.names(scope="received"), {}
    for k, client in enumerate(used):
        own = {n: t if n in received else row(t, k) for n, t in downloads.items()}
        adapters = {**trained.adapters[client], **fitted(own, trained.adapters[client])}
        # Fetching again replaces copies by the server's own arrays, which clients can then share.
        after[client] = up_to_date(fed.strategy, fed.task_index(client), adapters, server)
    return after, server, {"effective_neighbors": np.asarray(mixing.effective_neighbors(log["weights"]))} | log


def with_ratio(cohort: Cohort, server: Mapping[str, Any], clients: int) -> tuple[Cohort, dict[str, Any]]:
    """Returns the cohort with its `ratios` and without sketches, and the part of the server's state with the evidence.

    Args:
        clients: K, the number of clients of the federation.
    """
    uploads, known, ratios = dict(cohort.uploads), dict(server.get("evidence") or {}), dict[str, np.ndarray]()
    new = np.ones(len(cohort), bool) if cohort.new is None else cohort.new
    for name, sketches in uploads.pop(SKETCH).items():
        before = known.get(name) or no_evidence(clients)
        known[name], ratios[name] = with_phase(before, sketches, np.asarray(cohort.ids), new)
    return dataclasses.replace(cohort, uploads=uploads, ratios=ratios), {"evidence": known}


def _mixing_record(trained: Trained, used: Sequence[int], log: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns the values that an aggregation adds to a phase's line of metrics.jsonl."""
    records = [trained.records[c] for c in used]
    out = {"loss": float(np.average([r["loss"] for r in records], weights=[r["step"] for r in records])),
           "effective_neighbors": float(np.mean(log["effective_neighbors"]))}
    return out | {name: float(np.mean(log[name])) for name in ("product_gap", "residual_lost") if name in log}


def end_round(fed: Federation, state: State) -> State:
    """Returns the state at the start of the next round."""
    population = list(state.population)
    for client in fed.members(state.round):
        if client not in state.benched:
            now = dataclasses.replace(population[client], rounds=population[client].rounds + 1)
            population[client] = stored(fed.store, client, now)
    return dataclasses.replace(state, population=tuple(population), round=state.round + 1, phase=0, benched=())


def run_round(feds: Sequence[Federation], states: Sequence[State], executor: Executor,
              observers: Sequence[RunObserver] | None = None, survive: bool = False) -> list[State | None]:
    """Runs the rest of round `state.round` of each federation; phases of one stage are trained together.

    Args:
        observers: one for each federation. Each is called after every chunk, and each can request the end of the run.
        survive: whether a federation whose uploads are all refused becomes None, instead of ending the others too.

    Raises:
        Interrupted: an observer requested it; `partial` has each federation's results of the phase in training.
        FloatingPointError: see `finish_phase`.
    """
    observers = observers or [RunObserver() for _ in feds]
    everyone, out = Observers(*observers), list[State | None](states)
    partials = {i: state.partial for i, state in enumerate(states)}  # used in the first phase alone
    plans = {i: plan for i, (fed, state) in enumerate(zip(feds, states, strict=True))
             if (plan := begin_phase(fed, state)) is not None}
    while plans:
        stage = next(iter(plans.values())).stage
        together = {i: plan for i, plan in plans.items() if plan.stage == stage}
        works = [Work(feds[i], p.adapters, p.round, p.stage, p.label, partials.pop(i, None))
                 for i, p in together.items()]
        for i, trained in zip(together, executor.train(works, everyone), strict=True):
            plan, state = plans.pop(i), out[i]
            assert state is not None
            try:
                out[i] = state = finish_phase(feds[i], state, plan, trained, observers[i])
            except FloatingPointError:
                if not survive:
                    raise
                out[i] = None
                continue
            if signum := observers[i].stop_requested():
                raise Interrupted(signum)
            if (upcoming := begin_phase(feds[i], state)) is not None:
                plans[i] = upcoming
    return [None if state is None else end_round(fed, state) for fed, state in zip(feds, out, strict=True)]
