"""ATA's neighbours in cohorts of hundreds to ten thousand clients, with and without sketches: a part of aggregation.py.

Clients have tasks, and in a task groups of eight that are nearer to each other, as clients of one drawing style are.
An upload is start + 0.5 · (its task's centre) + 0.2 · (its group's) + 0.1 · noise, or without groups; each of the four
is a window of one array of random numbers, so that a leaf of any client can be made again at memory's speed.
"""

from __future__ import annotations

import contextlib
import resource
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np

RANK, NEIGHBORS, TASKS, GROUP, CHECKED = 8, 2, 9, 8, 16
POOL = np.random.default_rng(0).standard_normal(2**22, np.float32)
OPTIONS = {"neighbors": NEIGHBORS, "auto_factor": 0.25}


class GeneratedLeaf:
    """A leaf [S, layers, …] that stands for the clients' files: it is computed whenever it is read."""

    def __init__(self, shape: tuple[int, ...], number: int, groups: bool = True) -> None:
        self.shape, self.dtype, self.number, self.groups = shape, np.dtype(np.float32), number, groups

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, start: int, stop: int) -> np.ndarray:
        from pilot_jax.parallel.host_memory import empty

        size = int(np.prod(self.shape[1:]))
        out = empty((stop - start, size), np.float32)

        def window(kind: int, index: int) -> np.ndarray:
            at = (2_654_435_761 * (4 * index + kind + 1) + 40_503 * self.number) % (len(POOL) - size)
            return POOL[at:at + size]

        common = {task: window(0, 0) + np.float32(0.5) * window(1, task) for task in range(TASKS)}
        for row, k in zip(out, range(start, stop), strict=True):
            np.multiply(window(3, k), np.float32(0.1), out=row)
            row += common[k // GROUP % TASKS]
            if self.groups:
                row += np.float32(0.2) * window(2, k // GROUP)
        return out.reshape(stop - start, *self.shape[1:])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.rows(0, len(self))


def cohort_of(clients: int, parameters: int, leaf: float = 1e9, groups: bool = True) -> dict:
    """Returns generated LoRA uploads with about `parameters` entries a client, no leaf above `leaf` bytes."""
    targets = 7 * max(1, round(clients * parameters * 4 / 14 / leaf))
    width = min(4096, max(8, round((parameters / (2 * targets * RANK)) ** 0.5)))
    layers = max(1, round(parameters / (2 * targets * RANK * width)))
    return {"layers": {f"target{i}": {"a": GeneratedLeaf((clients, layers, RANK, width), 2 * i, groups),
                                      "b": GeneratedLeaf((clients, layers, width, RANK), 2 * i + 1, groups)}
                       for i in range(targets)}}


def in_memory(uploads: dict) -> dict:
    return jax.tree.map(np.asarray, uploads)


def entries(uploads: dict) -> int:
    return sum(int(np.prod(leaf.shape[1:])) for leaf in jax.tree.leaves(uploads))


def forget_peak() -> None:
    """Makes `peak_gb` begin anew; only Linux can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_gb() -> float:
    """Returns the peak memory of this process since `forget_peak`, or elsewhere than on Linux since its start."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def distances64(uploads: dict, rows: np.ndarray) -> np.ndarray:
    """Returns the distances of some clients to all, in float64; in float64 the expanded square loses nothing here."""
    clients = len(jax.tree.leaves(uploads)[0])
    squares = np.zeros((len(rows), clients))
    for leaf in jax.tree.leaves(uploads):
        def read(start, stop, leaf=leaf):
            part = leaf.rows(start, stop) if isinstance(leaf, GeneratedLeaf) else leaf[start:stop]
            return part.reshape(stop - start, -1).astype(np.float64)

        own = np.concatenate([read(k, k + 1) for k in rows])
        for start in range(0, clients, 256):
            others = read(start, min(start + 256, clients))
            squares[:, start:start + 256] += ((own**2).sum(1)[:, None] + np.einsum("sp,sp->s", others, others)[None]
                                              - 2 * own @ others.T)
    squares[np.arange(len(rows)), rows] = 0
    return np.sqrt(np.maximum(squares, 0))


def against_float64(uploads: dict, columns: np.ndarray, distances: np.ndarray, weights: np.ndarray) -> dict:
    """Returns, over some clients, the share of true neighbours that were found, how much farther the found ones are,
    and the errors of distances and of weights; columns [S, M], distances [S, M], weights [S, M + 1]."""
    rows = np.linspace(0, len(columns) - 1, CHECKED).astype(int)
    true = distances64(uploads, rows)
    recall, farther, distance, weight = [], 0.0, 0.0, 0.0
    for k, d in zip(rows, true, strict=True):
        nearest = np.argsort(np.where(np.arange(len(d)) == k, np.inf, d), kind="stable")[:NEIGHBORS]
        recall.append(len(set(nearest) & set(columns[k])) / NEIGHBORS)
        farther = max(farther, d[columns[k]].max() / d[nearest].max() - 1)
        distance = max(distance, np.abs(distances[k] / d[columns[k]] - 1).max())
        raw = np.exp(-np.append(0, d[columns[k]]) / (OPTIONS["auto_factor"] * d[columns[k]].mean()))
        weight = max(weight, np.abs(raw / raw.sum() - weights[k]).max())
    return {"recall": float(np.mean(recall)), "farther": farther, "distance_error": distance, "weight_error": weight}


def by_sketch(uploads: dict) -> dict:
    """Measures neighbours and weights with sketches."""
    from pilot_jax.federation import mixing, shortlist

    began = time.perf_counter()
    sketched = shortlist.sketches(uploads)
    sketching = time.perf_counter()
    pairs = shortlist.candidate_pairs(sketched, NEIGHBORS)
    chosen = time.perf_counter()
    with mock.patch.object(shortlist, "sketches", lambda _: sketched), \
            mock.patch.object(shortlist, "candidate_pairs", lambda *_: pairs):
        near = shortlist.nearest(uploads, NEIGHBORS)
    weights = jax.device_get(mixing.ata_weights_of_nearest(near, np.ones(len(sketched)), **OPTIONS)).weights
    ended = time.perf_counter()
    return {"seconds": ended - began, "sketch_s": sketching - began, "candidates_s": chosen - sketching,
            "exact_s": ended - chosen, "pairs": len(pairs), "columns": near.columns, "distances": near.distances,
            "weights": weights}


def by_gram(uploads: dict) -> dict:
    """Measures neighbours and weights with a Gram matrix of all pairs."""
    from pilot_jax.federation import distances, mixing

    clients = len(jax.tree.leaves(uploads)[0])
    began = time.perf_counter()
    with mock.patch.object(distances, "BY_GRAM", clients):
        between = distances.distances(uploads, NEIGHBORS)
    weights = np.asarray(mixing.ata_weights(between, np.ones(clients), **OPTIONS))
    seconds = time.perf_counter() - began
    between = np.asarray(between) + np.where(np.eye(clients, dtype=bool), np.float32(np.inf), 0)
    columns = np.argsort(between, axis=1, kind="stable")[:, :NEIGHBORS]
    own = np.concatenate([np.arange(clients)[:, None], columns], axis=1)
    return {"seconds": seconds, "columns": columns, "distances": np.take_along_axis(between, columns, 1),
            "weights": np.take_along_axis(weights, own, 1)}


ARRAYS = ("columns", "distances", "weights")


def row_of(how: str, data: str, uploads: dict, measured: dict) -> dict:
    """Returns a line of the table, and prints it."""
    clients, peak = len(jax.tree.leaves(uploads)[0]), peak_gb()  # the check below needs memory of its own
    line = {"how": how, "data": data, "cohort": clients, "parameters": entries(uploads)} | {
        k: v for k, v in measured.items() if k not in ARRAYS} | {"peak_gb": peak} | (
        against_float64(uploads, *(measured[name] for name in ARRAYS)) if "columns" in measured else {})
    show(line)
    return line


COLUMNS = {"how": "", "data": "", "cohort": "", "parameters": "", "seconds": ".2f", "sketch_s": ".2f",
           "candidates_s": ".2f", "exact_s": ".2f", "pairs": "", "recall": ".3f", "farther": ".1%",
           "distance_error": ".1e", "weight_error": ".1e", "peak_gb": ".2f"}


def show(line: dict | None = None) -> None:
    """Prints a line of the table, or its head."""
    cells = COLUMNS if line is None else {n: format(line[n], f) if n in line else "-" for n, f in COLUMNS.items()}
    print(" ".join(f"{(name if line is None else cells[name]):>14}" for name in COLUMNS), flush=True)


def projected(line: dict, clients: int) -> dict:
    """Returns what `clients` clients of the same size would take by the measured terms: sketches and exact pairs grow
    with S, candidates with S². Memory: sketches and their centred copy, in float64; leaves are read in parts."""
    from pilot_jax.kernels.count_sketch import SIZE

    grown = clients / line["cohort"]
    terms = {"sketch_s": line["sketch_s"] * grown, "candidates_s": line["candidates_s"] * grown**2,
             "exact_s": line["exact_s"] * grown, "pairs": round(line["pairs"] * grown)}
    return {"how": "projected", "data": line["data"], "cohort": clients, "parameters": line["parameters"], **terms,
            "seconds": sum(terms[n] for n in ("sketch_s", "candidates_s", "exact_s")),
            "peak_gb": 2 * clients * SIZE * 8 / 1e9}


def table(cohorts: list[int], parameters: int, gram_up_to: int, streamed: tuple[int, int], to: int) -> list[dict]:
    """Prints and returns the whole table; see the arguments of aggregation.py."""
    show()
    rows = []
    by_sketch(in_memory(cohort_of(64, parameters)))  # compiles what does not depend on the cohort
    for clients in cohorts:
        uploads = in_memory(cohort_of(clients, parameters))
        for how, measure in (("sketch", by_sketch), ("all pairs", by_gram)):
            if how == "sketch" or clients <= gram_up_to:
                measure(uploads) if clients <= 1024 else None  # compiles; in larger cohorts that is a small share
                forget_peak()
                rows.append(row_of(how, "groups", uploads, measure(uploads)))
            else:  # S² pairs; the matrices of all pairs grow as fast, and are the smaller part of the memory
                last = next(row for row in reversed(rows) if row["how"] == "all pairs")
                rows.append(last | {"how": "all pairs*", "cohort": clients, "peak_gb": float("nan"),
                                    "seconds": last["seconds"] * (clients / last["cohort"]) ** 2}
                            | dict.fromkeys(("recall", "farther", "distance_error", "weight_error"), float("nan")))
                show(rows[-1])
        if clients == cohorts[-1]:
            del uploads
            uploads = in_memory(cohort_of(clients, parameters, groups=False))
            forget_peak()
            rows.append(row_of("sketch", "no groups", uploads, by_sketch(uploads)))
        del uploads
    uploads = cohort_of(*streamed)
    forget_peak()
    rows.append(row_of("streamed", "groups", uploads, by_sketch(uploads)))
    rows.append(projected(rows[-1], to))
    show(rows[-1])
    return rows
