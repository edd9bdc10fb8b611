"""Measures ATA on uploads in files: weights and mixed adapters of a cohort that may be larger than memory.

    python benchmarks/aggregation_on_disk.py [--cohort 512 --parameters 1e6] [--folder DIR] [--json FILE]

Uploads are LoRA trees as in `benchmarks/aggregation.py`, with one file per leaf, written client by client. Distances
and mixing then read one leaf at a time. The distances of three clients to their nearest neighbours, and their mixed
adapters, are compared with float64. Peak memory is that of the whole process, JAX included.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

from pilot_jax.federation import mixing
from pilot_jax.storage import RowsWriter, map_on_disk

RANK, NEIGHBORS, TARGETS = 8, 2, ("q", "k", "v", "o", "gate", "up", "down")


def write_uploads(folder: Path, cohort: int, parameters: int, clusters: int = 3) -> dict:
    """Writes trees of 14 leaves with about `parameters` numbers per client, in clusters half a tree's size apart."""
    width = max(8, round((parameters / (14 * RANK)) ** 0.5))
    layers = max(1, round(parameters / (14 * RANK * width)))
    out: dict = {"layers": {}}
    for number, target in enumerate(TARGETS):
        pair = {}
        for name, shape in (("a", (layers, RANK, width)), ("b", (layers, width, RANK))):
            rng = np.random.default_rng([number, len(pair)])
            start = rng.standard_normal(shape, np.float32)
            centres = rng.standard_normal((clusters, *shape), np.float32)
            writer = RowsWriter(folder / f"{target}-{name}", (cohort, *shape), np.float32)
            for k in range(cohort):
                noise = 0.1 * rng.standard_normal(shape, np.float32)
                writer[[k]] = (start + 0.5 * centres[k % clusters] + noise)[None]
            pair[name] = writer.rows
        out["layers"][target] = pair
    return out


def check(uploads: dict, mixed: dict, weights: np.ndarray, distances: np.ndarray) -> tuple[float, float]:
    """Returns the largest relative error of distances with a weight above 0, and absolute error of mixed values."""
    worst_distance = worst_value = 0.0
    for k in (0, len(weights) // 2, len(weights) - 1):
        chosen = np.flatnonzero(weights[k])
        squares = np.zeros(len(chosen))
        for leaf, after in zip(jax.tree.leaves(uploads), jax.tree.leaves(mixed), strict=True):
            rows = np.stack([np.asarray(leaf.part(j, j + 1), np.float64)[0] for j in chosen])
            own = np.asarray(leaf.part(k, k + 1), np.float64)[0]
            squares += ((rows - own) ** 2).reshape(len(chosen), -1).sum(1)
            expected = np.tensordot(weights[k, chosen].astype(np.float64), rows, 1)
            worst_value = max(worst_value, float(np.abs(after.part(k, k + 1)[0] - expected).max()))
        for j, square in zip(chosen, squares, strict=True):
            if j != k:
                worst_distance = max(worst_distance, abs(distances[k, j] / square**0.5 - 1))
    return worst_distance, worst_value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cohort", type=int, default=512)
    parser.add_argument("--parameters", type=float, default=1e6)
    parser.add_argument("--folder", type=Path, help="folder for the files; default: the system's temporary folder")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        uploads = write_uploads(Path(folder), args.cohort, int(args.parameters))
        size = sum(int(np.prod(x.shape)) * 4 for x in jax.tree.leaves(uploads))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        began = time.perf_counter()
        weights, distances = mixing.ata(uploads, np.ones(args.cohort), neighbors=NEIGHBORS, auto_factor=0.25)
        weights, distances = np.asarray(weights), np.asarray(distances)
        weighed = time.perf_counter()
        mixed = map_on_disk(partial(jax.jit(mixing.apply), weights), uploads, Path(folder))
        ended = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        wrong_distance, wrong_value = check(uploads, mixed, weights, distances)
    line = {"cohort": args.cohort, "parameters": size // (4 * args.cohort), "bytes": size,
            "weights_s": weighed - began, "mixing_s": ended - weighed, "peak_memory_bytes": peak,
            "before_bytes": before, "distance_error": wrong_distance, "value_error": wrong_value}
    print(f"{args.cohort} clients x {line['parameters'] / 1e6:.2f} M parameters, {size / 1e9:.2f} GB in files: weights "
          f"{line['weights_s']:.1f} s, mixing {line['mixing_s']:.1f} s, peak memory {peak / 1e9:.2f} GB (before: "
          f"{before / 1e9:.2f}); errors against float64: distances {wrong_distance:.1e}, values {wrong_value:.1e}")
    if max(wrong_distance, wrong_value) > 1e-5:
        raise SystemExit("off by more than 1e-5")
    if args.json:
        args.json.write_text(json.dumps(line, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
