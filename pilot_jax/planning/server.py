"""Estimates what the server computes and holds in one phase, from shapes.

Matrix products count 2·m·k·n. Decompositions have the counts of Golub & Van Loan, Matrix Computations: Householder QR
with Q, and the R-SVD with both factors. Sums over uploads that are neither (medians, norms) are left out.
"""

from __future__ import annotations

from collections.abc import Mapping

from pilot_jax.federation.distances import BY_GRAM, EVERY_PAIR
from pilot_jax.federation.mixing import DENSE
from pilot_jax.federation.roles import Tree, num_bytes, num_parameters
from pilot_jax.federation.shortlist import candidates_of
from pilot_jax.federation.strategies.base import Strategy
from pilot_jax.kernels.count_sketch import SIZE
from pilot_jax.models.lora import RESIDUAL


def qr_flops(rows: int, columns: int) -> int:
    """Returns the FLOPs of a thin QR decomposition with Q."""
    long, short = max(rows, columns), min(rows, columns)
    of_r = 2 * long * short**2 - 2 * short**3 // 3
    return of_r + (of_r if rows >= columns else 4 * short**3 // 3)


def svd_flops(rows: int, columns: int) -> int:
    """Returns the FLOPs of a thin singular value decomposition with both factors."""
    long, short = max(rows, columns), min(rows, columns)
    return 6 * long * short**2 + 20 * short**3


def truncation_flops(d_in: int, d_out: int, columns: int, rank: int) -> int:
    """Returns the FLOPs of `combining.truncated` of factors with `columns` rows of A and columns of B."""
    p, q = min(d_out, columns), min(d_in, columns)
    core = 2 * p * columns * q
    return (qr_flops(d_out, columns) + qr_flops(d_in, columns) + core + svd_flops(p, q)
            + 2 * rank * (d_out * p + d_in * q))


def combine_flops(strategy: Strategy, lora: Mapping[str, Tree], residual: Mapping[str, Tree] | None,
                  cohort: int) -> int:
    """Returns the FLOPs of the strategy's way to make one LoRA of a cohort's, for all clients.

    lora: shapes of one client's; residual: those of the change of the frozen weights, with `combine: exact`.
    """
    rows, total = 1 if strategy.one_model else cohort, 0
    terms = strategy.most_weights(cohort) if cohort > DENSE else cohort  # of a row of the mixing matrix that are stored
    for name, pair in lora["layers"].items():
        layers, rank, d_in = pair["a"].shape
        d_out = pair["b"].shape[1]
        mean = 2 * terms * rank * (d_in + d_out)
        of_row = mean
        if strategy.params.combine == "product":
            of_row = truncation_flops(d_in, d_out, strategy.most_weights(cohort) * rank, rank)
        elif strategy.params.combine == "aligned":
            of_row += cohort * (2 * rank**2 * (d_in + d_in + d_out) + svd_flops(rank, rank))
        elif residual is not None:
            capacity = residual["layers"][name]["a"].shape[1]
            of_row += truncation_flops(d_in, d_out, capacity + (cohort + 1) * rank, capacity)
        total += rows * layers * of_row
    return total


def server_costs(strategy: Strategy, adapters: Mapping[str, Tree], cohort: int) -> dict[str, int]:
    """Returns {"flops": of one phase's aggregation, "bytes": of uploads, results and the server's model, float32}.

    Args:
        adapters: shapes of one client's subtrees.
        cohort: S, the clients whose uploads are aggregated.
    """
    shared = strategy.ownership().select(adapters, "shared")
    if not shared:
        return {"flops": 0, "bytes": 0}
    rows, lora = 1 if strategy.one_model else cohort, shared.get("text_adapter")
    rest = sum(num_parameters(tree) for name, tree in shared.items() if name != "text_adapter")
    flops = 2 * rows * cohort * rest
    if lora is not None:
        flops += combine_flops(strategy, lora, adapters.get(RESIDUAL), cohort)
        if (ata := getattr(strategy.params, "ata", None)) is not None:
            flops += _distance_flops(cohort, num_parameters(lora), ata.neighbors)
    residual = 2 * num_bytes(adapters[RESIDUAL]) if RESIDUAL in adapters else 0
    return {"flops": flops, "bytes": (cohort + rows + 1) * num_bytes(shared) + residual}


def _distance_flops(cohort: int, parameters: int, neighbors: int) -> int:
    """Returns the FLOPs of ATA's distances: of all pairs, or of the pairs that may be neighbours and of what finds
    them, a Gram matrix of the uploads or of their sketches."""
    pairs = cohort * (cohort - 1) // 2
    if cohort <= EVERY_PAIR:
        return 3 * parameters * pairs
    if cohort <= BY_GRAM:
        return 2 * parameters * cohort**2 + 3 * parameters * min(pairs, cohort * neighbors)
    return (8 * parameters * cohort + 2 * SIZE * cohort**2
            + 3 * parameters * min(pairs, cohort * candidates_of(neighbors)))
