"""Rounds whose clients are nodes of their own: the simulator's numbers, and who learns what."""

import dataclasses

import jax
import numpy as np
import pytest

from pilot_jax.data.roster import Member, Roster
from pilot_jax.deploy.glue import Node
from pilot_jax.federation.executor import Executor
from pilot_jax.federation.observer import RunObserver
from pilot_jax.federation.remote import serve
from pilot_jax.federation.rounds import CurrentAdapters
from pilot_jax.federation.strategies import STRATEGIES, make_strategy
from pilot_jax.testing.toy import SIZES, TASKS, run_toy, toy_federation, toy_state

DEPLOYED = [name for name, kind in STRATEGIES.items()
            if kind.__module__.startswith("pilot_jax.") and not (kind.pools_data or kind.finetunes)
            and "task" not in kind().ownership().names()]  # the toy has no connector; Pilot is tested on a real model
ROSTER = Roster({f"c{k}": Member(task, size) for k, (task, size) in enumerate(zip(TASKS, SIZES, strict=True))})


class Mixing(RunObserver):
    def __init__(self):
        self.weights, self.records = [], []

    def phase_ended(self, state, record, mixing, trained):
        self.records.append(record)
        self.weights.append(None if mixing is None else mixing["weights"])


class Network:
    """Nodes that share nothing with the server or each other but the parcels, of which each is kept."""

    def __init__(self, fed, folder, dtype="float32"):
        self.fed, self.folder, self.dtype, self.state, self.seen = fed, folder, dtype, toy_state(fed), []

    def node(self, client):
        """A node as a new process makes it, with what its folder has."""
        name = self.fed.names[client]
        own = dataclasses.replace(ROSTER, own=name)
        here = dataclasses.replace(self.fed, clients=tuple(own.completed([self.fed.clients[client]])))
        (self.folder / name).mkdir(exist_ok=True)
        return Node(here, Executor(client_chunk=1), client, self.folder / name,
                    self.state.population[client].adapters, self.dtype)

    def answer(self, kind, client, parcel):
        node = self.node(client)
        return node.finish(parcel) if kind == "query.finish" else node.train(parcel)

    def exchange(self, kind, clients, make):
        replies = {}
        for client in clients:
            parcel = make(client)
            replies[client] = self.answer(kind, client, parcel)
            self.seen.append((kind, client, parcel, replies[client]))
        return replies

    def serve(self, state=None, observer=None):
        without = dataclasses.replace(self.fed, clients=tuple(ROSTER.completed([])))
        return serve(without, state or self.state, self.exchange, observer or RunObserver(), self.dtype,
                     self.state.population)

    def final(self, client):
        return self.node(client).read("final")[0]


def simulated(fed):
    observer = Mixing()
    return run_toy(fed, observer=observer), observer


def comparable(adapters):
    """Adapters with the product of `combine: exact`'s factors, which a singular value decomposition gives, for them."""
    out = dict(adapters)
    if "text_residual" in out:
        out["text_residual"] = {k: v["b"] @ v["a"] for k, v in out["text_residual"]["layers"].items()}
    return out


def assert_same(one, other, tolerance=1e-5):
    one, other = comparable(one), comparable(other)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=0, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", DEPLOYED)
def test_every_strategy_ends_as_in_the_simulator(name, tmp_path):
    """Clients that answer from processes of their own end with the simulator's adapters, local ones included."""
    fed = toy_federation(make_strategy(name))
    expected, log = simulated(fed)
    network, observer = Network(fed, tmp_path), Mixing()
    network.serve(observer=observer)
    now = CurrentAdapters(fed, expected.population, range(3), expected.server)
    for client in range(3):
        assert_same(network.final(client), now[client])
    for one, other in zip(observer.weights, log.weights, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    shared = set(fed.strategy.ownership().names(scope="shared"))
    for kind, _, _, reply in network.seen:
        assert kind == "query.finish" or set(reply.names) <= shared
