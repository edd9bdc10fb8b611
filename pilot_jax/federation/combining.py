"""How weighted LoRAs become one: functions of (weights, LoRAs of a cohort) to a LoRA for each row of weights.

The matrix of weights says who counts how much; `mixing.apply` then takes the means of A and of B (`combine: factors`).
Their product B̄Ā is not the mean of the clients' products BA. The functions below are the three other ways:

    product:  the LoRA of the client's rank that is nearest to Σ_j w_j B_jA_j
    aligned:  the means of A and B, after each client's pair is rotated to a reference, which leaves its BA as it was
    residual: what Σ_j w_j B_jA_j has beyond B̄Ā, as a second pair of factors beside the frozen weights

LoRAs have leaves a [S, layers, R, d_in] and b [S, layers, d_out, R]. No product B·A of full size is formed, unless the
cohort's ranks together exceed d_in or d_out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pilot_jax.federation.roles import Tree
from pilot_jax.federation.sparse import SparseRows, largest_terms
from pilot_jax.programs import KeptJit

AnyArray = Array | np.ndarray
Pair = tuple[jax.Array, jax.Array]


def truncated(a: Float[Array, "n d_in"], b: Float[Array, "d_out n"], rank: int,
              ) -> tuple[Float[Array, "{rank} d_in"], Float[Array, "d_out {rank}"], Float[Array, ""]]:
    """Returns (A, B, lost) with B·A the best approximation of b·a of the given rank; lost: ‖b·a − B·A‖_F².

    The rows of A are orthonormal, and the columns of B are as long as the singular values, largest first: the first r
    rows and columns are the best approximation of rank r. A direction with singular value 0 keeps its row of A, so that
    training can use it. Where `rank` exceeds min(n, d_in, d_out), the rest is zeros.
    """
    with jax.default_matmul_precision("highest"):
        q_b, r_b = jnp.linalg.qr(b)
        q_a, r_a = jnp.linalg.qr(a.T)
        u, values, vt = jnp.linalg.svd(r_b @ r_a.T, full_matrices=False)
        a, b = vt @ q_a.T, (q_b @ u) * values
    largest = jnp.argmax(jnp.abs(a), axis=1)[:, None]
    sign = jnp.where(jnp.take_along_axis(a, largest, axis=1) < 0, -1.0, 1.0)  # an SVD is unique up to signs only
    spare = max(rank - len(values), 0)
    a, b = jnp.pad((a * sign)[:rank], ((0, spare), (0, 0))), jnp.pad((b * sign.T)[:, :rank], ((0, 0), (0, spare)))
    return a, b, jnp.sum(values[rank:] ** 2)


def _side_by_side(weights: jax.Array, a: jax.Array, b: jax.Array) -> Pair:
    """Returns (A [S·R, d_in], B [d_out, S·R]) with B·A = Σ_s w_s B_sA_s, from a [S, R, d_in], b [S, d_out, R]."""
    b = weights[:, None, None] * b
    return a.reshape(-1, a.shape[-1]), jnp.moveaxis(b, 0, 1).reshape(b.shape[1], -1)


def _by_layer(function: Callable[..., Any], *pairs: tuple[jax.Array, ...]) -> Any:
    """Returns function(*pairs) of one layer after the other; pairs have leaves [S, layers, …]."""
    return jax.lax.map(lambda layer: function(*layer), tuple(
        tuple(jnp.swapaxes(leaf.astype(jnp.float32), 0, 1) for leaf in pair) for pair in pairs))


def _by_target(function: Callable[..., tuple[jax.Array, ...]], *loras: Mapping) -> tuple[Tree, list[Any]]:
    """Returns (the LoRA of A and B that `function` gives for the pairs (A, B) of each target, what else it gives)."""
    layers, rest = {}, []
    for name in loras[0]["layers"]:
        a, b, *more = function(*((lora["layers"][name]["a"], lora["layers"][name]["b"]) for lora in loras))
        layers[name] = {"a": a, "b": b}
        rest += more
    return {"layers": layers}, rest


@partial(KeptJit, static=("terms",))
def product(weights: Float[AnyArray, "M S"] | SparseRows, loras: Mapping, terms: int | None = None) -> Tree:
    """Returns, for each row of `weights`, the LoRA [M, …] of the same rank R that is nearest to Σ_j w_j B_jA_j.

    It is found by QR decompositions of the factors side by side and the SVD of a small matrix (FlexLoRA: Bai et al.,
    NeurIPS 2024, arXiv 2402.11505, which forms the full product). See `truncated` for the form of the factors.

    Args:
        terms: largest number of weights above 0 in a row (default: all S).
    """
    rows = jax.tree.map(jnp.asarray, largest_terms(weights, terms))

    def of_target(pair: Pair) -> tuple[jax.Array, ...]:
        def row(of_row: SparseRows) -> Pair:
            w, chosen = of_row
            return _by_layer(lambda ab: truncated(*_side_by_side(w, *ab), ab[0].shape[1])[:2],
                             (pair[0][chosen], pair[1][chosen]))

        return jax.lax.map(row, rows)

    return _by_target(of_target, loras)[0]


def rotation(own: Float[Array, "R d"], reference: Float[Array, "R d"], strength: float = 1.0) -> Float[Array, "R R"]:
    """Returns the orthogonal Q that minimises ‖Qᵀ·own − reference‖_F (orthogonal Procrustes problem).

    strength: λ of FedRot-LoRA. Below 1, Q is a rotation proper (its determinant is 1), and the result is the orthogonal
    matrix nearest to (1 − λ)·I + λ·Q.
    """
    with jax.default_matmul_precision("highest"):
        u, _, vt = jnp.linalg.svd(own @ reference.T)
        if strength == 1.0:
            return u @ vt
        proper = u @ vt.at[-1].multiply(jnp.where(jnp.linalg.det(u @ vt) < 0, -1.0, 1.0))
        u, _, vt = jnp.linalg.svd((1 - strength) * jnp.eye(len(u)) + strength * proper)
        return u @ vt


@partial(KeptJit, static=("factor", "strength"))
def aligned(weights: Float[AnyArray, "M S"], loras: Mapping, reference: Mapping, factor: str = "a",
            strength: float = 1.0) -> Tree:
    """Returns, for each row of `weights`, the means [M, …] of A and B after rotation to the row's reference.

    FedRot-LoRA (Zhang et al., ICML 2026, arXiv 2602.23638): each pair becomes (Qᵀ·A, B·Q), with the rotation Q of each
    layer that brings A (or B) nearest to that of the reference, before the means are taken.

    Args:
        reference: a LoRA for each row, leaves [M, …].
        factor: "a" or "b", the factor by which Q is found.
        strength: λ, see `rotation`.
    """
    def layer(loras: Pair, goal: Pair, w: jax.Array) -> Pair:
        def one(a: jax.Array, b: jax.Array) -> Pair:
            q = rotation(a, goal[0][0], strength) if factor == "a" else rotation(b.T, goal[1][0].T, strength)
            return q.T @ a, b @ q

        with jax.default_matmul_precision("highest"):
            a, b = jax.vmap(one)(*loras)
            return jnp.tensordot(w, a, 1), jnp.tensordot(w, b, 1)

    def of_target(pair: Pair, goals: Pair) -> tuple[jax.Array, ...]:
        def row(of_row: tuple[jax.Array, Pair]) -> Pair:
            w, goal = of_row
            return _by_layer(lambda ab, goal: layer(ab, goal, w), pair, tuple(leaf[None] for leaf in goal))

        return jax.lax.map(row, (jnp.asarray(weights, jnp.float32), goals))

    return _by_target(of_target, loras, reference)[0]


@KeptJit
def residual(weights: Float[AnyArray, " S"], loras: Mapping, before: Mapping, mean: Mapping) -> tuple[Tree, jax.Array]:
    """Returns (factors of ΔW + Σ_j w_j B_jA_j − B̄Ā, lost): what mixing by factors loses is added to ΔW.

    FedEx-LoRA (Singhal et al., ACL 2025, arXiv 2410.09432) adds it to the frozen weights, which this leaves as they
    are: the factors are applied beside them, and are equal for all clients. With `mean` zero, all of the clients'
    products go there, as in FLoRA (Wang et al., NeurIPS 2024, arXiv 2409.05976).

    Args:
        before: factors of ΔW so far, a [layers, C, d_in] and b [layers, d_out, C]; the result has the same shapes.
        mean: Ā and B̄, leaves [layers, …].

    Returns: `lost` is the part of the squared norm that C columns cannot hold, relative to that of the whole, over all
        targets; 0 up to rounding where C is min(d_in, d_out).
    """
    def layer(loras: Pair, before: Pair, mean: Pair) -> tuple[jax.Array, ...]:
        (old_a,), (old_b,), (mean_a,), (mean_b,) = *before, *mean
        a, b = _side_by_side(jnp.asarray(weights, jnp.float32), *loras)
        a, b, lost = truncated(jnp.concatenate([old_a, a, mean_a]), jnp.concatenate([old_b, b, -mean_b], axis=1),
                               len(old_a))
        return a, b, lost, jnp.sum(b**2)

    after, sums = _by_target(lambda *pairs: _by_layer(layer, *pairs), loras,
                             *(jax.tree.map(lambda leaf: leaf[None], tree) for tree in (before, mean)))
    lost, kept = sum(jnp.sum(x) for x in sums[::2]), sum(jnp.sum(x) for x in sums[1::2])
    return after, jnp.where(lost > 0, lost / jnp.maximum(lost + kept, 1e-30), 0.0)


def redrawn(start: Mapping, round_: int) -> Tree:
    """Returns a new start of LoRA, with B = 0: the entries of each A of `start`, leaves [layers, …], in an order that
    depends on the round. As they are independent and of one distribution, this is another draw of them."""
    def one(path: Any, leaf: jax.Array) -> jax.Array:
        if path[-1].key == "b":
            return jnp.zeros_like(leaf)
        order = jax.random.key(round_)
        return jax.random.permutation(order, jnp.asarray(leaf).reshape(-1)).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(one, start)
