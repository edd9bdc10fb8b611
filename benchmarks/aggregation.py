"""Compares the speed of ATA's distances with a NumPy loop over pairs and with torch.cdist, and all pairs with sketches.

    python benchmarks/aggregation.py [--cohort 8 32 128] [--parameters 1e6] [--space factors product]
                                     [--clusters 3] [--repetitions 3] [--large 128 512 2048 4096 10000]
                                     [--large-parameters 1e5] [--all-pairs-up-to 4096] [--streamed 10000 1e6]
                                     [--projected 1e5] [--json FILE]

First table: uploads are LoRA trees (rank 8) of clients in `--clusters` clusters, half a tree's own size apart. For
"ours" they are on the device, as in a round. For "streamed" they are in host memory and are copied to the device leaf
by leaf. "GB/s" is their size divided by the time of "ours". "of_copy" divides that by the speed of copying a large
array on this machine (each byte counts once, as read). The systems are timed alternately. Before anything is timed, the
distances to the nearest neighbours are compared with the loop's in float64. A relative difference above 1e-5 ends the
run. The loop is timed on 64 pairs, and its time is scaled to all pairs.

Second table (large_cohorts.py): time from uploads to ATA's weights by sketches and by a Gram matrix of all pairs. Of 16
clients: the share of true nearest neighbours that were found ("recall"), how much "farther" the found ones are, and the
errors of what enters a weight and of the weights against float64; above 1e-5 the run ends. "sketch" and "all pairs"
are measured in memory; "all pairs*" is projected from the largest cohort in which all pairs were measured; "streamed"
is measured with uploads that are generated when they are read, as from files; "projected" is computed from it.
"peak_gb" is the process's meanwhile, uploads included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import large_cohorts
import numpy as np

RANK, NEIGHBORS, TIMED_PAIRS = 8, 3, 64


def make_uploads(cohort: int, parameters: int, clusters: int) -> dict:
    """Returns LoRA trees of 14 leaves (7 targets, A and B), [cohort, …], with about `parameters` numbers per client."""
    from pilot_jax.parallel.host_memory import empty

    rng = np.random.default_rng(0)
    width = max(8, round((parameters / (14 * RANK)) ** 0.5))
    layers = max(1, round(parameters / (14 * RANK * width)))
    shapes = {"a": (layers, RANK, width), "b": (layers, width, RANK)}

    def leaf(shape):
        start, centres = rng.normal(size=shape), rng.normal(size=(clusters, *shape)).astype(np.float32)
        out = empty((cohort, *shape), np.float32)
        for k in range(cohort):
            out[k] = start + 0.5 * centres[k % clusters] + 0.1 * rng.standard_normal(shape, np.float32)
        return out

    return {"layers": {name: {k: leaf(s) for k, s in shapes.items()}
                       for name in ("q", "k", "v", "o", "gate", "up", "down")}}


def loop_pair(tree: dict, space: str, k: int, j: int, dtype: type = np.float32) -> float:
    """Returns the distance of one pair, as a NumPy user would write it; the space `product` also uses R×R matrices."""
    total = 0.0
    for pair in tree["layers"].values():
        a, b = pair["a"], pair["b"]
        a_k, a_j, b_k, b_j = (x.astype(dtype, copy=False) for x in (a[k], a[j], b[k], b[j]))
        if space == "factors":
            total += float(np.sum((a_k - a_j) ** 2) + np.sum((b_k - b_j) ** 2))
        else:
            da, db, turn = a_k - a_j, b_k - b_j, (0, 2, 1)
            total += float(np.sum((db.transpose(turn) @ db) * (a_k @ a_k.transpose(turn)))
                           + np.sum((b_j.transpose(turn) @ b_j) * (da @ da.transpose(turn)))
                           + 2 * np.sum((db.transpose(turn) @ b_j) * (a_k @ da.transpose(turn))))
    return max(total, 0.0) ** 0.5


def numpy_seconds(tree: dict, space: str, cohort: int) -> float:
    pairs = [(k, j) for k in range(cohort) for j in range(k)]
    chosen = [pairs[i] for i in np.random.default_rng(1).permutation(len(pairs))[:TIMED_PAIRS]]
    began = time.perf_counter()
    for k, j in chosen:
        loop_pair(tree, space, k, j)
    return (time.perf_counter() - began) * len(pairs) / len(chosen)


def torch_seconds(flat) -> float:
    import torch

    began = time.perf_counter()
    torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    return time.perf_counter() - began


def our_seconds(tree: dict, space: str) -> float:
    from pilot_jax.federation.distances import distances

    began = time.perf_counter()
    jax.block_until_ready(distances(tree, NEIGHBORS, space))
    return time.perf_counter() - began


def copy_bandwidth() -> float:
    """Returns the bytes per second that the fastest of five NumPy copies of 1 GB reads."""
    source = np.ones(2**28, np.float32)
    target = np.zeros_like(source)
    best = np.inf
    for _ in range(5):
        began = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - began)
    return source.nbytes / best


def check(tree: dict, space: str, cohort: int) -> float:
    """Returns the largest relative error of the distances of three clients to their nearest neighbours."""
    from pilot_jax.federation.distances import distances

    ours, worst = np.asarray(distances(tree, NEIGHBORS, space), np.float64), 0.0
    for k in range(min(3, cohort)):
        for j in np.argsort(np.where(np.arange(cohort) == k, np.inf, ours[k]))[:min(NEIGHBORS, cohort - 1)]:
            worst = max(worst, abs(ours[k, j] / loop_pair(tree, space, k, int(j), np.float64) - 1))
    if worst > 1e-5:
        raise SystemExit(f"distances are off by {worst:.1e}")
    return worst


COLUMNS = {"space": "", "cohort": "", "parameters": "", "ours_s": ".3f", "streamed_s": ".3f", "numpy_s": ".2f",
           "ratio": ".1f", "cdist_s": ".2f", "GB/s": ".2f", "of_copy": ".2f", "error": ".1e"}


def measure(tree: dict, space: str, cohort: int, repetitions: int, bandwidth: float) -> dict:
    worst = check(tree, space, cohort)  # this also compiles
    size, resident, flat = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)), jax.tree.map(jnp.array, tree), None
    jax.block_until_ready(resident)
    if space == "factors" and size < 2e9:
        import torch

        flat = torch.from_numpy(np.concatenate([x.reshape(cohort, -1) for x in jax.tree.leaves(tree)], axis=1))
    times: dict[str, list[float]] = {"ours": [], "streamed": [], "numpy": [], "cdist": []}
    for _ in range(repetitions):
        times["ours"].append(our_seconds(resident, space))
        times["streamed"].append(our_seconds(tree, space))
        times["numpy"].append(numpy_seconds(tree, space, cohort))
        times["cdist"].append(float("nan") if flat is None else torch_seconds(flat))
    ours, streamed, loop, cdist = (statistics.median(t) for t in times.values())
    return {"space": space, "cohort": cohort, "parameters": size // (4 * cohort), "ours_s": ours,
            "streamed_s": streamed, "numpy_s": loop, "ratio": loop / ours, "cdist_s": cdist, "GB/s": size / ours / 1e9,
            "of_copy": size / ours / bandwidth, "error": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cohort", type=int, nargs="*", default=[8, 32, 128])
    parser.add_argument("--parameters", type=float, nargs="*", default=[1e6], help="numbers per LoRA tree")
    parser.add_argument("--space", nargs="*", choices=("factors", "product"), default=["factors", "product"])
    parser.add_argument("--clusters", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--large", type=int, nargs="*", default=[128, 256, 512, 1024, 2048, 4096, 10_000])
    parser.add_argument("--large-parameters", type=float, default=1e5)
    parser.add_argument("--all-pairs-up-to", type=int, default=4096)
    parser.add_argument("--streamed", type=float, nargs=2, default=[1e4, 1e6], metavar=("CLIENTS", "PARAMETERS"))
    parser.add_argument("--projected", type=float, default=1e5, metavar="CLIENTS")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"copying reads {bandwidth / 1e9:.1f} GB/s; {jax.default_backend()}, {args.repetitions} repetitions, medians")
    print(" ".join(f"{name:>10}" for name in COLUMNS))
    rows = []
    for count in args.parameters:
        for cohort in args.cohort:
            tree = make_uploads(cohort, int(count), args.clusters)
            for space in args.space:
                rows.append(measure(tree, space, cohort, args.repetitions, bandwidth))
                print(" ".join(f"{rows[-1][name]:>10{form}}" for name, form in COLUMNS.items()), flush=True)
            del tree
    large = []
    if args.large:
        clients, parameters = map(int, args.streamed)
        large = large_cohorts.table(args.large, int(args.large_parameters), args.all_pairs_up_to, (clients, parameters),
                                    int(args.projected))
    if args.json:
        args.json.write_text(json.dumps({"copy_bytes_per_second": bandwidth, "rows": rows, "large": large}, indent=1)
                             + "\n", encoding="utf-8")
    if any(row.get(error, 0) > 1e-5 for row in large for error in ("distance_error", "weight_error")):
        raise SystemExit("what enters a weight is off by more than 1e-5")


if __name__ == "__main__":
    main()
