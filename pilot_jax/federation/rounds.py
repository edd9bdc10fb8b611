"""One round: who takes part, local updates, uploads, aggregation, downloads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pilot_jax.federation import mixing
from pilot_jax.federation.cohort import members_of
from pilot_jax.federation.executor import Trained, Work, train_together
from pilot_jax.federation.privacy import epsilon
from pilot_jax.federation.state import AnyState, ClientState, Federation, State, row, stack, stored
from pilot_jax.federation.uploads import REMEMBERED, refusals
from pilot_jax.parallel.mesh import spread
from pilot_jax.parallel.processes import to_host


class _Fetched(Mapping):
    """The adapters of `taking`, brought up to date with the server when they are asked for: one chunk of clients after
    another may come from disk. `bytes`: of what they did not have yet."""

    def __init__(self, fed: Federation, population: list[AnyState], taking: list[int],
                 server: Mapping[str, Any]) -> None:
        self._fed, self._population, self._taking, self._server = fed, population, taking, server
        self._bytes: dict[int, int] = {}

    def __getitem__(self, client: int) -> dict[str, Any]:
        old = self._population[client].adapters
        new = to_host(self._fed.strategy.fetch(old, self._server, self._fed.task_index(client)))
        if client not in self._bytes:
            self._bytes[client] = sum(size for name, size in self._fed.strategy.sent_bytes(new)[1].items()
                                      if not _equal(old[name], new[name]))
        return new

    def __iter__(self) -> Iterator[int]:
        return iter(self._taking)

    def __len__(self) -> int:
        return len(self._taking)

    @property
    def bytes(self) -> int:
        return sum(self._bytes.values())


def _equal(a: Any, b: Any) -> bool:
    return all(x is y or np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def run_round(fed: Federation, state: State, round_: int, progress: Callable[[dict], None],
              record: Callable[[dict], None], save_mixing: Callable[[int, str, dict], None],
              after_phase: Callable[[State, list[int]], None] = lambda state, trained: None,
              stop: Callable[[], int] = lambda: 0) -> State:
    """All phases of one round that `state` has not behind it. Pure in `state`.

    Args:
        after_phase: called with the state after each phase, complete with its aggregation, and who trained.
        stop: asked after every chunk; a signal's number ends the round.

    Raises:
        Interrupted: `stop` said so.
        FloatingPointError: an upload was refused, and `federation.on_bad_client` is stop; or all were.
    """
    return run_together([round_of(fed, state, round_, progress, record, save_mixing, after_phase)], progress, stop)[0]


def run_together(rounds: Sequence[Generator[Work, Trained | None, State]], progress: Callable[[dict], None],
                 stop: Callable[[], int] = lambda: 0) -> list[State]:
    """Rounds of several federations, phase by phase; what they want trained in the same stage is trained together."""
    states: list[Any] = [None] * len(rounds)
    wanted: dict[int, Work] = {}

    def advance(index: int, answer: Trained | None) -> None:
        try:
            wanted[index] = rounds[index].send(answer)
        except StopIteration as stop:
            states[index] = stop.value

    for index in range(len(rounds)):
        advance(index, None)
    while wanted:
        stage = next(iter(wanted.values())).stage
        these = [i for i, work in wanted.items() if work.stage == stage]
        for i, answer in zip(these, train_together([wanted.pop(i) for i in these], progress, stop), strict=True):
            advance(i, answer)
    return states


def _tell_of(refused: Mapping[int, str], fed: Federation, all_of_them: bool, when: str,
             progress: Callable[[dict], None]) -> None:
    """Say whose uploads are refused and why; stop where the config says so, or nobody is left."""
    for client, why in refused.items():
        text = f"{when}: the upload of {fed.clients[client].name} {why}"
        if fed.config.federation.on_bad_client == "stop" or all_of_them:
            raise FloatingPointError(f"{text}. Lower train.lr_*, or look at its data.")
        progress({"kind": "note", "text": f"warning: {text}; it is left out of this round, and goes on from what it "
                  "had before."})


def _aggregated(fed: Federation, trained: Mapping[int, Any], who: Sequence[int], server: dict[str, Any],
                ) -> tuple[dict[int, dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """The server's work on the uploads of clients `who`: (each one's adapters after it, the server's state, what is
    logged of the mixing)."""
    strategy, roles = fed.strategy, fed.strategy.roles()
    uploads = stack([roles.select(trained[c], "shared") for c in who])
    sizes, tasks = np.asarray([fed.clients[c].size for c in who]), np.asarray([fed.task_index(c) for c in who])
    downloads, server, log = strategy.aggregate(spread(uploads, fed.server_mesh), sizes, tasks, np.asarray(who), server)
    mixing.check_rows(log["weights"])
    downloads, received, after = to_host(downloads), roles.names(scope="received"), {}
    for k, client in enumerate(who):
        its = {n: t if n in received else row(t, k) for n, t in downloads.items()}
        # Fetching again puts the server's own arrays in place of equal copies.
        after[client] = strategy.fetch({**trained[client], **its}, server, fed.task_index(client))
    return after, server, {"effective_neighbors": np.asarray(mixing.effective_neighbors(log["weights"]))} | log


def round_of(fed: Federation, state: State, round_: int, progress: Callable[[dict], None] = lambda event: None,
             record: Callable[[dict], None] = lambda entry: None,
             save_mixing: Callable[[int, str, dict], None] = lambda *args: None,
             after_phase: Callable[[State, list[int]], None] = lambda *args: None,
             ) -> Generator[Work, Trained | None, State]:
    """One round as a generator, for `run_together`: yields what it wants trained, and returns the state after it."""
    strategy, population = fed.strategy, list(state.population)
    members = members_of(fed, round_)
    newcomers = {c for c in members if population[c].is_new}
    server = {**state.server, "round": round_}
    phases = {c: strategy.stages(c in newcomers, round_) for c in members}
    longest = max(phases.values(), key=len)
    for number, stage in enumerate(longest):
        if number < state.phase:
            continue
        label = stage if longest.count(stage) == 1 else f"{stage}{number + 1}"
        # Shorter schedules are the end of the longest: everyone's last phase is the round's last.
        taking = [c for c in members if number >= len(longest) - len(phases[c]) and c not in state.benched]
        if not taking:
            continue
        fetched = _Fetched(fed, population, taking, server)
        done = yield Work(fed, fetched, round_, stage, label, state.partial)
        assert done is not None  # None only starts the generator
        trained, records, asked = done.adapters, done.records, set(taking)
        for entry in records:
            record(entry)
        earlier = state.norms.get(stage, [])
        refused = refusals(fed.config.federation, dict(zip(taking, records, strict=True)), earlier)
        _tell_of(refused, fed, {*refused, *state.benched} >= set(members), f"round {round_} {label}", progress)
        taking = [c for c in taking if c not in refused]
        up, down = strategy.sent_bytes(trained[min(asked)])
        steps = sum(r["step"] for r in records)
        summary = {"round": round_, "phase": label, "clients": len(taking), "client_steps": steps,
                   "seconds": round(done.seconds, 3), "prepare_seconds": round(done.prepare_seconds, 3),
                   "waited_seconds": round(done.waited_seconds, 3),
                   "feature_seconds": round(done.feature_seconds, 3), "bytes_up": len(asked) * sum(up.values()),
                   "bytes_down": len(taking) * sum(down.values()) + fetched.bytes,
                   "quarantined": [fed.clients[c].name for c in refused]}
        uploads_sent = tuple(n + (c in asked) for c, n in enumerate(state.uploads or (0,) * len(population)))
        if fed.noise_multiplier:
            summary["epsilon"] = epsilon(fed.noise_multiplier, max(uploads_sent), fed.config.federation.privacy.delta)
        accepted = [r["update_norm"] for c, r in zip(sorted(asked), records, strict=True) if c not in refused]
        state = dataclasses.replace(
            state, round=round_, phase=number + 1, partial=None, uploads=uploads_sent,
            norms={**state.norms, stage: [*earlier, *accepted][-REMEMBERED:]},
            benched=(*state.benched, *refused), quarantined=state.quarantined + len(refused),
            client_steps=state.client_steps + steps, bytes_up=state.bytes_up + summary["bytes_up"],
            bytes_down=state.bytes_down + summary["bytes_down"], train_seconds=state.train_seconds + done.seconds)
        if not taking:  # newcomers alone were in this phase, and none can be used
            record(summary)
            after_phase(state, [])
            continue
        used = [entry for entry in records if entry["client"] not in {fed.clients[c].name for c in refused}]
        after, server, log = _aggregated(fed, trained, taking, server)
        for client, adapters in after.items():
            population[client] = ClientState(adapters, stage, population[client].rounds)
        save_mixing(round_, label, log | {"client_ids": np.asarray([fed.clients[c].name for c in taking])})
        summary |= {"loss": float(np.average([r["loss"] for r in used], weights=[r["step"] for r in used])),
                    "effective_neighbors": float(np.mean(log["effective_neighbors"]))}
        if "product_gap" in log:
            summary["product_gap"] = float(np.mean(log["product_gap"]))
        record(summary | {"bytes_up_by_subtree": {n: v * len(asked) for n, v in up.items()},
                          "bytes_down_by_subtree": {n: v * len(taking) for n, v in down.items()}})
        progress({"kind": "phase"} | summary)
        state = dataclasses.replace(state, population=tuple(population), server=server)
        after_phase(state, taking)
    for client in members:
        if client in state.benched:
            continue
        now = dataclasses.replace(population[client], rounds=population[client].rounds + 1)
        population[client] = stored(fed.store, client, now)
    return dataclasses.replace(state, population=tuple(population), server=server, round=round_ + 1, phase=0,
                               benched=())
