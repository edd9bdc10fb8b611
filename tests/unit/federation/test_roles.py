"""Tests of which subtree is trained, frozen, uploaded and aggregated, by the method's rules, on the running code."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Records, slow_except, small_config

from pilot_jax.federation import rounds
from pilot_jax.federation.client import client_loss
from pilot_jax.federation.cohort import Cohort
from pilot_jax.federation.losses import LossWeights, stage_loss
from pilot_jax.federation.phases import phase_spec
from pilot_jax.federation.strategies import STRATEGIES, make_strategy
from pilot_jax.models.vlm import variables
from pilot_jax.runs import prepare

TABLE = {  # the method's table: subtree → (stage 1, stage 2, scope, aggregated by)
    "vision_tower": ("frozen", "frozen", "base", "never"),
    "language_model": ("frozen", "frozen", "base", "never"),
    "text_adapter": ("trained", "trained", "shared", "ata"),
    "task": ("trained", "trained", "shared", "per_task_mean"),
    "client": ("trained", "frozen", "local", "never"),
    "task_bank": ("-", "frozen", "received", "never"),
    "cross_task": ("-", "trained", "local", "never"),
    "router": ("-", "trained", "local", "never"),
}


def batch_of(fed, client, rows=slice(0, 4)):
    return {k: jnp.asarray(v[rows]) for k, v in fed.clients[client].train.items()}


def test_pilot_table():
    rows = make_strategy("pilot").roles().rows
    assert {r.subtree: (r.modes["stage1"], r.modes["stage2"], r.scope, r.aggregated_by) for r in rows} == TABLE


def under(setup, name):
    """Returns the federation with the same data and model under another strategy."""
    config = small_config(strategy={"name": name})
    return prepare.with_strategy(setup, make_strategy(config.strategy), config).federation


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_every_leaf_has_exactly_one_owner(setup, name):
    fed = under(setup, name)
    adapters = prepare.initial_adapters(fed)  # raises if the roles do not cover it
    with pytest.raises(AssertionError, match="not covered"):
        fed.strategy.roles().check(adapters | {"stray": np.zeros(1)})
    for stage in set(fed.strategy.first_stages):
        trained, frozen = fed.phase(stage).split(adapters)
        assert not set(trained) & set(frozen)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_step_zero_is_the_base_model(federation, stage):
    """With `init: preserve`, untrained adapters compute the base's loss in both stages."""
    fed, _, state = federation
    train = fed.train.model_copy(update={"lambda_d": 0.0, "lambda_b": 0.0, "lambda_z": 0.0})
    for client in (0, 4, 8):
        batch = batch_of(fed, client)
        logits, _ = fed.model.module.apply(variables(fed.model.base, {"projector": fed.model.base["projector"]}),
                                           batch, "plain", method="target_logits")
        base = stage_loss(logits, {}, batch, LossWeights())[0]
        phase = phase_spec(fed.model.module, fed.strategy.roles(), stage, train)
        adapters = jax.tree.map(jnp.asarray, state.population[client].adapters)
        ours, _ = client_loss(phase, fed.model.base, adapters, {}, batch, fed.task_index(client))
        assert float(base) > 0.5
        np.testing.assert_allclose(ours, base, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_every_trained_leaf_gets_a_gradient_within_two_steps(federation, stage):
    fed, _, state = federation
    phase = fed.phase(stage)
    adapters = jax.tree.map(jnp.asarray, state.population[4].adapters)
    trained, frozen = phase.split(adapters)
    seen = jax.tree.map(lambda leaf: False, trained)
    for _ in range(2):
        grads = jax.grad(lambda t: client_loss(phase, fed.model.base, t, frozen, batch_of(fed, 4),
                                               fed.task_index(4))[0])(trained)
        assert set(grads) == set(trained) and not set(grads) & set(frozen)
        seen = jax.tree.map(lambda s, g: s or bool(jnp.any(g != 0)), seen, grads)
        trained = jax.tree.map(lambda p, g: p - 0.1 * g, trained, grads)
    missing = [jax.tree_util.keystr(p) for p, s in jax.tree_util.tree_leaves_with_path(seen) if not s]
    assert not missing


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "terms"), [("stage1", ("difference",)), ("stage2", ("balance", "z"))])
def test_only_cross_entropy_reaches_lora(federation, stage, terms):
    fed, _, state = federation
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: jnp.asarray(x + 0.05 * rng.normal(size=x.shape), jnp.float32),
                            state.population[0].adapters)
    phase = fed.phase(stage)

    def term(lora, name):
        return client_loss(phase, fed.model.base, {**adapters, "text_adapter": lora}, {}, batch_of(fed, 0), 0)[1][name]

    for name in terms:
        grads = jax.grad(term)(adapters["text_adapter"], name)
        assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(grads)), name
    grads = jax.grad(term)(adapters["text_adapter"], "ce")
    assert all(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(grads))


def poison(tree):
    return jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), tree)


def test_nothing_local_can_be_uploaded(federation):
    """If local and received leaves are NaN, uploads stay finite, and so do all downloads."""
    fed, _, state = federation
    roles = fed.strategy.roles()
    uploads = []
    for client in state.population:
        dirty = {n: t if n in ("text_adapter", "task") else poison(t) for n, t in client.adapters.items()}
        upload = roles.upload(dirty, "stage1")
        assert set(upload) == {"text_adapter", "task"}
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(upload))
        uploads.append(upload)
    stacked = jax.tree.map(lambda *x: np.stack(x), *uploads)
    tasks = np.asarray([fed.task_index(i) for i in range(9)])
    out = fed.strategy.aggregate(Cohort(stacked, np.arange(1, 10), tasks, np.arange(9), 1), state.server)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(out.downloads))
    assert set(out.downloads) == {"text_adapter", "task", "task_bank"}


@pytest.mark.parametrize("name", slow_except((), STRATEGIES, {"pilot", "scaffold", "feddpa"}))
def test_a_round_moves_what_the_table_says(setup, name):
    """After a round, the base is unchanged, and shared subtrees are equal between clients exactly where aggregation
    makes them so."""
    fed = under(setup, name)
    base_before = jax.tree.map(np.array, fed.model.base)
    start = prepare.initial_state(fed)
    told = Records()
    end, = rounds.run_round([fed], [start], setup.executor, [told])
    assert all(np.array_equal(a, b) for a, b in
               zip(jax.tree.leaves(base_before), jax.tree.leaves(fed.model.base), strict=True))
    if name == "centralised":
        assert len(end.population) == 1 and end.bytes_up == end.bytes_down == 0
        return
    first, second, other = end.population[0].adapters, end.population[1].adapters, end.population[3].adapters

    def equal(a, b):
        return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

    roles = fed.strategy.roles()
    for stage in set(fed.strategy.first_stages):
        for subtree in roles.names(stage=stage, mode="trained"):
            assert not equal(first[subtree], start.population[0].adapters[subtree]), subtree
    if name in ("pilot", "pilot_split_half"):
        assert set(told.mixing) == {(1, "stage1"), (1, "stage2")}
        assert equal(first["task"], second["task"]) and not equal(first["task"], other["task"])
        assert equal(first["task_bank"], other["task_bank"])
        for local in ("client", "cross_task", "router", "text_adapter"):
            assert not equal(first[local], second[local]), local
        return
    if name in ("fedalt", "fedlease"):  # what their clients have in common: test_expert_strategies
        return
    frozen = roles.names(stage=fed.strategy.first_stages[-1], mode="frozen")
    for row in roles.adapter_rows:
        if row.subtree == "control_change":  # uploaded, not returned
            continue
        alike = row.scope == "received" or (row.scope == "shared" and fed.strategy.one_model) or (
            row.subtree in frozen and row.subtree != "others_adapter")  # FedMosaic's own mixture for each client
        for one in (second, other):
            assert equal(first[row.subtree], one[row.subtree]) == alike, row.subtree
    if name == "local":
        assert end.bytes_up == end.bytes_down == 0


def test_bytes_are_those_of_the_selection(federation):
    fed, _, state = federation
    adapters = state.population[0].adapters
    up, down = fed.strategy.sent_bytes(adapters)
    count = lambda name: 4 * sum(x.size for x in jax.tree.leaves(adapters[name]))  # noqa: E731
    assert up == {"text_adapter": count("text_adapter"), "task": count("task")}
    assert down == {"text_adapter": count("text_adapter"), "task_bank": 3 * count("task")}


def test_initial_lora_is_one_for_all_and_copies_start_equal():
    fed = prepare.prepare(small_config(strategy={"init": "copy"})).federation
    state = prepare.initial_state(fed)
    first, last = state.population[0].adapters, state.population[8].adapters
    assert np.array_equal(first["text_adapter"]["layers"]["q"]["a"], last["text_adapter"]["layers"]["q"]["a"])
    assert np.all(first["text_adapter"]["layers"]["q"]["b"] == 0)
    for a, b in zip(jax.tree.leaves(first["task"]), jax.tree.leaves(first["client"]), strict=True):
        assert np.array_equal(a, b)
