"""Tests of hand-written gradient rules and skipped work against autodiff through the plain formulas in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import IMAGE_TOKEN, slow_except, write_llava

import pilot_jax
from pilot_jax.kernels.low_rank import merged
from pilot_jax.kernels.pointwise import normalized, rms_norm, swiglu, weighted
from pilot_jax.models.lora import init_lora

PLAIN = {
    rms_norm: lambda x, scale: x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * scale,
    swiglu: lambda gate, up: gate / (1 + jnp.exp(-gate)) * up,
    normalized: lambda x, eps2: x / jnp.sqrt(jnp.sum(x**2, -1, keepdims=True) + eps2),
    weighted: lambda x, weight: x * weight,
}
SHAPES = {rms_norm: ((6, 5), (5,)), swiglu: ((6, 5), (6, 5)), normalized: ((6, 5), (6, 1)),
          weighted: ((6, 5), (6, 1))}


def value_and_gradients(function, arguments, cotangent, clients):
    def run(arguments, cotangent):
        out, vjp = jax.vjp(function, *arguments)
        return out, vjp(cotangent)

    return (run if clients is None else jax.vmap(run))(arguments, cotangent)


@pytest.mark.parametrize("clients", slow_except([3], [None, 3]))
@pytest.mark.parametrize("function", PLAIN, ids=lambda f: f.__name__)
def test_rule_equals_autodiff_in_float64(function, clients):
    rng = np.random.default_rng(0)
    lead = () if clients is None else (clients,)
    arguments = [rng.normal(size=(*lead, *shape)) for shape in SHAPES[function]]
    if function is normalized:
        arguments[1] = arguments[1]**2 + 0.01
    cotangent = rng.normal(size=(*lead, *SHAPES[function][0]))
    ours_fn = (lambda x, scale: rms_norm(x, scale, 1e-5)) if function is rms_norm else function
    ours = value_and_gradients(ours_fn, [jnp.asarray(a, jnp.float32) for a in arguments],
                               jnp.asarray(cotangent, jnp.float32), clients)
    with jax.enable_x64(True):
        plain = jax.tree.map(np.array, value_and_gradients(PLAIN[function], [jnp.asarray(a) for a in arguments],
                                                             jnp.asarray(cotangent), clients))
    if function is normalized:  # the rule treats ε as a constant
        assert not np.any(ours[1][1])
        plain[1][1][...] = 0
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert b.dtype == np.float64
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("clients", [None, 3])
def test_merged_linears(clients):
    """x·(W + BA) of two targets with one x and the gradients of x, A and B agree; the kernels W get no gradient."""
    rng = np.random.default_rng(0)
    lead = () if clients is None else (clients,)
    kernels = [rng.normal(size=shape) for shape in ((6, 7), (6, 4))]  # shared by the clients
    x, a, b1, b2, g1, g2 = (rng.normal(size=(*lead, *shape)) for shape in
                            ((10, 6), (5, 6), (2, 7), (3, 4), (10, 7), (10, 4)))

    def both(function, dtype):
        ws = tuple(jnp.asarray(w, dtype) for w in kernels)

        def run(x, a, b1, b2, g1, g2):
            out, vjp = jax.vjp(lambda x, a, b1, b2: function(x, ws, a, (b1, b2)), x, a, b1, b2)
            return out, vjp((g1, g2))

        inputs = [jnp.asarray(v, dtype) for v in (x, a, b1, b2, g1, g2)]
        return jax.tree.map(np.asarray, (run if clients is None else jax.vmap(run))(*inputs))

    ours = both(merged, jnp.float32)
    with jax.enable_x64(True):
        plain = both(lambda x, w, a, b: (x @ w[0] + x @ a[:2].T @ b[0], x @ w[1] + x @ a[2:].T @ b[1]), jnp.float64)
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * np.abs(theirs).max())
    if clients is None:
        to_kernels = jax.grad(lambda w: merged(*(jnp.asarray(v, jnp.float32) for v in (x,)), w,
                                               jnp.asarray(a, jnp.float32),
                                               (jnp.asarray(b1, jnp.float32), jnp.asarray(b2, jnp.float32)))[0].sum())
        assert not any(np.any(g) for g in to_kernels(tuple(jnp.asarray(w, jnp.float32) for w in kernels)))


def test_merged_linears_of_rounded_factors():
    """With bfloat16 operands, x·(W + BA) and the gradient of x are products of rounded factors, added in float32."""
    rng = np.random.default_rng(1)
    x, w, a, b, g = (rng.normal(size=shape).astype(np.float32) for shape in ((9, 6), (6, 7), (2, 6), (2, 7), (9, 7)))

    def rounded(array):
        return array.astype(jnp.bfloat16).astype(np.float64)

    out, vjp = jax.vjp(lambda x, a, b: merged(x, (jnp.asarray(w),), a, (b,), "bfloat16")[0],
                       *map(jnp.asarray, (x, a, b)))
    dx, da, db = vjp(jnp.asarray(g))
    whole = w + a.T @ b
    np.testing.assert_allclose(out, rounded(x) @ rounded(whole), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, rounded(g) @ rounded(whole).T, rtol=1e-5, atol=1e-5)
    x, a, b, g = (array.astype(np.float64) for array in (x, a, b, g))
    np.testing.assert_allclose(da, (g @ b.T).T @ x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(db, (x @ a.T).T @ g, rtol=1e-4, atol=1e-4)
    assert np.abs(out - x @ (w + a.T @ b)).max() > 1e-3  # the rounding is there


def test_a_model_with_rounded_operands(tiny):
    """`operands` changes logits in the third digit, where LoRA is given, and nothing where it is not."""
    model = tiny[1]
    ids = np.arange(6, 26, dtype=np.int32).reshape(2, 10)
    adapter = jax.tree.map(lambda x: x + 0.1, init_lora(jax.random.key(1), model.config.text, 2))

    def logits(operands, **adapters):
        module = model.module.clone(operands=operands)
        variables = pilot_jax.models.vlm.variables(model.base, {"projector": model.base["projector"], **adapters})
        return np.asarray(module.apply(variables, ids, np.ones_like(ids), None, method="logits"))

    exact, rounded = (logits(operands, text_adapter=adapter) for operands in ("float32", "bfloat16"))
    assert 1e-5 < np.abs(exact - rounded).max() / np.abs(exact).max() < 2e-2
    np.testing.assert_array_equal(logits("float32"), logits("bfloat16"))


VARIANTS = {
    "llama": {},
    "qwen2, windows per layer": {"text": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4,
                                          "max_window_layers": 1}},
    "mistral, window": {"text": {"model_type": "mistral", "sliding_window": 4}},
}


@pytest.mark.long
@pytest.mark.parametrize("name", VARIANTS)
def test_last_layer_on_answers_alone(tmp_path, name, monkeypatch):
    """Loss and LoRA gradient with unrolled layers, a last layer only at answer positions, with and without remat, equal
    those of a scan over whole layers with logits at every position and two thin LoRA products."""
    write_llava(tmp_path, **VARIANTS[name])
    model = pilot_jax.load(tmp_path)
    rng = np.random.default_rng(0)
    n_image, length = model.config.num_image_tokens, 12
    ids = rng.integers(6, 60, (3, length)).astype(np.int32)
    ids[:, 1:1 + n_image] = IMAGE_TOKEN
    mask = np.ones_like(ids)
    mask[1, -4:] = 0
    where = jnp.asarray([[5, 10, 11], [6, 7, 0], [3, 3, 8]])
    batch = {"input_ids": jnp.asarray(ids), "attention_mask": jnp.asarray(mask), "target_positions": where,
             "features": jnp.asarray(rng.normal(size=(3, n_image, model.config.vision.feature_size)), jnp.float32)}
    adapter = init_lora(jax.random.key(1), model.config.text, 2)
    adapter = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), adapter)
    cotangent = jnp.asarray(rng.normal(size=(3, 3, model.config.text.vocab_size)), jnp.float32)

    def results(module, trimmed):
        def loss(trained):
            variables = pilot_jax.models.vlm.variables(model.base, trained)
            if trimmed:
                logits, _ = module.apply(variables, batch, "plain", method="target_logits")
            else:
                whole = module.apply(variables, batch["input_ids"], batch["attention_mask"], batch["features"],
                                     method="logits")
                logits = jnp.take_along_axis(whole, where[..., None], axis=1)
            return jnp.sum(logits * cotangent), logits

        trained = {"projector": model.base["projector"], "text_adapter": adapter}
        (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        return logits, grads

    unrolled = model.module.clone(unroll=model.config.text.num_layers)
    scanned = model.module.clone(unroll=1)
    cases = {"trimmed": results(unrolled, True), "trimmed, remat": results(unrolled.clone(remat=True), True),
             "scan": results(scanned, True), "a library's attention": results(scanned.clone(kernel="xla"), True),
             "a library's, unrolled": results(unrolled.clone(kernel="xla"), True)}
    # The plain way: every position in the last layer, and no merging of LoRA into the kernels.
    monkeypatch.setattr(pilot_jax.models.llama, "lora_linears", lambda x, kernels, adapters, names, scale, _: tuple(
        x @ w + scale * (x @ adapters[n]["a"].T @ adapters[n]["b"].T) for n, w in zip(names, kernels, strict=True)))
    plain = results(scanned, False)
    for case in cases.values():
        for a, b in zip(jax.tree.leaves(case), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))
