"""Tests of the local update against a readable loop: one client at a time, no padding, AdamW written out."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow_except, small_config, tree_max_difference

from pilot_jax.data.arrays import num_steps, visiting_order
from pilot_jax.federation import executor
from pilot_jax.federation.losses import loss_weights, stage_loss
from pilot_jax.federation.phases import learning_rate
from pilot_jax.federation.randomness import client_generator
from pilot_jax.models.vlm import variables
from pilot_jax.runs import prepare
from pilot_jax.testing.phases import train_phase


def shrink(fed, sizes):
    """Returns the federation with clients of the given numbers of samples."""
    clients = tuple(dataclasses.replace(c, train={k: v[:n] for k, v in c.train.items()})
                    for c, n in zip(fed.clients, sizes, strict=False))
    return dataclasses.replace(fed, clients=clients)


@pytest.fixture(scope="module")
def uneven():
    """Three clients of two tasks with 3, 10 and 6 samples; two epochs of batch 4: 2, 6 and 4 steps."""
    config = small_config(federation={"local_steps": None, "local_epochs": 2}, system={"client_chunk": 3})
    fed = prepare.prepare(config).federation
    fed = dataclasses.replace(fed, clients=fed.clients[2:5])
    fed = shrink(fed, (3, 10, 6))
    adapters = prepare.initial_adapters(fed)
    rng = np.random.default_rng(0)  # no zeros, so that every term matters
    noisy = jax.tree.map(lambda x: (x + 0.02 * rng.normal(size=x.shape)).astype(np.float32), adapters)
    return fed, noisy


def with_train(fed, **changes):
    return dataclasses.replace(fed, train=fed.train.model_copy(update=changes))


def readable_update(fed, adapters, client, stage, label):
    """Trains one client in a plain, slow loop, whose result `local_update` must equal."""
    train, own = fed.train, fed.clients[client]
    steps = num_steps(own.size, train.batch_size, fed.settings.local_epochs, None)
    order, real = visiting_order(client_generator(0, own.name, 1, label), own.size, train.batch_size, steps)
    trained_names = {"stage1": ("text_adapter", "task", "client"),
                     "stage2": ("text_adapter", "task", "cross_task", "router")}[stage]
    params = {n: jax.tree.map(lambda x: np.asarray(x, np.float64), adapters[n]) for n in trained_names}
    rest = {n: t for n, t in adapters.items() if n not in trained_names}
    first = jax.tree.map(np.zeros_like, params)
    second = jax.tree.map(np.zeros_like, params)
    module, base = fed.model.module, fed.model.base

    @jax.jit
    def gradient(params, batch):
        def loss(params):
            logits, aux = module.apply(variables(base, {**rest, **params}), batch, stage, fed.task_index(client),
                                       method="target_logits")
            return stage_loss(logits, aux, batch, loss_weights(train, stage))[0]

        return jax.value_and_grad(loss)(params)

    losses = []
    for i in range(steps):
        batch = {k: jnp.asarray(v[order[i][real[i]]]) for k, v in own.train.items()}
        loss, grads = gradient(jax.tree.map(jnp.float32, params), batch)
        losses.append(float(loss))
        warm = max(1, int(np.ceil(train.warmup * steps)))
        factor = min(1, (i + 1) / warm) * 0.5 * (1 + np.cos(np.pi * i / steps))
        for name in trained_names:
            lora_peak = train.lr_lora_stage1 if stage == "stage1" else train.lr_lora_stage2
            rate = factor * (lora_peak if name == "text_adapter" else train.lr_connector)
            g = jax.tree.map(lambda x: np.asarray(x, np.float64), grads[name])
            if train.optimizer == "sgd":
                params[name] = jax.tree.map(lambda p, g, r=rate: p - r * g, params[name], g)
                continue
            first[name] = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first[name], g)
            second[name] = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second[name], g)
            params[name] = jax.tree.map(
                lambda p, m, v, r=rate, t=i + 1:
                p - r * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + train.adam_epsilon),
                params[name], first[name], second[name])
    return {**adapters, **params}, losses


# SGD is linear in the gradient and so, to first order, is AdamW if ε is well above the gradients' rounding errors: then
# every entry agrees. At the usual ε = 1e-8, the rounding error of an entry whose true gradient is 0 moves it by as much
# as the learning rate, in the package and in the loop, so that they cannot agree.
OPTIMIZERS = {
    "sgd": {"optimizer": "sgd", "lr_connector": 0.02, "lr_lora_stage1": 0.02, "lr_lora_stage2": 0.02},
    "adamw": {"adam_epsilon": 1e-3},
}
OPTIMIZERS |= {f"{name} in parts": keys | {"microbatch": 2} for name, keys in OPTIMIZERS.items()}  # of batches of 4


@pytest.mark.parametrize(("stage", "optimizer"), slow_except(
    (), [("stage1", "adamw"), ("stage2", "sgd"), ("stage1", "sgd in parts"), ("stage2", "adamw in parts")],
    {("stage2", "sgd")}))
def test_vmapped_unequal_clients_equal_a_readable_loop(uneven, stage, optimizer):
    fed, adapters = uneven
    fed = with_train(fed, **OPTIMIZERS[optimizer])
    everyone = {i: adapters for i in range(3)}
    together, records = train_phase(fed, everyone, 1, stage, stage)
    assert [r["step"] for r in records] == [2, 6, 4]
    for client in range(3):
        expected, losses = readable_update(fed, adapters, client, stage, stage)
        for name in expected:
            assert tree_max_difference(together[client][name], expected[name]) <= 1e-5, name
        assert records[client]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
        assert records[client]["last_loss"] == pytest.approx(losses[-1], rel=1e-3)
        moved = tree_max_difference(together[client]["text_adapter"], adapters["text_adapter"])
        assert moved > 1e-4


@pytest.mark.parametrize("stage", slow_except((), ["stage1", "stage2"], {"stage2"}))
def test_chunk_size_and_company_change_nothing(uneven, stage):
    """With SGD, which does not amplify rounding errors, all chunk sizes and a client alone agree to 1e-5."""
    fed, adapters = uneven
    results = {}
    sgd = with_train(fed, optimizer="sgd", lr_connector=0.03, lr_lora_stage1=0.03, lr_lora_stage2=0.03)
    for chunk in (1, 2, 3):
        results[chunk], _ = train_phase(sgd, {i: adapters for i in range(3)}, 1, stage, stage,
                                                 executor.Executor(chunk))
    alone, _ = train_phase(sgd, {1: adapters}, 1, stage, stage, executor.Executor(3))
    assert tree_max_difference(results[1], results[3]) <= 1e-5
    assert tree_max_difference(results[2], results[3]) <= 1e-5
    assert tree_max_difference(alone[1], results[3][1]) <= 1e-5
    assert tree_max_difference(results[3][1]["text_adapter"], adapters["text_adapter"]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_frozen_subtrees_stay_bit_identical(uneven, stage):
    fed, adapters = uneven
    after, _ = train_phase(fed, {0: adapters}, 1, stage, stage)
    untouched = {"stage1": {"task_bank", "cross_task", "router"}, "stage2": {"client", "task_bank"}}[stage]
    for name in adapters:
        same = all(np.array_equal(a, b) for a, b in
                   zip(jax.tree.leaves(after[0][name]), jax.tree.leaves(adapters[name]), strict=True))
        assert same == (name in untouched), name


def test_learning_rate():
    """The first rate is above zero, the warm-up lasts ⌈0.03·S⌉ steps, and a cosine falls to zero over all steps."""
    total = 100
    rates = [float(learning_rate(2.0, 0.03, jnp.asarray(i), jnp.asarray(total))) for i in range(total)]
    expected = [2.0 * min(1, (i + 1) / 3) * 0.5 * (1 + np.cos(np.pi * i / total)) for i in range(total)]
    np.testing.assert_allclose(rates, expected, rtol=1e-4, atol=1e-6)
    assert rates[0] > 0


@pytest.mark.parametrize(("warmup", "ramp"), [(0.03, 3), (0.0, 1), (0.005, 1), (1.0, 100)])
def test_a_constant_learning_rate_stays_at_its_peak(warmup, ramp):
    """After ⌈warmup·S⌉ steps, or from the first step on without warm-up, it is the peak."""
    total = 100
    rates = [learning_rate(2.0, warmup, jnp.asarray(i), jnp.asarray(total), "constant") for i in range(total)]
    expected = 2.0 * np.minimum(1, (np.arange(total, dtype=np.float64) + 1) / ramp)
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    assert float(rates[-1]) == 2.0 and (warmup > 0.01 or float(rates[0]) == 2.0)


@pytest.mark.parametrize("warmup", [0.0, 0.03])
def test_a_linear_learning_rate_falls_to_zero(warmup):
    total = 100
    rates = [learning_rate(2.0, warmup, jnp.asarray(i), jnp.asarray(total), "linear") for i in range(total)]
    rise = np.minimum(1, (np.arange(total, dtype=np.float64) + 1) / max(1, np.ceil(warmup * total)))
    np.testing.assert_allclose(rates, 2.0 * rise * (1 - np.arange(total) / total), rtol=1e-5)


def test_visiting_order_covers_each_epoch_once():
    order, real = visiting_order(np.random.default_rng(0), 10, 4, 6)
    for epoch in (slice(0, 3), slice(3, 6)):
        assert sorted(order[epoch][real[epoch]]) == list(range(10))
    short, _ = visiting_order(np.random.default_rng(0), 10, 4, 2)
    assert short.shape == (2, 4)
