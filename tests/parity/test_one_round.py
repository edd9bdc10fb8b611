"""A whole round of the package's Pilot against `examples/one_round_numpy.py`, which is NumPy in float64 alone.

The package's own rounds, local updates, losses, connector, LoRA, ownership table, distances and mixing run here. Only
the language model is the example's: one layer with a head.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, Records, tree_max_difference

from pilot_jax.config import FederationConfig, TrainConfig
from pilot_jax.data.arrays import ClientData, visiting_order
from pilot_jax.federation.randomness import client_generator
from pilot_jax.federation.strategies import make_strategy
from pilot_jax.models.connector import Connector
from pilot_jax.models.lora import lora_linears
from pilot_jax.testing.toy import run_toy, toy_federation, toy_state

FILE = ROOT / "examples" / "one_round_numpy.py"
# Largest difference, as a share of how far an adapter has moved in the round. Most of what is seen, 2e-5, is AdamW's
# 1 − 0.999 in float32.
MOVED = 1e-4


def load_example():
    spec = importlib.util.spec_from_file_location(FILE.stem, FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The example's federation for the package.


@dataclasses.dataclass(frozen=True)
class SmallVlm:
    """The package's connector and LoRA, and the example's language model."""

    lora_scale: float

    def apply(self, variables, batch, stage, task_index, *, method):
        assert method == "target_logits"
        base = variables["params"]["decoder"]
        x, aux = Connector().apply({"connector": variables["connector"]["connector"]}, batch["features"], stage,
                                   task_index)
        first = jax.tree.map(lambda leaf: leaf[0], variables["lora"]["decoder"]["layers"])
        hidden, = lora_linears(x.reshape(-1, x.shape[-1]), (base["layer"].T,), first, ("q",), self.lora_scale)
        return jnp.mean(jnp.tanh(hidden).reshape(x.shape), axis=1, keepdims=True) @ base["head"].T, aux


def client_data(name, client):
    n = client["n"]
    train = {"input_ids": np.zeros((n, 8), np.int32), "attention_mask": np.ones((n, 8), np.int32),
             "target_positions": np.zeros((n, 1), np.int32), "target_ids": client["y"][:, None].astype(np.int32),
             "target_weights": np.ones((n, 1), np.float32), "has_image": np.ones(n, np.float32),
             "features": client["H"].astype(np.float32)}
    return ClientData(name, f"t{client['task']}", train, {})


def package_names(adapters, tasks):
    """The example's adapters, or an upload, as the package's subtrees, float32."""
    def psi(one):
        return {f"linear_{i}": {"kernel": one[f"w{i}"], "bias": one[f"b{i}"]} for i in (1, 2)}

    def stack(name):
        return jax.tree.map(lambda *leaves: np.stack(leaves), *(psi(adapters[name, i]) for i in range(tasks)))

    out = {name: psi(adapters[name]) for name in ("task", "client") if name in adapters}
    out |= {ours: stack(name) for ours, name in (("task_bank", "bank"), ("cross_task", "cross"))
            if (name, 0) in adapters}
    if "router" in adapters:
        out["router"] = {"kernel": adapters["router"]["w"]}
    out["text_adapter"] = {"layers": {"q": {name: w[None] for name, w in adapters["lora"].items()}}}
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), out)


@contextlib.contextmanager
def compiled_quickly():
    """Compiling is most of this test's time, and the programs run for milliseconds."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


class Phases(Records):
    """Keeps every client's adapters after each phase."""

    def __init__(self):
        super().__init__()
        self.adapters = []

    def phase_ended(self, state, record, mixing, trained):
        super().phase_ended(state, record, mixing, trained)
        self.adapters.append([client.adapters for client in state.population])


@pytest.fixture(scope="module")
def round_one():
    """(clients, start, batches) for the example, and (what each client starts from, what was seen of the package's
    round, the uploads in their order)."""
    example = load_example()
    clients, start = example.make_federation()
    names = [f"c{k}" for k in range(example.K)]
    train = TrainConfig(batch_size=example.B, warmup=example.WARMUP, adam_epsilon=example.ADAM_EPSILON,
                        lr_connector=example.RATE, lr_lora_stage1=example.LORA_RATE[1],
                        lr_lora_stage2=example.LORA_RATE[2])
    fed = toy_federation(make_strategy("pilot"), [client_data(*pair) for pair in zip(names, clients, strict=True)],
                         FederationConfig(rounds=1), train)
    base = {"decoder": {name: w.astype(np.float32) for name, w in example.BASE.items()}}
    model, uploads = types.SimpleNamespace(module=SmallVlm(example.LORA_SCALE), base=base), []
    fed = dataclasses.replace(fed, model=model, tamper=lambda name, round_, upload, before: uploads.append(
        (name, upload)) or upload)
    adapters = package_names(start | {("bank", i): start["task"] for i in range(example.T)}, example.T)
    seen = Phases()
    with compiled_quickly():
        run_toy(fed, toy_state(fed, adapters), seen)

    def batches(k, stage):
        """What the package's executor visits: the same numbers from the same generator."""
        rng, n = client_generator(fed.seed, names[k], 1, f"stage{stage}"), clients[k]["n"]
        return [rows[real] for rows, real in zip(*visiting_order(rng, n, example.B, fed.full_steps(k)), strict=True)]

    assert len({fed.full_steps(k) for k in range(example.K)}) > 1
    return (clients, start, batches), (adapters, seen, uploads)


# The comparison: of every term of the loss, every upload, ATA's weights, and all adapters after each stage.


def apart(got, want, start):
    """Largest difference between two subtrees, as a share of how far the second is from its start."""
    def most(a, b):
        return max(float(np.abs(np.float64(x) - y).max()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))

    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert most(want, start) > 1e-2  # it has learnt
    return most(got, want) / most(want, start)


def of_a_client(stage, k, tasks, start, adapters, sent, record):
    """What differs in a stage between the example's client k and the package's: {what: how much}."""
    want = package_names(stage["adapters"][k], tasks)
    uploads, history = package_names(stage["uploads"][k], tasks), stage["losses"][k]
    assert set(adapters) == set(want) and set(sent) == set(uploads) == {"task", "text_adapter"}
    out = {f"upload of {what}": apart(sent[what], tree, start[what]) for what, tree in uploads.items()}
    untouched = {"cross_task", "router"} if "difference" in history[0] else set()  # by stage 1
    for what, tree in want.items():
        if what in untouched:
            assert tree_max_difference(adapters[what], tree) == 0
        else:
            out[what] = apart(adapters[what], tree, start[what])
    for term in history[0]:
        out[f"mean of {term}"] = abs(record[term] - np.mean([step[term] for step in history]))
    return out | {"last loss": abs(record["last_loss"] - history[-1]["loss"])}


def differences(stages, package, tasks):
    """What differs after each of the example's stages from the package's, {what: how much}, one stage after another."""
    start, seen, uploads = package
    for number, stage in enumerate(stages):
        label, phase = f"stage{number + 1}", seen.adapters[number]
        records = [r for r in seen.records if r["phase"] == label and "client" in r]
        sent = sorted(uploads[number * len(phase):][:len(phase)], key=lambda pair: pair[0])  # they come as trained
        assert [r["client"] for r in records] == [name for name, _ in sent] == [f"c{k}" for k in range(len(phase))]
        out = {(label, "weights of ATA"): float(np.abs(seen.mixing[1, label]["weights"] - stage["weights"]).max())}
        for k, adapters in enumerate(phase):
            found = of_a_client(stage, k, tasks, start, adapters, sent[k][1], records[k])
            out |= {(label, f"c{k}", what): much for what, much in found.items()}
        yield out


def test_the_package_does_what_the_example_says(round_one):
    example, (problem, package) = load_example(), round_one
    found = list(differences(example.one_round(*problem), package, example.T))
    assert len(found) == len(package[1].adapters) == 2
    for stage in found:
        print("largest differences:", sorted(((v, k) for k, v in stage.items()), reverse=True)[:5])
        assert not {what: much for what, much in stage.items() if not much <= MOVED}


def weight_of(term, factor):
    return lambda example: {"LOSS_WEIGHTS": {**example.LOSS_WEIGHTS, term: factor * example.LOSS_WEIGHTS[term]}}


def constant(name, value):
    return lambda example: {name: value}


def lora_by_task(example):
    """Every client receives the mean LoRA of its task, weighted by data, in place of ATA's mixture."""
    def aggregate(uploads, clients):
        _, downloads = right(uploads, clients)
        weights = np.array([[b["n"] * (a["task"] == b["task"]) for b in clients] for a in clients], float)
        weights /= weights.sum(axis=1, keepdims=True)
        return weights, [d | {"lora": example.mix([u["lora"] for u in uploads], row)}
                         for d, row in zip(downloads, weights, strict=True)]

    right = example.aggregate
    return {"aggregate": aggregate}


def tasks_without_sizes(example):
    """A task's ψ_t is the plain mean of its clients'."""
    right = example.aggregate
    return {"aggregate": lambda uploads, clients: right(uploads, [c | {"n": 1} for c in clients])}


def without_client_adapter(example):
    """Stage 2 without ψ_s, as in the authors' release."""
    right = example.mixture

    def mixture(p, H, own):
        x, logits = right(p, H, own)
        return x - example.mlp(p["client"], H), logits

    return {"mixture": mixture}


def differentiable_scale(example):
    """L_d with a gradient through ε."""
    right = example.losses
    return {"losses": lambda p, H, y, own, stage, _, share: right(p, H, y, own, stage, 0.1 * np.linalg.norm(
        example.mlp(p["task"], H), axis=2).mean(axis=1)[:, None, None], share)}


@pytest.mark.parametrize("wrong", [
    weight_of("difference", 1.1), constant("AUTO_FACTOR", 0.3), constant("NEIGHBORS", 1),
    constant("WARMUP", 0.03), lora_by_task, tasks_without_sizes, without_client_adapter, differentiable_scale,
], ids=["L_d", "temperature", "neighbours", "warm-up", "LoRA", "sizes", "no ψ_s", "ε"])
def test_what_is_wrong_is_seen(round_one, wrong):
    """An example with one thing changed differs from the package by ten times what is allowed, or more."""
    example, (problem, package) = load_example(), round_one
    vars(example).update(wrong(example))
    assert any(much > 10 * MOVED for stage in differences(example.one_round(*problem), package, example.T)
               for much in stage.values())
