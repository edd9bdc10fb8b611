"""Tests of attention, RoPE and LoRA: hand-written gradient rules against autodiff through the plain formulas."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow_except

from pilot_jax.config import ModelConfig
from pilot_jax.errors import InputError
from pilot_jax.kernels import backend
from pilot_jax.kernels.attention import MASKED, attention, causal_attention, check_cudnn
from pilot_jax.kernels.low_rank import linears_with_low_rank, low_rank
from pilot_jax.kernels.pointwise import row_sum
from pilot_jax.models.pretrained import read_shapes


def close(ours, plain):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def plain_attention(q, k, v, bias):
    scores = jnp.einsum("bkgld,bksd->bkgls", q, k) * q.shape[-1]**-0.5 + bias[:, None, None]
    return jnp.einsum("bkgls,bksd->bkgld", jax.nn.softmax(scores, axis=-1), v)


@pytest.mark.parametrize("clients", slow_except({3}, [None, 3]))
@pytest.mark.parametrize("shape", [
    (2, 1, 3, 5, 9, 8), *(pytest.param(shape, marks=pytest.mark.slow)
                          for shape in ((2, 2, 1, 7, 7, 4), (1, 2, 2, 1, 6, 4)))])
def test_attention_and_its_gradient(shape, clients):
    """Shapes (B, KV, G, L, M, hd), alone and vmapped over clients; one query sees no key, and scores reach ±60."""
    batch, kv, groups, length, slots, width = shape
    rng = np.random.default_rng(0)
    lead = () if clients is None else (clients,)
    q, k, v, g = (jnp.asarray(rng.normal(size=(*lead, *s)) * scale, jnp.float32) for s, scale in (
        ((batch, kv, groups, length, width), 6.0), ((batch, kv, slots, width), 6.0), ((batch, kv, slots, width), 1.0),
        ((batch, kv, groups, length, width), 1.0)))
    seen = rng.random((batch, length, slots)) < 0.6
    seen[0, 0] = False
    bias = jnp.where(jnp.asarray(seen), 0.0, MASKED)

    def both(function):
        def run(q, k, v, g):
            out, vjp = jax.vjp(lambda q, k, v: function(q, k, v, bias), q, k, v)
            return out, vjp(g)

        return (run if clients is None else jax.vmap(run))(q, k, v, g)

    close(both(attention), both(plain_attention))


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 3])
def test_causal_attention_of_clients(window):
    """JAX's attention, with the gradient of the clients' sum as in training, agrees with the plain formula."""
    rng, length = np.random.default_rng(0), 8
    q, k, v, g = (jnp.asarray(rng.normal(size=(3, 2, *s)), jnp.float32)
                  for s in ((2, 3, length, 8), (2, length, 8), (2, length, 8), (2, 3, length, 8)))
    behind = np.arange(length)[:, None] - np.arange(length)
    seen = (behind >= 0) & (behind < (window or length))
    bias = jnp.broadcast_to(jnp.where(jnp.asarray(seen), 0.0, MASKED), (2, length, length))

    def gradient(function):
        return jax.grad(lambda q, k, v: jnp.sum(jax.vmap(function)(q, k, v) * g), (0, 1, 2))(q, k, v)

    close(gradient(lambda *qkv: causal_attention(*qkv, window, "xla")),
          gradient(lambda *qkv: plain_attention(*qkv, bias)))


@pytest.mark.parametrize(("platform", "dtype", "changes", "message"), [
    ("cpu", "auto", {}, "sees a cpu"), ("gpu", "float32", {}, "bfloat16 alone"),
    ("tpu", "auto", {}, "sees a tpu"), ("gpu", "auto", {"head_dim": 12}, "have 12"),
    ("gpu", "auto", {"sliding_window": 4, "sliding_layers": (True, False)}, "some layers")])
def test_cudnn_is_refused_where_it_cannot_be(monkeypatch, platform, dtype, changes, message):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    text = read_shapes(ModelConfig())[0].text
    changed = dataclasses.replace(text, **changes)
    with pytest.raises(InputError, match=message):
        check_cudnn(changed.head_dim, changed.layers_see_alike, dtype)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    check_cudnn(text.head_dim, text.layers_see_alike, "auto")


def test_choices_by_backend(monkeypatch):
    """`kernels.backend` makes the documented choices for each kind of device, and the kernels follow them."""
    rng = np.random.default_rng(0)
    x, w, a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((9, 6), (6, 7), (2, 6), (2, 7)))
    products = {}
    for name in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda name=name: name)
        cpu = name == "cpu"
        assert backend.default_dtype() == ("float32" if cpu else "bfloat16")
        assert backend.sums_as_products() is cpu and backend.has_cudnn() is (name == "gpu")
        assert backend.merges_low_rank("float32") is cpu and not backend.merges_low_rank(jnp.bfloat16)
        assert backend.columns_at_once(64) == (2**14 if cpu else 2**20)
        products[name] = linears_with_low_rank(x, (w,), a, (b,))
        counts = [str(jax.make_jaxpr(f)(x)).count("dot_general") for f in  # new functions: nothing is cached
                  (lambda x: row_sum(x), lambda x: linears_with_low_rank(x, (w,), a, (b,)))]
        assert counts == ([1, 2] if cpu else [0, 3])  # B·A and x·(W + B·A); x·W and two thin products
    close(products["gpu"], products["cpu"])


@pytest.mark.parametrize("clients", slow_except({3}, [None, 3]))
def test_low_rank_and_its_gradient(clients):
    rng = np.random.default_rng(0)
    lead = () if clients is None else (clients,)
    x, a, b1, b2, g1, g2 = (jnp.asarray(rng.normal(size=(*lead, *s)), jnp.float32)
                            for s in ((10, 6), (5, 6), (2, 7), (3, 4), (10, 7), (10, 4)))

    def both(function):
        def run(x, a, b1, b2, g1, g2):
            out, vjp = jax.vjp(lambda x, a, b1, b2: function(x, a, (b1, b2)), x, a, b1, b2)
            return out, vjp((g1, g2))

        return (run if clients is None else jax.vmap(run))(x, a, b1, b2, g1, g2)

    close(both(low_rank), both(lambda x, a, bs: (x @ a[:2].T @ bs[0], x @ a[2:].T @ bs[1])))
