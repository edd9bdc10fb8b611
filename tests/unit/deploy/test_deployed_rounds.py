"""Rounds whose clients are nodes of their own: the simulator's numbers, and who learns what."""

import dataclasses

import jax
import numpy as np
import pytest

from pilot_jax import errors
from pilot_jax.config import FederationConfig, PrivacyConfig
from pilot_jax.data.roster import Member, Roster
from pilot_jax.deploy.glue import Node
from pilot_jax.federation.executor import Executor
from pilot_jax.federation.observer import RunObserver
from pilot_jax.federation.parcels import Parcel, packed, unpacked
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
                    lambda: self.state.population[client].adapters, self.dtype)

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


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in ("fedavg", "scaffold") else pytest.mark.long)
                                  for name in DEPLOYED])
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


@pytest.fixture(scope="module")
def fed():
    return toy_federation(make_strategy("scaffold"))


def test_nodes_answer_again_what_they_answered_before(fed, tmp_path):
    """A node whose answer was lost gives the same again without training; one that was killed goes on from its file."""
    class Forgetful(Network):
        def answer(self, kind, client, parcel):
            first = super().answer(kind, client, parcel)
            again = super().answer(kind, client, parcel)  # a new process
            assert kind == "query.finish" or (again.data, again.names) == (first.data, first.names)
            return again

    network = Forgetful(fed, tmp_path)
    network.serve()
    expected, _ = simulated(fed)
    for client in range(3):
        assert_same(network.final(client)["control"], expected.population[client].adapters["control"])
    assert len(list((tmp_path / "c0").glob("0*.safetensors"))) == 2  # the last phase, and the one it began from


def test_the_server_goes_on_from_its_last_phase(fed, tmp_path):
    """A server that dies after a phase asks the next one again, and the run ends as without."""
    class Dies(RunObserver):
        def __init__(self):
            self.states = []

        def phase_ended(self, state, record, mixing, trained):
            self.states.append(state)
            if len(self.states) == 2:
                raise KeyboardInterrupt

    network, observer = Network(fed, tmp_path), Dies()
    with pytest.raises(KeyboardInterrupt):
        network.serve(observer=observer)
    network.serve(observer.states[0])  # the state after the second phase was not saved
    expected, _ = simulated(fed)
    for client in range(3):
        assert_same(network.final(client), CurrentAdapters(fed, expected.population, [client], expected.server)[client])


def test_absent_and_bad_clients_are_left_out(fed, tmp_path):
    """A client that does not answer, or answers nonsense, stays as it was before the phase, local subtrees included."""
    class Partly(Network):
        def answer(self, kind, client, parcel):
            reply = super().answer(kind, client, parcel)
            return self.bad(reply) if (client, parcel.about.get("round"), parcel.about.get("label")) == (
                1, 1, "plain1") else reply

    def nan(parcel):
        return dataclasses.replace(parcel, data=np.full(len(parcel.data) // 4, np.nan, np.float32).tobytes())

    ends = []
    for number, (bad, why) in enumerate([
            (lambda parcel: "did not arrive within 5 seconds", "did not arrive"), (nan, "not finite"),
            (lambda parcel: dataclasses.replace(parcel, data=parcel.data[:-4]), "bytes, expected"),
            (lambda parcel: dataclasses.replace(parcel, names=("control", *parcel.names[1:])), "other subtrees"),
            (lambda parcel: Parcel({"fault": "did not come: InputError; see the log of its node"}), "InputError"),
            (lambda parcel: dataclasses.replace(parcel, about={**parcel.about, "loss": "much"}), "could not convert"),
            ]):
        network, observer, texts = Partly(fed, tmp_path / str(number)), Mixing(), []
        (tmp_path / str(number)).mkdir()
        observer.note = texts.append
        network.bad = bad
        network.serve(observer=observer)
        assert any(why in text and "c1" in text for text in texts), texts
        assert [r["quarantined"] for r in observer.records] == [["c1"], [], []]
        orders = [p.about["version"] for kind, c, p, _ in network.seen if c == 1 and kind != "query.finish"]
        assert orders == [0, 0]  # in round 1, its second phase is left out; round 2 begins as if round 1 had not been
        ends.append(network.final(1))
    for other in ends[1:]:
        assert_same(ends[0], other, 0)


def test_a_client_claims_nothing(fed, tmp_path):
    """The server takes a client's steps and its change's norm from what it knows, whatever the client says."""
    class Boasting(Network):
        def answer(self, kind, client, parcel):
            reply = super().answer(kind, client, parcel)
            about = {**reply.about, "step": 10**9, "update_norm": 0.0, "client": "c0", "task": "t9"}
            return dataclasses.replace(reply, about=about)

    seen = []
    observer = RunObserver()
    observer.client_trained = seen.append
    Boasting(fed, tmp_path).serve(observer=observer)
    assert {r["client"] for r in seen} == {"c0", "c1", "c2"}
    assert all(r["step"] == 3 and r["update_norm"] > 0 and r["task"] in TASKS for r in seen)


def test_noise_is_the_nodes_own_and_is_drawn_once(tmp_path):
    """Noise differs from that of the config's seed, which the server knows; losses are not sent; ε has its limit."""
    privacy = PrivacyConfig(clip=0.5, noise_multiplier=0.4, delta=1e-3)
    private = dataclasses.replace(
        toy_federation(make_strategy("fedavg"), settings=FederationConfig(rounds=1, local_epochs=3, privacy=privacy)),
        most_uploads=2)
    one, other = Network(private, tmp_path / "one"), Network(private, tmp_path / "other")
    for network in (one, other):
        network.folder.mkdir()
        network.serve()
    first, second = one.seen[0][3], other.seen[0][3]
    assert first.names and first.data != second.data and not first.about
    node = one.node(0)
    again = Parcel({"version": 0, "number": 9, "round": 1, "stage": "plain", "label": "plain1"})
    with pytest.raises(errors.InputError, match=r"upload 3 is one more than the 2"):
        node.train(again)


def test_parcels_keep_numbers_and_refuse_others():
    tree = {"b": {"x": np.arange(6, dtype=np.float32).reshape(2, 3) / 3}, "a": {"y": np.float32(7.25)}}
    parcel = packed(tree, ("b", "a"), "float32", {})
    assert len(parcel.data) == 28
    assert_same(unpacked(parcel, tree, "float32"), tree, 0)
    half = packed(tree, ("b", "a"), "bfloat16", {})
    assert len(half.data) == 14
    assert_same(unpacked(half, tree, "bfloat16"), tree, 2**-8)
    with pytest.raises(ValueError, match="has 14 bytes, expected 28"):
        unpacked(half, tree, "float32")
    with pytest.raises(ValueError, match="other subtrees"):
        unpacked(parcel, {"b": tree["b"]}, "float32")


def test_a_server_can_neither_set_nor_ask_for_what_is_local(fed, tmp_path):
    node = Network(fed, tmp_path).node(0)
    about = {"version": 0, "number": 1, "round": 1, "stage": "plain", "label": "plain1"}
    with pytest.raises(errors.InputError, match="the server sent control, which is not for it to set"):
        node.train(packed(node.initial(), ("control",), "float32", about))
    for version in ("../c1/000001", "final"):
        with pytest.raises(ValueError, match="invalid literal"):
            node.train(Parcel({**about, "version": version}))
    assert set(node.train(Parcel(about)).names) == {"text_adapter", "projector", "control_change"}
