"""Tests of sampling and of stop tokens. Greedy decoding is compared with transformers in test_models.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import IMAGE_TOKEN

from pilot_jax.models.generate import Decoding, choose, generate, nucleus


def numpy_nucleus(logits, top_p):
    """Returns the most probable tokens, as many as are needed to have probability top_p together."""
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    kept, total = set(), 0.0
    for token in np.argsort(-probs):
        kept.add(int(token))
        total += probs[token]
        if total >= top_p:
            break
    return kept


def test_nucleus_keeps_the_fewest_tokens():
    rng = np.random.default_rng(0)
    for top_p in (0.05, 0.5, 0.9, 0.999, 1.0):
        logits = rng.normal(size=(20, 30)) * 2
        ours = np.asarray(nucleus(jnp.asarray(logits, jnp.float32), top_p))
        for got, row in zip(ours, logits, strict=True):
            kept = set(np.flatnonzero(np.isfinite(got)).tolist())
            assert kept == (set(range(30)) if top_p == 1.0 else numpy_nucleus(row, top_p))


@pytest.mark.slow
def test_sampled_frequencies_follow_temperature_and_top_p():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), (1, 20_000))
    drawn = choose(jnp.broadcast_to(logits, (1, 20_000, 4)), keys, 0, Decoding(1, (0,), temperature=2.0, top_p=0.8))
    weights = np.sqrt([0.5, 0.3, 0.15, 0.05])  # probabilities at temperature 2, before normalisation
    weights /= weights.sum()  # 0.379, 0.293, 0.207, 0.120: the first three exceed 0.8
    expected = np.append(weights[:3] / weights[:3].sum(), 0)
    np.testing.assert_allclose(np.bincount(np.asarray(drawn[0]), minlength=4) / 20_000, expected, atol=0.02)


def prompts(model):
    rng = np.random.default_rng(3)
    ids = rng.integers(6, 64, (3, 12))
    ids[:, 1:5] = IMAGE_TOKEN
    return ids, np.ones_like(ids), rng.normal(size=(3, 3, 16, 16)).astype(np.float32)


@pytest.mark.slow
def test_a_row_depends_on_its_seed_alone(tiny):
    model = tiny[1]
    ids, mask, pixels = prompts(model)
    options = {"max_new_tokens": 10, "eos_id": 63, "temperature": 1.5}
    first, again = (model.generate(ids, mask, pixels, seed=1, **options) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (first != model.generate(ids, mask, pixels, seed=2, **options)).any()
    cold = model.generate(ids, mask, pixels, max_new_tokens=10, eos_id=63, temperature=1e-3)
    np.testing.assert_array_equal(cold, model.generate(ids, mask, pixels, max_new_tokens=10, eos_id=63))
    narrow = model.generate(ids, mask, pixels, max_new_tokens=10, eos_id=63, temperature=1.5, top_p=1e-6)
    np.testing.assert_array_equal(narrow, cold)


@pytest.mark.slow
def test_any_stop_token_ends_a_row(tiny):
    model = tiny[1]
    ids, mask, pixels = prompts(model)
    free = model.generate(ids, mask, pixels, max_new_tokens=10, eos_id=63)
    stop = (int(free[0, 4]), int(free[1, 2]))
    stopped = model.generate(ids, mask, pixels, max_new_tokens=10, eos_id=stop)
    for row, whole in zip(stopped, free, strict=True):
        ends = np.flatnonzero(np.isin(whole, stop))
        end = ends[0] + 1 if len(ends) else len(whole)
        np.testing.assert_array_equal(row[:end], whole[:end])
        assert (row[end:] == stop[0]).all()


@pytest.mark.slow
def test_one_program_serves_many_clients(tiny):
    """Clients with different connectors get the same answers together as one by one, and share one compilation."""
    model = tiny[1]
    ids, mask, pixels = prompts(model)
    rng = np.random.default_rng(0)
    clients = [jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32),
                            {"projector": model.base["projector"]}) for _ in range(3)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *clients)
    features = model.features(pixels)

    def decode(adapters, count):
        batch = {"input_ids": jnp.broadcast_to(ids, (count, *ids.shape)), "features":
                 jnp.broadcast_to(features, (count, *features.shape)),
                 "attention_mask": jnp.broadcast_to(mask, (count, *mask.shape))}
        batch["keys"] = jax.random.split(jax.random.key(0), (count, len(ids)))
        return np.asarray(generate(model.module, model.base, adapters, batch, jnp.zeros(count, jnp.int32),
                                   stage="plain", how=Decoding(8, (63,))))

    before = generate._cache_size()
    all_three = decode(together, 3)
    decode(jax.tree.map(lambda leaf: leaf[::-1], together), 3)
    assert generate._cache_size() == before + 1
    for k, own in enumerate(clients):
        np.testing.assert_array_equal(all_three[k], decode(jax.tree.map(lambda leaf: leaf[None], own), 1)[0])
    assert (all_three[0] != all_three[1]).any()
