"""What three options add to the adapters of any strategy: ranks of LoRA by client or by layer, and `combine: exact`.

With ranks that differ by client, all have arrays of the largest rank R, and the rows of A and columns of B beyond a
client's own rank r are zeros, which no gradient changes. The subtree `text_scale` has the client's factor R/r, because
the model multiplies B·A by α/R, and the client's own factor is α/r. The server works with B·R/r, in a scale that is
common to all; what a client receives is cut to its rank and divided by R/r (`fitted`).

With ranks that differ by layer, the rows of A and columns of B beyond a layer's rank start as zeros, and stay so. All
layers have the factor α/R.

With `combine: exact`, the subtree `text_residual` has factors of a change ΔW of the frozen weights, equal for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pilot_jax.errors import InputError
from pilot_jax.federation import combining
from pilot_jax.federation.cohort import Cohort
from pilot_jax.federation.roles import Mode, Role, Tree
from pilot_jax.models.lora import LORA_SUBTREES, RESIDUAL, SCALE, on_factors


def extra_rows(stages: Sequence[str], exact: bool, ranks_differ: bool) -> tuple[Role, ...]:
    """Returns the rows that the options add to an ownership table with these stages."""
    frozen: dict[str, Mode] = dict.fromkeys(stages, "frozen")
    rows = [Role(RESIDUAL, frozen, "received", "exact")] if exact else []
    return (*rows, *([Role(SCALE, frozen, "local", "never")] if ranks_differ else []))


def empty_residual(lora: Mapping, most: int | None) -> Tree:
    """Returns factors of ΔW = 0 for each target of a LoRA, of rank min(d_in, d_out) or at most `most`."""
    def of_target(pair: Mapping) -> dict[str, jax.Array]:
        layers, d_in, d_out = pair["a"].shape[0], pair["a"].shape[-1], pair["b"].shape[-2]
        rank = min(d_in, d_out, most or d_in)
        return {"a": jnp.zeros((layers, rank, d_in)), "b": jnp.zeros((layers, d_out, rank))}

    return {"layers": {name: of_target(pair) for name, pair in lora["layers"].items()}}


def of_rank(name: str, tree: Tree, rank: int, factor: float = 1.0) -> Tree:
    """Returns a subtree of adapters; if it is LoRA, with zeros beyond the first `rank` rows of A and columns of B, and
    with B multiplied by `factor`."""
    if name not in LORA_SUBTREES or name in (RESIDUAL, SCALE):
        return tree
    return on_factors(name, tree, lambda a: a * (np.arange(a.shape[-2]) < rank)[:, None].astype(np.float32),
                      lambda b: b * np.where(np.arange(b.shape[-1]) < rank, factor, 0).astype(np.float32))


def with_rank(adapters: Mapping[str, Tree], rank: int, largest: int) -> dict[str, Tree]:
    """Returns the server's initial adapters as a client with the given rank has them: LoRA cut to it and in its scale,
    and the client's factor."""
    return {**{n: of_rank(n, t, rank, rank / largest) for n, t in adapters.items()},
            SCALE: {"factor": np.float32(largest / rank)}}


def rank_of(adapters: Mapping[str, Tree]) -> tuple[int, int]:
    """Returns (a client's LoRA rank, the rank of its arrays), for adapters with a factor of their own."""
    name = next(n for n in LORA_SUBTREES if n in adapters)
    ranks: list[int] = []
    on_factors(name, adapters[name], lambda a: ranks.append(a.shape[-2]), lambda b: ranks.append(b.shape[-1]))
    return round(ranks[0] / float(adapters[SCALE]["factor"])), ranks[0]


def common(upload: Mapping[str, Tree], adapters: Mapping[str, Tree]) -> dict[str, Tree]:
    """Returns a client's upload as the server works with it: B in the scale of the largest rank.

    adapters: all subtrees of the client.
    """
    return _rescaled(upload, adapters, 1)


def fitted(received: Mapping[str, Tree], adapters: Mapping[str, Tree]) -> dict[str, Tree]:
    """Returns what a client receives from the server, cut to its rank and in its scale.

    adapters: all subtrees of the client, before it receives these.
    """
    return _rescaled(received, adapters, -1)


def _rescaled(subtrees: Mapping[str, Tree], adapters: Mapping[str, Tree], power: int) -> dict[str, Tree]:
    """Returns subtrees cut to the rank of the client that has `adapters`, with B times its factor R/r to a power."""
    if SCALE not in adapters:
        return dict(subtrees)
    rank, largest = rank_of(adapters)
    return {n: of_rank(n, t, rank, (largest / rank) ** power) for n, t in subtrees.items()}


def rank_share(rank: int, largest: int, layer_ranks: Sequence[int]) -> Fraction:
    """Returns the share of the entries of LoRA's arrays, which have the largest rank, that a client of a rank has."""
    ranks = [min(rank, of_layer) for of_layer in layer_ranks] or [rank]
    return Fraction(sum(ranks), largest * len(ranks))


def traffic(sizes: Mapping[str, int], share: Fraction) -> dict[str, int]:
    """Returns bytes by subtree for a client that has a share of LoRA's entries, from those of whole arrays."""
    return {n: int(size * share) if n in LORA_SUBTREES and n != RESIDUAL else size for n, size in sizes.items()}


def of_layer_ranks(name: str, tree: Tree, ranks: Sequence[int]) -> Tree:
    """Returns a subtree of initial adapters; if it is LoRA, with zeros in the rows of A and columns of B beyond each
    layer's rank, which then get no gradient."""
    if not ranks or name not in LORA_SUBTREES or name in (RESIDUAL, SCALE):
        return tree

    def kept(leaf: jax.Array, axis: int) -> np.ndarray:  # leaf [layers, …]
        shape = [len(ranks), *(1,) * (leaf.ndim - 1)]
        shape[axis] = leaf.shape[axis]
        return (np.arange(leaf.shape[axis]) < np.asarray(ranks)[:, None]).reshape(shape).astype(np.float32)

    return on_factors(name, tree, lambda a: a * kept(a, -2), lambda b: b * kept(b, -1))


def check_layer_ranks(strategy: str, combine: str, ranks: Sequence[int]) -> None:
    """Raises an `InputError` if layers have ranks of their own, which a way to combine LoRAs would not keep."""
    if ranks and combine != "factors":
        raise InputError(f"model.lora.layer_ranks: {strategy} has strategy.combine: {combine}, which gives every layer "
                         "the same rank. Remove the key, or set combine to factors.")


def exactly(cohort: Cohort, weights: jax.Array, mean: Tree, server: Mapping[str, Any], restarts: bool,
            ) -> tuple[Tree, Tree, jax.Array]:
    """Returns what `combine: exact` makes of a cohort: (the next LoRA [1, …], the change of the frozen weights, what
    its limited rank loses).

    Args:
        mean: the LoRA [1, …] of the means of A and of B.
        restarts: whether LoRA starts anew after each aggregation (`Strategy.restarts_lora`).
    """
    following = kept = mean
    if restarts:
        kept = jax.tree.map(jnp.zeros_like, mean)
        following = jax.tree.map(lambda leaf: leaf[None], combining.redrawn(server["start"], cohort.round))
    residual, lost = combining.residual(weights, cohort.uploads["text_adapter"], server["residual"],
                                        jax.tree.map(lambda leaf: leaf[0], kept))
    return following, residual, lost
