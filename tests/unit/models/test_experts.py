"""Tests of several LoRA in a layer, mixed per token: the layer in float64, the whole model by the plain formula, and
what is left as it was where there is one LoRA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import IMAGE_TOKEN

import pilot_jax
from pilot_jax.errors import InputError
from pilot_jax.federation.strategies import make_strategy
from pilot_jax.federation.strategies.fedlease import slot_table
from pilot_jax.kernels.low_rank import linears_with_low_rank
from pilot_jax.models.checkpoints.peft import save_adapters
from pilot_jax.models.experts import gates, init_bank, init_router, mixed
from pilot_jax.models.lora import assembled, init_lora, lora_linears
from pilot_jax.models.vlm import variables

TOKENS, D_IN, D_OUT, RANK, EXPERTS = 9, 6, 5, 2, 3  # EXPERTS: in the bank
SCALE = 1.5
TABLES = {"none": None, "all": slot_table(3, 3, 1), "two of three": slot_table(3, 2, 0), "warm-up": slot_table(3)}


def leaves_of(table, seed=0):
    """Returns x, W and the leaves of one target, float64. Without a table, the router has one row per expert."""
    rng = np.random.default_rng(seed)
    rows = 1 + EXPERTS if table is None else len(table)
    leaves = {"a": (RANK, D_IN), "b": (D_OUT, RANK), "bank_a": (EXPERTS, RANK, D_IN), "bank_b": (EXPERTS, D_OUT, RANK),
              "router": (rows, D_IN)}
    leaves = {name: rng.normal(size=shape) for name, shape in leaves.items()}
    return rng.normal(size=(TOKENS, D_IN)), rng.normal(size=(D_IN, D_OUT)), leaves | (
        {} if table is None else {"slots": np.float64(table)})


def kept_rows(x, leaves):
    """Returns which rows of the router count for each token, bool [tokens, rows]; token by token, by sorting."""
    router, table = leaves["router"], leaves.get("slots")
    if table is None:
        return np.ones((len(x), len(router)), bool)
    used = [s for s in range(len(router)) if table[s].any()]
    most, kept = int(table.any(axis=0).sum()), np.zeros((len(x), len(router)), bool)
    for i, token in enumerate(x):
        kept[i, sorted(used, key=lambda s: -(router[s] @ token))[:most]] = True
    return kept


def plain(x, leaves, kept):
    """Returns Σ_s p_s·scale·B_s·A_s·x, with the softmax p over the rows that are kept, expert by expert."""
    rows = leaves["router"].shape[0]
    table = leaves.get("slots", jnp.eye(rows))
    powers = jnp.where(kept, jnp.exp(x @ leaves["router"].T), 0)
    shares = powers / powers.sum(axis=1, keepdims=True)
    out = 0.0
    for e in range(1 + EXPERTS):
        a, b = (leaves[n] if e == 0 else leaves[f"bank_{n}"][e - 1] for n in "ab")
        out = out + (shares @ table[:, e])[:, None] * SCALE * (x @ a.T @ b.T)
    return out


@pytest.mark.parametrize("name", TABLES)
def test_a_layer_and_its_gradient_in_float64(name):
    """The outputs and the gradients by x and every leaf; the experts' weights sum to 1, and the own one's is not 0."""
    x, w, leaves = leaves_of(TABLES[name])
    kept, cotangent = kept_rows(x, leaves), np.random.default_rng(1).normal(size=(TOKENS, D_OUT))
    fixed = {n: leaves[n] for n in leaves if n == "slots"}
    free = {n: leaves[n] for n in leaves if n != "slots"}

    def both(function, dtype):
        numbers = jax.tree.map(lambda v: np.asarray(v, dtype), (x, free, fixed, w, cotangent))
        run = jax.value_and_grad(lambda x, free, fixed, w, cotangent: jnp.sum(
            function(x, w, free | fixed) * cotangent), argnums=(0, 1))
        return jax.tree.map(np.asarray, jax.jit(run)(*numbers))

    got = both(lambda x, w, leaves: lora_linears(x, (w,), {"q": leaves}, ("q",), SCALE)[0], np.float32)
    with jax.enable_x64(True):
        want = both(lambda x, w, leaves: x @ w + plain(x, leaves, kept), np.float64)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert b.dtype == np.float64
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max()))
    shares = jax.jit(gates)(jnp.float32(x), jnp.float32(leaves["router"]), *(jnp.float32(v) for v in fixed.values()))
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-6)
    assert (shares[:, 0] > 0).all()
    if name == "warm-up":
        np.testing.assert_array_equal(shares, np.eye(1 + EXPERTS)[np.zeros(TOKENS, int)])
        np.testing.assert_allclose(got[1][1]["router"], 0, atol=1e-7)


def test_equal_logits_are_taken_in_the_order_of_the_rows():
    """A router of zeros keeps the first M rows in use, each with the weight 1/M."""
    x, table = np.ones((1, D_IN), np.float32), slot_table(3, 3, 1)
    np.testing.assert_allclose(jax.jit(gates)(x, np.zeros((5, D_IN), np.float32), table),
                               [[1 / 3, 1 / 3, 0, 1 / 3]], atol=1e-6)


def test_clients_share_a_bank():
    """Vmapped over clients that have one bank, a mixture is each client's own."""
    x, _, leaves = leaves_of(None)
    bank = {n: jnp.float32(leaves[n]) for n in ("bank_a", "bank_b")}
    own = [{n: np.float32(leaves_of(None, seed)[2][n]) for n in ("a", "b", "router")} for seed in range(3)]
    run = jax.jit(lambda own: mixed(jnp.float32(x), own | bank, SCALE))
    together = jax.jit(jax.vmap(run))(jax.tree.map(lambda *v: np.stack(v), *own))
    for one, got in zip(own, together, strict=True):
        np.testing.assert_allclose(got, run(one), atol=1e-5)


def test_one_lora_is_computed_as_before():
    """Without a router, nothing is traced but the kernel of one LoRA, of a layer and of a client's subtrees."""
    rng = np.random.default_rng(0)
    x, ws = rng.normal(size=(TOKENS, D_IN)), [rng.normal(size=(D_IN, d)) for d in (5, 3)]
    pairs = {n: {"a": rng.normal(size=(RANK, D_IN)), "b": rng.normal(size=(d, RANK))} for n, d in (("q", 5), ("k", 3))}
    x, ws, pairs = jax.tree.map(jnp.float32, (x, tuple(ws), pairs))

    def before(x, ws, pairs):
        a = jnp.concatenate([pairs[n]["a"] for n in ("q", "k")]).astype(x.dtype)
        return linears_with_low_rank(x, ws, a, tuple((pairs[n]["b"].T * SCALE).astype(x.dtype) for n in ("q", "k")))

    now = jax.make_jaxpr(lambda x, ws, pairs: lora_linears(x, ws, pairs, ("q", "k"), SCALE))(x, ws, pairs)
    assert str(now) == str(jax.make_jaxpr(before)(x, ws, pairs))
    assert assembled({"text_adapter": {"layers": pairs}}) == {"layers": pairs}


# The whole model.


def clients_adapters(model, name, seed=0):
    """Returns adapters of a client that has been trained, with random values everywhere, under a strategy."""
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    strategy = make_strategy(name, {"max_experts": 3} if name == "fedlease" else {})
    adapters = strategy.initial_adapters(key, model.base["projector"], model.config, RANK, 1)
    adapters = {n: tree if n == "projector" else jax.tree.map(
        lambda v: jnp.asarray(v + 0.3 * rng.normal(size=v.shape), jnp.float32), tree) for n, tree in adapters.items()}
    if name == "fedlease":
        adapters["expert_slots"] = {"table": jnp.asarray(slot_table(3, 3, 1))}
    return adapters


def batch_of(model):
    rng = np.random.default_rng(0)
    images = model.config.num_image_tokens
    ids = rng.integers(6, 60, (3, 12)).astype(np.int32)
    ids[:, 1:1 + images] = IMAGE_TOKEN
    mask = np.ones_like(ids)
    mask[1, -4:] = 0
    return {"input_ids": jnp.asarray(ids), "attention_mask": jnp.asarray(mask),
            "target_positions": jnp.asarray([[5, 10, 11], [6, 7, 0], [3, 3, 8]]),
            "features": jnp.asarray(rng.normal(size=(3, images, model.config.vision.feature_size)), jnp.float32)}


def token_by_token(x, kernels, adapters, names, scale, _):
    """Returns what `lora_linears` shall return, by the formula: each expert's product whole, rows kept by sorting."""
    out = []
    for name, w in zip(names, kernels, strict=True):
        leaves = adapters[name]
        logits, table = x @ leaves["router"].T, leaves.get("slots", jnp.eye(len(leaves["router"])))
        used, most = table.sum(axis=1) > 0, (table.sum(axis=0) > 0).sum()
        least = jnp.sort(jnp.where(used, logits, -jnp.inf), axis=1)[:, ::-1]
        least = jnp.take_along_axis(least, jnp.full((len(x), 1), most - 1), axis=1)
        powers = jnp.where(used & (logits >= least), jnp.exp(logits), 0)
        y = x @ w
        for e in range(table.shape[1]):
            a, b = (leaves[n] if e == 0 else leaves[f"bank_{n}"][e - 1] for n in "ab")
            y = y + (powers @ table[:, e] / powers.sum(axis=1))[:, None] * (x @ a.T @ b.T) * scale
        out.append(y)
    return tuple(out)


@pytest.mark.long
@pytest.mark.parametrize("name", ["fedlease", "fedalt"])
def test_training_and_decoding_by_the_formula(tiny, name, monkeypatch):
    """Logits and gradients in training, scanned or unrolled with remat, and the logits of prefill and decode."""
    model, batch = tiny[1], batch_of(tiny[1])
    adapters = clients_adapters(model, name)
    trained = {n: t for n, t in adapters.items() if n not in ("expert_bank", "expert_slots")}
    rest = {n: t for n, t in adapters.items() if n not in trained}
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, model.config.text.vocab_size)), jnp.float32)
    ids, mask = batch["input_ids"][:1], batch["attention_mask"][:1]

    def results(module):
        def loss(trained):
            logits, _ = module.apply(variables(model.base, trained | rest), batch, "plain", method="target_logits")
            return jnp.sum(logits * cotangent), logits

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(trained)

    scanned, unrolled = model.module.clone(unroll=1), model.module.clone(unroll=model.config.text.num_layers)
    cases = [results(module) for module in (scanned, unrolled.clone(remat=True))]
    own = variables(model.base, adapters)
    cache = pilot_jax.models.llama.empty_cache(model.config.text, 1, 12, jnp.float32)
    first, cache = jax.jit(lambda cache: scanned.apply(
        own, ids[:, :9], mask[:, :9], batch["features"][:1], cache, "plain", method="prefill"))(cache)
    decode = jax.jit(lambda token, at, cache: scanned.apply(
        own, token, at[None], jnp.arange(12)[None] <= at, cache, at, method="decode"))
    steps = [first]
    for at in range(9, 12):
        logits, cache = decode(ids[:, at], jnp.asarray(at), cache)
        steps.append(logits)
    monkeypatch.setattr(pilot_jax.models.llama, "lora_linears", token_by_token)
    want = results(scanned)
    for case in cases:
        for a, b in zip(jax.tree.leaves(case), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(jnp.abs(b).max())))
    for tree in (want[1]["expert_router"], want[1]["text_adapter"]):
        assert all(float(jnp.abs(g).max()) > 1e-3 for g in jax.tree.leaves(tree))
    whole = jax.jit(lambda: scanned.apply(own, ids, mask, batch["features"][:1], method="logits"))()
    for at, logits in zip(range(8, 12), steps, strict=True):
        np.testing.assert_allclose(logits, whole[:, at], atol=2e-5 * max(1.0, float(jnp.abs(whole).max())))


@pytest.mark.slow
def test_equal_gates_are_half_of_each_lora(tiny):
    """With a router of zeros, FedALT's model is that of both LoRA at half their scale, which one LoRA expresses."""
    model, batch = tiny[1], batch_of(tiny[1])
    adapters = clients_adapters(model, "fedalt")
    adapters["expert_router"] = jax.tree.map(jnp.zeros_like, adapters["expert_router"])
    halves = [{"layers": {n: {"a": pair["a"], "b": pair["b"] / 2} for n, pair in tree["layers"].items()}}
              for tree in (adapters["text_adapter"], jax.tree.map(lambda v: v[:, 0], adapters["expert_bank"]))]
    summed = {"text_adapter": halves[0], "private_adapter": halves[1], "projector": adapters["projector"]}
    logits = jax.jit(lambda adapters: model.module.apply(
        variables(model.base, adapters), batch, "plain", method="target_logits")[0])
    ours, theirs = logits(adapters), logits(summed)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    quarter = summed | {"private_adapter": jax.tree.map(lambda leaf: leaf / 2, halves[1])}
    assert float(jnp.abs(ours - logits(quarter)).max()) > 0.01


def test_a_new_bank_adds_nothing(tiny):
    text = tiny[1].config.text
    lora = init_lora(jax.random.key(0), text, RANK)
    bank, router = init_bank(lora, 2), init_router(jax.random.key(1), lora, 5)
    for name, pair in lora["layers"].items():
        d_in = text.linear_shapes[name][0]
        assert bank["layers"][name]["a"].shape == (text.num_layers, 2, RANK, d_in)
        assert not np.any(bank["layers"][name]["b"]) and router[name].shape == (text.num_layers, 5, d_in)
        assert 0.5 < float(jnp.abs(router[name]).max()) * d_in**0.5 <= 1
        assert not np.array_equal(router[name][:, :RANK], pair["a"])
    assert float(jnp.abs(router["q"] - router["k"]).max()) > 0.01


def test_a_mixture_is_not_exported_as_one_lora(tiny, tmp_path):
    adapters = clients_adapters(tiny[1], "fedalt")
    with pytest.raises(InputError, match=r"mixes several LoRA for every token.*would be another model.*Nothing was"):
        save_adapters(tmp_path / "out", adapters, assembled(adapters), stage="plain", tasks=("t",), task_index=0,
                      alpha_over_rank=1.0, kind="llava", base="tiny", exclude=None, about={}, card="")
    assert not (tmp_path / "out").exists()
