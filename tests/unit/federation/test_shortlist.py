"""Tests of nearest neighbours found by sketches, against NumPy in float64 over all pairs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pilot_jax.federation import distances as dense
from pilot_jax.federation import mixing, shortlist
from pilot_jax.federation.cohort import Cohort
from pilot_jax.federation.shortlist import nearest
from pilot_jax.federation.sparse import SparseRows, apply_rows
from pilot_jax.kernels.pairwise import factor_pairs

SHAPES = {"q": {"a": (2, 4, 200), "b": (2, 300, 4)}, "down": {"a": (2, 4, 240), "b": (2, 260, 4)}}
SIZE = 8000  # entries of an upload
COHORT, M = 160, 2


def as_tree(flat):
    """Returns LoRA uploads [S, …] whose entries are the rows of `flat`, float32."""
    out, at = {}, 0
    for name, pair in SHAPES.items():
        out[name] = {}
        for factor, shape in pair.items():
            out[name][factor] = flat[:, at:at + np.prod(shape)].reshape(-1, *shape).astype(np.float32)
            at += np.prod(shape)
    return {"layers": out}


def as_rows(tree):
    return np.concatenate([x.reshape(len(x), -1) for x in jax.tree.leaves(tree)], axis=1).astype(np.float64)


def graded(tasks, clients, apart=50.0, step=1.0, seed=0):
    """Returns clusters, far from each other, of clients on a path whose steps grow by a fifth: the two nearest of a
    client are its neighbours on the path, and the third is 9 % farther than the second."""
    rng, size = np.random.default_rng(seed), SIZE
    paths = np.cumsum(step * 1.2 ** np.arange(clients)[:, None] * rng.standard_normal((tasks, clients, size)), axis=1)
    centres = rng.standard_normal(size) + apart * rng.standard_normal((tasks, 1, size))
    return as_tree((centres + paths).reshape(-1, size))


def near_duplicates():
    """Returns clusters a million times as far from each other as their clients are, as training begins."""
    return graded(8, 20, apart=3.0, step=3e-6)


def identical():
    return as_tree(np.repeat(np.random.default_rng(1).standard_normal((5, SIZE)), 32, axis=0))


def equally_far():
    """Returns uploads with one entry above 0 each: all distances are √2."""
    return as_tree(np.eye(COHORT, SIZE))


CASES = {"clusters": lambda: graded(8, 20), "near duplicates": near_duplicates, "identical": identical,
         "equally far": equally_far}


def nearest64(tree, ids):
    """Returns (columns [S, M], distances [S, M]) of the M nearest others by all pairs; of a tie, the lower id."""
    rows = as_rows(tree)
    d = np.stack([np.sqrt(((rows - row) ** 2).sum(1)) for row in rows])
    np.fill_diagonal(d, np.inf)
    columns = np.stack([np.lexsort((ids, row.astype(np.float32)))[:M] for row in d])
    return columns, np.take_along_axis(d, columns, 1)


@pytest.mark.parametrize("kind", CASES)
def test_the_neighbours_are_those_of_all_pairs(kind):
    """With their distances to 1e-5 of float64, and of equally near clients those with the lowest ids, in any order of
    the cohort, bit for bit."""
    tree = CASES[kind]()
    mixed = np.random.default_rng(2).permutation(COHORT)
    got = nearest(tree, M)
    columns, exact = nearest64(tree, np.arange(COHORT))
    np.testing.assert_array_equal(got.columns, columns)
    np.testing.assert_allclose(got.distances, exact, rtol=1e-5)
    again = nearest(jax.tree.map(lambda leaf: leaf[mixed], tree), M, mixed)
    np.testing.assert_array_equal(mixed[again.columns], got.columns[mixed])
    np.testing.assert_array_equal(again.distances, got.distances[mixed])


def test_clients_at_nearly_one_distance():
    """Where no sketch can tell who is nearest, neighbours are at most 4 % farther, and their distances are exact."""
    tree = as_tree(np.random.default_rng(3).standard_normal((COHORT, SIZE)))
    got, (_, exact), rows = nearest(tree, M), nearest64(tree, np.arange(COHORT)), as_rows(tree)
    between = np.sqrt(((rows[:, None] - rows[got.columns]) ** 2).sum(2))
    np.testing.assert_allclose(got.distances, between, rtol=1e-5)
    assert (got.distances <= 1.04 * exact).all()


@pytest.mark.parametrize("options", [
    {}, {"temperature": 3.0, "size_weighted": True}, {"weighting": "inverse_distance"}, {"weighting": "share"},
    {"weighting": "share_of_sizes"}, {"weighting": "inverse_distance", "include_self": False}])
def test_sparse_weights_are_the_dense_ones(options):
    """The sparse matrix has the entries of the one from all distances in float64, and gives the same mixtures."""
    tree, sizes = graded(8, 20), np.arange(1, COHORT + 1)
    rows = as_rows(tree)
    d = np.stack([np.sqrt(((rows - row) ** 2).sum(1)) for row in rows])
    expected = np.asarray(mixing.ata_weights(jnp.asarray(d), sizes, neighbors=M, **options))
    sparse = mixing.ata_weights_of_nearest(nearest(tree, M), sizes, neighbors=M, **options)
    got = np.zeros((COHORT, COHORT))
    np.put_along_axis(got, np.asarray(sparse.columns), np.asarray(sparse.weights), axis=1)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    mixing.check_rows(sparse.weights)
    mixed = as_rows(jax.device_get(mixing.apply(sparse, tree)))
    np.testing.assert_allclose(mixed, expected @ rows, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(mixing.product_gap(sparse, tree), mixing.product_gap(expected, tree, M + 1), atol=1e-3)


def test_distances_of_a_cohort_between_the_limits(monkeypatch):
    """Below `mixing.DENSE` the matrix of distances is exact for nearest neighbours, and off by a few per cent else."""
    monkeypatch.setattr(dense, "BY_GRAM", COHORT - 1)
    tree, rows = graded(8, 20), as_rows(graded(8, 20))
    d = np.asarray(dense.distances(tree, M))
    columns, exact = nearest64(tree, np.arange(COHORT))
    np.testing.assert_allclose(np.take_along_axis(d, columns, 1), exact, rtol=1e-5)
    np.testing.assert_array_equal(d, d.T)
    np.testing.assert_allclose(d[7], np.sqrt(((rows - rows[7]) ** 2).sum(1)), rtol=0.08)


def shapes_in(jaxpr):
    """Yields the shape of every array in a jaxpr and in those inside it."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in (*equation.invars, *equation.outvars) if hasattr(v.aval, "shape"))
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                    yield from shapes_in(inner)


def test_no_matrix_of_all_pairs_is_formed(monkeypatch):
    """In every program of the sparse path at most one axis is as long as the cohort, and estimates come in blocks."""
    cohort = 9001  # longer than any other axis

    def of(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    leaf, number, pairs = of(cohort, 2, 4, 30), of(dtype=jnp.int32), of(cohort * 10, dtype=jnp.int32)
    near = shortlist.Nearest(of(cohort, M, dtype=jnp.int32), of(cohort, M))
    rows = SparseRows(of(cohort, M + 1), of(cohort, M + 1, dtype=jnp.int32))

    def weights(near, sizes):
        return mixing.ata_weights_of_nearest(near, sizes, neighbors=M, weighting="share_of_sizes")

    for function, arguments in ((factor_pairs, (leaf, pairs, pairs, number)),
                                (weights, (near, of(cohort))), (apply_rows, (rows, leaf))):
        shapes = list(shapes_in(jax.make_jaxpr(function)(*arguments).jaxpr))
        assert any(cohort in shape for shape in shapes)
        assert all(sum(axis >= cohort for axis in shape) <= 1 for shape in shapes)
    monkeypatch.setattr(shortlist, "BLOCK", 10_000)  # estimates are NumPy's
    assert all(block.size <= 10_000 for _, block in shortlist.estimates(np.eye(300)))


def test_a_round_of_a_large_cohort(monkeypatch):
    """Pilot's aggregation above `mixing.DENSE` gives the mixtures of the dense one, and logs no matrix of all pairs."""
    from pilot_jax.federation.strategies import make_strategy

    tree = graded(8, 20)
    cohort = Cohort({"text_adapter": tree, "task": {"w": np.random.default_rng(0).standard_normal((COHORT, 3))}},
                    np.arange(1, COHORT + 1), np.arange(COHORT) % 3, np.arange(COHORT), 1)
    pilot = make_strategy("pilot")
    server = {"bank": {"w": np.zeros((3, 3), np.float32)}, "members": {}}
    expected = pilot.aggregate(cohort, server)
    monkeypatch.setattr(mixing, "DENSE", COHORT - 1)
    for combine in ("factors", "product"):
        strategy = make_strategy("pilot", {"combine": combine})
        got = strategy.aggregate(cohort, server)
        assert got.mixing["weights"].shape == got.mixing["columns"].shape == (COHORT, M + 1)
        assert got.mixing["distances"].shape == (COHORT, M)
        if combine == "factors":
            jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4),
                         got.downloads, expected.downloads)
            np.testing.assert_allclose(got.mixing["effective_neighbors"], expected.mixing["effective_neighbors"],
                                       rtol=1e-4)


def test_files_of_a_large_cohort_are_no_figures(tmp_path):
    """They are written as they are, and the report reads past them."""
    from pilot_jax.report import record
    from pilot_jax.runs.events import MixingFiles

    near = {"weights": np.full((4, 3), 1 / 3, np.float32), "columns": np.zeros((4, 3), np.int32),
            "distances": np.ones((4, 2), np.float32), "effective_neighbors": np.full(4, 3.0),
            "client_ids": list("abcd")}
    files = MixingFiles(tmp_path)
    files.phase_ended(None, {"round": 1, "phase": "stage2"}, near, range(4))
    assert record._mixing(tmp_path / "round_0001_stage2.npz") is None
    with np.load(tmp_path / "round_0001_stage2.npz") as arrays:
        assert set(arrays) == near.keys() and arrays["columns"].shape == (4, 3)
