"""Tests of the losses and CT-MoA against NumPy in float64, written from the formulas and not from the code."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from pilot_jax.federation import losses
from pilot_jax.models import connector

RNG = np.random.default_rng(0)


def softmax64(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_cross_entropy():
    logits, targets = RNG.normal(size=(3, 5, 7)) * 3, RNG.integers(0, 7, (3, 5))
    weight = RNG.integers(0, 2, (3, 5)).astype(float)
    total = sum(-np.log(softmax64(logits[b, a])[targets[b, a]]) for b in range(3) for a in range(5) if weight[b, a])
    ours = losses.cross_entropy(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weight))
    np.testing.assert_allclose(ours, total / weight.sum(), rtol=1e-5)


def difference64(x_t, x_s, mode, center):
    """Computes each mode by its definition, with the large arrays that the package must not build."""
    x_t, x_s = x_t.astype(np.float64), x_s.astype(np.float64)
    b, n, c = x_t.shape
    if center:
        x_t, x_s = x_t - x_t.mean(1, keepdims=True), x_s - x_s.mean(1, keepdims=True)
    if mode == "flat":
        product = x_t.reshape(b, n * c).T @ x_s.reshape(b, n * c)  # (N·C)²
        return np.mean(product**2)
    out = []
    for a, s in zip(x_t, x_s, strict=True):
        if mode == "token_cosine":
            eps = 0.1 * np.mean(np.linalg.norm(a, axis=1))
            a = a / np.sqrt(np.sum(a**2, 1, keepdims=True) + eps**2)
            s = s / np.sqrt(np.sum(s**2, 1, keepdims=True) + eps**2)
            out.append(np.linalg.norm(a.T @ s, "fro") ** 2 / n**2)
        else:
            out.append(np.linalg.norm(a.T @ s, "fro") ** 2)
    return np.mean(out)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("mode", ["token_cosine", "raw", "flat"])
def test_difference_loss_and_padding(mode, center):
    x_t, x_s = RNG.normal(size=(3, 6, 5)), RNG.normal(size=(3, 6, 5)) * 0.3
    expected = difference64(x_t, x_s, mode, center)
    ones = jnp.ones(3)
    ours = losses.difference_loss(jnp.asarray(x_t), jnp.asarray(x_s), ones, mode, center)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    padded = [jnp.concatenate([jnp.asarray(x), 9.0 * jnp.ones((2, 6, 5))]) for x in (x_t, x_s)]
    with_padding = losses.difference_loss(*padded, jnp.asarray([1, 1, 1, 0, 0.0]), mode, center)
    np.testing.assert_allclose(with_padding, expected, rtol=1e-5)


@pytest.mark.parametrize("mode", ["token_cosine", "raw", "flat"])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-6])
def test_difference_loss_is_finite_near_zero(mode, scale):
    x_t, x_s = jnp.asarray(RNG.normal(size=(2, 4, 3))), jnp.asarray(RNG.normal(size=(2, 4, 3)) * scale)
    value, grads = jax.value_and_grad(
        lambda a, b: losses.difference_loss(a, b, jnp.ones(2), mode), argnums=(0, 1))(x_t, x_s)
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in grads)


def all_shapes(jaxpr):
    """Yields the shape of every array in a jaxpr and in the jaxprs inside it."""
    for equation in jaxpr.eqns:
        for var in (*equation.invars, *equation.outvars):
            yield getattr(var.aval, "shape", ())
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from all_shapes(inner)


@pytest.mark.parametrize("mode", ["token_cosine", "raw", "flat"])
def test_difference_loss_never_builds_a_feature_square(mode):
    """At LLaVA-1.5's size of 576 × 4096, value and gradient need no C×C array and none larger than the inputs."""
    b, n, c = 2, 576, 4096
    x = jax.ShapeDtypeStruct((b, n, c), jnp.float32)
    jaxpr = jax.make_jaxpr(jax.value_and_grad(
        lambda a, s: losses.difference_loss(a, s, jnp.ones(b), mode), argnums=(0, 1)))(x, x)
    shapes = set(all_shapes(jaxpr.jaxpr))
    assert (b, n, c) in shapes  # the inputs are found
    for shape in shapes:
        assert sum(d >= c for d in shape) <= 1, shape  # no C×C, no (N·C)×…
        assert int(np.prod(shape)) <= b * n * c, shape


def test_flat_runs_at_real_size():
    x = jax.random.normal(jax.random.key(0), (2, 576, 4096))
    assert np.isfinite(jax.jit(lambda a: losses.difference_loss(a, a, jnp.ones(2), "flat"))(x))


def test_router_losses():
    logits, weight = RNG.normal(size=(4, 6, 3)) * 2, np.asarray([1, 1, 1, 0.0])
    balance, z = [], []
    for image in logits[:3]:
        probs = softmax64(image)
        share = np.bincount(probs.argmax(-1), minlength=3) / len(image)
        balance.append(3 * np.sum(share * probs.mean(0)))
        z.append(np.mean(np.log(np.exp(image).sum(-1)) ** 2))
    ours = jnp.asarray(logits), jnp.asarray(weight)
    np.testing.assert_allclose(losses.balance_loss(*ours), np.mean(balance), rtol=1e-5)
    np.testing.assert_allclose(losses.z_loss(*ours), np.mean(z), rtol=1e-5)


def random_mlp(*lead, d=4, c=6):
    return {"linear_1": {"kernel": RNG.normal(size=(*lead, d, c)), "bias": RNG.normal(size=(*lead, c))},
            "linear_2": {"kernel": RNG.normal(size=(*lead, c, c)), "bias": RNG.normal(size=(*lead, c))}}


def mlp64(adapter, h, index=None):
    take = (lambda a: a[index]) if index is not None else (lambda a: a)
    one, two = adapter["linear_1"], adapter["linear_2"]
    x = h @ take(one["kernel"]) + take(one["bias"])
    x = 0.5 * x * (1 + erf(x / np.sqrt(2)))
    return x @ take(two["kernel"]) + take(two["bias"])


@pytest.mark.parametrize("own", [0, 1, 2])
def test_ct_moa(own):
    tasks, features = 3, RNG.normal(size=(2, 5, 4))
    adapters = {"task": random_mlp(), "client": random_mlp(), "task_bank": random_mlp(tasks),
                "cross_task": random_mlp(tasks), "router": {"kernel": RNG.normal(size=(4, tasks))}}
    probs = softmax64(features @ adapters["router"]["kernel"])
    expected = mlp64(adapters["client"], features)
    for i in range(tasks):
        if i == own:
            expert = mlp64(adapters["task"], features)
        else:
            expert = mlp64(adapters["task_bank"], features, i) + mlp64(adapters["cross_task"], features, i)
        expected = expected + probs[..., i:i + 1] * expert
    ours, aux = connector.stage2(jax.tree.map(jnp.asarray, adapters), jnp.asarray(features), own)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(aux["router_logits"], features @ adapters["router"]["kernel"], rtol=1e-5, atol=1e-6)


def test_ct_moa_without_other_tasks():
    features = RNG.normal(size=(2, 5, 4))
    adapters = {"task": random_mlp(), "client": random_mlp(), "task_bank": random_mlp(1),
                "cross_task": random_mlp(1), "router": {"kernel": RNG.normal(size=(4, 1))}}
    ours, _ = connector.stage2(jax.tree.map(jnp.asarray, adapters), jnp.asarray(features), 0)
    expected = mlp64(adapters["task"], features) + mlp64(adapters["client"], features)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_stage1_sums_task_and_client_features():
    adapters, features = {"task": random_mlp(), "client": random_mlp()}, RNG.normal(size=(2, 5, 4))
    ours, aux = connector.stage1(jax.tree.map(jnp.asarray, adapters), jnp.asarray(features))
    x_t, x_s = mlp64(adapters["task"], features), mlp64(adapters["client"], features)
    np.testing.assert_allclose(ours, x_t + x_s, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(aux["x_s"], x_s, rtol=1e-5, atol=1e-5)
