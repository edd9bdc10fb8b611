"""Tests of mixing matrices and ATA against NumPy in float64, written from the formulas."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow_except

from pilot_jax.federation import mixing
from pilot_jax.federation.distances import EVERY_PAIR, distances

SIZES = np.asarray([10, 20, 30, 5, 12, 8])


def uploads(cohort=6, seed=0, spread=1.0, layers=2, rank=3, d_in=7, d_out=5):
    rng = np.random.default_rng(seed)
    common = {"a": rng.normal(size=(layers, rank, d_in)), "b": rng.normal(size=(layers, d_out, rank))}
    return {"layers": {name: {k: (v + spread * rng.normal(size=(cohort, *v.shape))).astype(np.float32)
                              for k, v in common.items()} for name in ("q", "down")}}


def distances64(tree, space):
    targets = list(tree["layers"].values())
    cohort = len(targets[0]["a"])
    out = np.zeros((cohort, cohort))
    for k, j in itertools.product(range(cohort), repeat=2):
        total = 0.0
        for pair in targets:
            a, b = pair["a"].astype(np.float64), pair["b"].astype(np.float64)
            if space == "factors":
                total += np.sum((a[k] - a[j]) ** 2) + np.sum((b[k] - b[j]) ** 2)
            else:
                total += np.sum((b[k] @ a[k] - b[j] @ a[j]) ** 2)  # batched over layers
        out[k, j] = np.sqrt(total)
    return out


def ata64(d, sizes, m, weighting, temperature, include_self, size_weighted):
    """Computes ATA by its definition, one client at a time."""
    cohort = len(d)
    out = np.zeros((cohort, cohort))
    for k in range(cohort):
        others = sorted((j for j in range(cohort) if j != k), key=lambda j: (d[k, j], j))[:m]
        if not others:
            out[k, k] = 1
            continue
        raw = {}
        if weighting == "share_of_sizes":
            raw = {j: 1 / d[k, j] for j in others}
            own = sizes[k] / (sizes[k] + sum(sizes[j] for j in others))
            raw = {j: (1 - own) * w / sum(raw.values()) for j, w in raw.items()} | {k: own}
        elif weighting == "softmax":
            tau = np.mean([d[k, j] for j in others]) if temperature == "auto" else temperature
            raw = {j: np.exp(-d[k, j] / tau) for j in others}
            raw[k] = 1.0
        else:
            raw = {j: 1 / d[k, j] for j in others}
            raw[k] = max(raw.values()) if weighting == "inverse_distance" else sizes[k]
        if not include_self:
            del raw[k]
        for j, w in raw.items():
            out[k, j] = w * (sizes[j] if size_weighted else 1)
    return out / out.sum(1, keepdims=True)


@pytest.mark.parametrize("space", ["factors", "product"])
def test_distances(space):
    tree = uploads()
    np.testing.assert_allclose(distances(tree, space=space), distances64(tree, space), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("space", ["factors", "product"])
@pytest.mark.parametrize("spread", [1e-4, 1e-6])
def test_distances_inside_two_far_clusters(space, spread):
    """Small distances in two far clusters are right to 1e-5, where |a|² + |b|² − 2ab would lose precision."""
    near, far = uploads(3, 1, spread), uploads(3, 2, spread)
    far = jax.tree.map(lambda x: x + np.float32(50), far)
    tree = jax.tree.map(lambda a, b: np.concatenate([a, b]), near, far)
    expected = distances64(tree, space)
    off = ~np.eye(6, dtype=bool)
    np.testing.assert_allclose(np.asarray(distances(tree, space=space))[off], expected[off], rtol=1e-5)


@pytest.mark.parametrize(("cohort", "width", "pairs"), [(18, 7, 5), (7, 11, 4), (5, 33, 10)])
def test_long_leaves_are_summed_in_strips(monkeypatch, cohort, width, pairs):
    """Distances do not depend on the width of strips, with or without a shorter last one, nor on groups of pairs."""
    monkeypatch.setattr("pilot_jax.kernels.pairwise.columns_at_once", lambda cohort, pairs=False: width)
    monkeypatch.setattr("pilot_jax.kernels.pairwise.PAIRS", pairs)
    tree = uploads(cohort, layers=3, d_in=11)  # shapes of no other test, so that no earlier compilation is reused
    np.testing.assert_allclose(distances(tree, cohort - 1), distances64(tree, "factors"), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("space", ["factors", "product"])
@pytest.mark.parametrize("kind", slow_except({"clusters 1e-6 apart"}, [
    "spread out", "clusters 1e-6 apart", "identical"]))
def test_large_cohorts_shortlist_by_a_gram(space, kind):
    """Among 21 clients, every nearest neighbour is found, with its float64 distance to 1e-5, and the weights equal
    those of all exact distances."""
    if kind == "spread out":
        tree = uploads(21)
    elif kind == "identical":
        tree = jax.tree.map(lambda x: np.repeat(x[:1], 21, 0), uploads(1))
    else:  # three clusters of seven, far apart from each other
        parts = [jax.tree.map(lambda x, s=seed: x + np.float32(20 * s), uploads(7, seed, 1e-6)) for seed in range(3)]
        tree = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    assert jax.tree.leaves(tree)[0].shape[0] > EVERY_PAIR
    expected = distances64(tree, space)
    ours = np.asarray(distances(tree, 3, space))
    np.testing.assert_array_equal(ours, ours.T)
    for k in range(21):
        others = np.argsort(np.where(np.arange(21) == k, np.inf, expected[k]), kind="stable")[:3]
        np.testing.assert_allclose(ours[k, others], expected[k, others], rtol=1e-5)
        if kind != "identical":  # no other client is nearer than these
            rest = np.setdiff1d(np.arange(21), [k, *others])
            assert ours[k, rest].min() >= ours[k, others].max() * (1 - 1e-5)
    sizes = jnp.arange(1, 22)
    weights, _ = mixing.ata(tree, sizes, neighbors=3, space=space)
    of_all = mixing.ata_weights(distances(tree, space=space), sizes, neighbors=3)
    np.testing.assert_allclose(weights, of_all, atol=1e-4)


@pytest.mark.parametrize(
    ("weighting", "temperature", "include_self", "size_weighted", "m"),
    [(w, t, i, s, m)
     for w, t in (("softmax", "auto"), ("softmax", 1.0), ("softmax", 7.5), ("inverse_distance", "auto"),
                  ("share", "auto"), ("share_of_sizes", "auto"))
     for i in (True, False) for s in (True, False) for m in (1, 3, 5, 99)])
def test_ata_weights(weighting, temperature, include_self, size_weighted, m):
    tree = uploads()
    weights, distances = mixing.ata(tree, jnp.asarray(SIZES), neighbors=m, weighting=weighting, temperature=temperature,
                                    include_self=include_self, size_weighted=size_weighted)
    expected = ata64(distances64(tree, "factors"), SIZES, min(m, 5), weighting, temperature, include_self,
                     size_weighted)
    np.testing.assert_allclose(weights, expected, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(np.sum(weights, 1), 1, atol=1e-5)
    np.testing.assert_allclose(distances, distances64(tree, "factors"), rtol=1e-5)


def test_auto_temperature_ignores_scale():
    """A client weighs about 1/(1 + M/e) for itself at any scale; τ = 1 becomes local training for large distances."""
    for scale in (1e-3, 1.0, 1e3):
        d = distances(jax.tree.map(lambda x, s=scale: x * s, uploads(30, layers=20)))
        weights = mixing.ata_weights(d, jnp.ones(30), neighbors=3)
        np.testing.assert_allclose(np.diag(weights), 1 / (1 + 3 / np.e), atol=0.03)
    plain = mixing.ata_weights(d, jnp.ones(30), neighbors=3, temperature=1.0)
    np.testing.assert_allclose(mixing.effective_neighbors(plain), 1, atol=1e-5)


def test_lone_client_identical_clients_and_ties():
    np.testing.assert_array_equal(mixing.ata_weights(jnp.zeros((1, 1)), jnp.ones(1), neighbors=3, include_self=False),
                                  [[1.0]])
    for weighting in ("softmax", "inverse_distance", "share"):
        weights = np.asarray(mixing.ata_weights(jnp.zeros((4, 4)), jnp.ones(4), neighbors=2, weighting=weighting))
        # All distances are 0: equal weights for the client and the two others of the lowest index.
        np.testing.assert_allclose(weights[3], [1 / 3, 1 / 3, 0, 1 / 3], atol=1e-6)
        np.testing.assert_allclose(weights[0], [1 / 3, 1 / 3, 1 / 3, 0], atol=1e-6)
    # With ids, ties are broken by id instead of position.
    weights = np.asarray(mixing.ata_weights(jnp.zeros((3, 3)), jnp.ones(3), jnp.asarray([5, 9, 1]), neighbors=1))
    np.testing.assert_allclose(weights[0], [0.5, 0, 0.5], atol=1e-6)


@pytest.mark.parametrize("weighting", ["inverse_distance", "share", "share_of_sizes"])
def test_one_identical_neighbour_takes_the_limit(weighting):
    d = jnp.asarray([[0, 0, 2.0], [0, 0, 3.0], [2, 3, 0]])
    weights = np.asarray(mixing.ata_weights(d, jnp.asarray([4.0, 5, 6]), neighbors=2, weighting=weighting))
    np.testing.assert_allclose(weights[0], [0.5, 0.5, 0] if weighting != "share_of_sizes" else [4 / 15, 11 / 15, 0],
                               atol=1e-6)
    assert np.all(np.isfinite(weights))


def test_the_two_readings_of_a_share():
    """n_k against 1/d is nearly local training for close clients; a share of the neighbours' sizes does not depend on
    the distances' unit."""
    d = jnp.asarray([[0, 1.0, 3], [1, 0, 2], [3, 2, 0]])
    sizes = jnp.asarray([10.0, 20, 30])
    for scale in (0.1, 1.0, 10.0):
        of_units, of_sizes = (np.asarray(mixing.ata_weights(scale * d, sizes, neighbors=2, weighting=name))
                              for name in ("share", "share_of_sizes"))
        np.testing.assert_allclose(of_units[0], np.asarray([10, 1 / scale, 1 / (3 * scale)]) / (
            10 + 4 / (3 * scale)), rtol=1e-5)
        np.testing.assert_allclose(of_sizes[0], [1 / 6, 5 / 6 * 0.75, 5 / 6 * 0.25], rtol=1e-5)


def test_no_neighbours_is_refused():
    with pytest.raises(ValueError, match="neighbors"):
        mixing.ata_weights(jnp.zeros((2, 2)), jnp.ones(2), neighbors=0)


def test_permuting_clients_permutes_the_result():
    tree, order = uploads(), np.asarray([3, 0, 5, 1, 4, 2])
    weights, _ = mixing.ata(tree, jnp.asarray(SIZES), jnp.arange(6), neighbors=2)
    permuted = jax.tree.map(lambda x: x[order], tree)
    again, _ = mixing.ata(permuted, jnp.asarray(SIZES[order]), jnp.asarray(order), neighbors=2)
    np.testing.assert_allclose(again, np.asarray(weights)[np.ix_(order, order)], atol=1e-6)
    mixed, mixed_again = mixing.apply(weights, tree), mixing.apply(again, permuted)
    for a, b in zip(jax.tree.leaves(mixed), jax.tree.leaves(mixed_again), strict=True):
        np.testing.assert_allclose(np.asarray(a)[order], b, atol=1e-5)


def test_means_and_application():
    tasks = np.asarray([0, 0, 2, 2, 2, 0])
    matrix = np.asarray(mixing.per_task_mean(jnp.asarray(SIZES), jnp.asarray(tasks), 4))
    leaf = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    for task in (0, 2):
        mine = tasks == task
        np.testing.assert_allclose(matrix[task] @ leaf, np.average(leaf[mine], axis=0, weights=SIZES[mine]), atol=1e-6)
    np.testing.assert_array_equal(matrix[[1, 3]], 0)
    applied = mixing.apply(mixing.mean(jnp.asarray(SIZES)), {"w": leaf})["w"]
    np.testing.assert_allclose(applied, np.tile(np.average(leaf, axis=0, weights=SIZES), (6, 1)), atol=1e-6)
    np.testing.assert_array_equal(mixing.apply(mixing.identity(6), {"w": leaf})["w"], leaf)


def test_effective_neighbors():
    matrix = jnp.asarray([[1, 0, 0], [0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]])
    np.testing.assert_allclose(mixing.effective_neighbors(matrix), [1, 2, 3], rtol=1e-5)


def test_product_gap():
    tree = uploads(4)
    weights = np.random.default_rng(3).dirichlet(np.ones(4), 4)
    whole = gap = 0.0
    for pair in tree["layers"].values():
        a, b = pair["a"].astype(np.float64), pair["b"].astype(np.float64)
        mean_ba = np.einsum("ks,slor,slri->kloi", weights, b, a)
        ba_of_means = np.einsum("ks,slor->klor", weights, b) @ np.einsum("ks,slri->klri", weights, a)
        whole = whole + np.sum(mean_ba**2, axis=(1, 2, 3))
        gap = gap + np.sum((mean_ba - ba_of_means) ** 2, axis=(1, 2, 3))
    ours = mixing.product_gap(jnp.asarray(weights, jnp.float32), tree)
    np.testing.assert_allclose(ours, np.sqrt(gap / whole), rtol=1e-3)
    sparse = np.where(weights >= np.sort(weights, axis=1)[:, -2:-1], weights, 0)  # two of four, as sparse as ATA's rows
    sparse = jnp.asarray(sparse / sparse.sum(axis=1, keepdims=True), jnp.float32)
    np.testing.assert_allclose(mixing.product_gap(sparse, tree, 2), mixing.product_gap(sparse, tree), rtol=1e-4)
