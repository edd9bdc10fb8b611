"""Rounds whose clients are trained elsewhere: what a server sends a client, and what it makes of the answer.

The server keeps, for each client, the number of the last aggregation that used it (`State.fetched`). The client keeps
its adapters as they were then, under the same number, and a message names it: so both go on from what both know,
whichever of them was killed, and a refused or lost upload leaves no trace. No message has a local subtree of a client.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from pilot_jax.federation.observer import RunObserver
from pilot_jax.federation.parcels import Parcel, packed, unpacked
from pilot_jax.federation.roles import Tree
from pilot_jax.federation.rounds import CurrentAdapters, PhasePlan, begin_phase, end_round, finish_phase
from pilot_jax.federation.state import Federation, Population, State, Timings, Trained
from pilot_jax.federation.uploads import judged

NOT_SENT = ("round", "phase", "client", "task", "step", "update_norm")  # of a record: the server knows or computes it
Exchange = Callable[[str, Sequence[int], Callable[[int], Parcel]], Mapping[int, Parcel | str]]


def download(fed: Federation, state: State, current: Mapping[int, Mapping[str, Tree]], initial: Population, dtype: str,
             about: Mapping[str, Any], client: int) -> Parcel:
    """Returns what brings a client up to date: the subtrees that `Strategy.traffic` counts, of the client's own row.

    A client that has never been in an aggregation begins from `initial`, and is sent what differs from it.
    """
    adapters, old = current[client], initial[client].adapters
    version = (state.fetched or (0,) * len(fed.clients))[client]
    names = [name for name in fed.strategy.traffic(adapters)[1] if version or not all(
        map(np.array_equal, jax.tree.leaves(adapters[name]), jax.tree.leaves(old[name])))]
    return packed(adapters, names, dtype, {"version": version, **about})


def serve(fed: Federation, state: State, exchange: Exchange, observer: RunObserver, dtype: str = "float32",
          initial: Population | None = None) -> State:
    """Runs all rounds, or those that are left, sends every client its final model, and returns the last state.

    Args:
        exchange: a function (kind of message, client indices, client -> Parcel) that sends a parcel to each client and
            returns {client: its reply, or why there is none}.
        initial: the clients before their first round; default: those of `state`.
    """
    initial = initial or state.population
    while state.round <= fed.settings.rounds:
        while (plan := begin_phase(fed, state)) is not None:
            began = time.perf_counter()
            about = {"number": state.version + 1, "round": plan.round, "stage": plan.stage, "label": plan.label}
            replies = exchange(f"train.{plan.stage}", plan.clients, partial(
                download, fed, state, plan.adapters, initial, dtype, about))
            results = {c: _received(fed, plan, c, replies[c], dtype) for c in plan.clients}
            trained = Trained({c: a for c, (a, _) in results.items()}, {c: r for c, (_, r) in results.items()},
                              Timings(time.perf_counter() - began))
            state = finish_phase(fed, state, plan, trained, observer)
        state = end_round(fed, state)
    members = [c for c, version in enumerate(state.fetched) if version]
    final = CurrentAdapters(fed, state.population, members, state.server)
    exchange("query.finish", members, partial(download, fed, state, final, initial, dtype, {}))
    return state


def _received(fed: Federation, plan: PhasePlan, client: int, reply: Parcel | str,
              dtype: str) -> tuple[dict[str, Tree], dict[str, Any]]:
    """Returns a client's adapters as far as the server knows them, and its record, from what the client has sent.

    Nothing that a client claims is believed but its uploaded numbers and its losses, which are only logged.
    """
    before, data = plan.adapters[client], fed.clients[client]
    record = {"round": plan.round, "phase": plan.label, "client": data.name, "task": data.task, "step": 0}
    expected = fed.strategy.ownership().upload(before, plan.stage)
    fault = reply if isinstance(reply, str) else reply.about.get("fault")
    try:
        if isinstance(reply, str) or fault:
            return before, record | {"fault": str(fault)}
        upload = unpacked(reply, expected, dtype)
        losses = {str(k): float(v) for k, v in reply.about.items() if k not in NOT_SENT}
    except (ValueError, TypeError) as error:
        return before, record | {"fault": str(error)}
    return {**before, **upload}, record | {"step": fed.steps(client, plan.round), "loss": float("nan")} | losses | (
        judged(upload, expected))
