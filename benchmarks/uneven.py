"""Measures what it costs that clients have unequal amounts of data, in two orders of training them.

    python benchmarks/uneven.py [--clients 24] [--largest 500] [--repetitions 3] [--chunks 1 4] [--json FILE]

Clients of the quickstart's task `ocr` have 1 to `--largest` samples and train one epoch of a stage-1 phase. A chunk
takes as many steps as its longest client. "as named": clients are taken in the order of their names, as before
2026-11-26. "by steps": the longest come first, as the executor does. "useful" is the share of a chunk's client steps
that some client takes; the rest is waiting. "refilled" is the share that would be useful if the next client began as
soon as another ends, which the executor does not do. Orders alternate in one process; medians of client steps per
second.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent


def as_named(jobs: list, width: int) -> list[list]:
    """Returns chunks of clients in the order of their names; for clients whose arrays have one shape."""
    return [jobs[i:i + width] for i in range(0, len(jobs), width)]


def refilled(steps: list[int], width: int) -> float:
    """Returns the useful share if the client with most steps begins wherever another has ended first."""
    ends = [0] * width
    for count in sorted(steps, reverse=True):
        ends[ends.index(min(ends))] += count
    return sum(steps) / (width * max(ends))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--largest", type=int, default=500)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    from pilot_jax.config import SystemConfig, load_config
    from pilot_jax.federation import chunks, executor
    from pilot_jax.parallel.devices import split_cpu
    from pilot_jax.runs import prepare
    from pilot_jax.testing.phases import train_phase

    split_cpu(SystemConfig())
    by_steps, out = executor.chunks, []
    setup = prepare.prepare(load_config(ROOT / "configs" / "quickstart.yaml", [
        "federation.local_epochs=1", f"data.digits.train={args.largest}", "data.digits.validation=1",
        "data.digits.test=1", "system.cache=null"]))
    one = next(c for c in setup.federation.clients if c.name == "ocr_0")
    sizes = np.random.default_rng(0).integers(1, args.largest + 1, args.clients)
    clients = tuple(dataclasses.replace(one, name=f"ocr_{i:03d}", train={
        name: np.asarray(array)[:size] for name, array in one.train.items()}) for i, size in enumerate(sizes))
    fed = dataclasses.replace(setup.federation, clients=clients, tasks=("ocr",))
    everyone = dict.fromkeys(range(args.clients), prepare.initial_adapters(fed))
    steps = [fed.full_steps(client) for client in range(args.clients)]
    print(f"{args.clients} clients, {min(steps)} to {max(steps)} steps, {sum(steps)} in all")
    for chunk in args.chunks:
        trainer = dataclasses.replace(setup.executor, client_chunk=chunk)
        seconds: dict[str, list[float]] = {"as named": [], "by steps": []}
        width = chunks.chunk_width(chunk, args.clients, fed.mesh)
        useful = {}
        for repetition in range(args.repetitions + 1):  # the first one compiles
            for name, order in (("as named", as_named), ("by steps", by_steps)):
                executor.chunks = order
                jobs = [chunks.Job(0, fed, client, count) for client, count in enumerate(steps)]
                useful[name] = sum(steps) / sum(width * max(j.steps for j in part) for part in order(jobs, width))
                began = time.perf_counter()
                train_phase(fed, everyone, 1, "stage1", "stage1", trainer)
                seconds[name] += [time.perf_counter() - began] if repetition else []
        speed = {name: sum(steps) / statistics.median(times) for name, times in seconds.items()}
        out.append({"chunk": chunk, "useful": useful, "refilled": refilled(steps, width),
                    "client_steps_per_second": speed})
        print(f"client_chunk {chunk}: " + "; ".join(
            f"{name} {speed[name]:.1f} client steps/s ({useful[name]:.0%} useful)" for name in speed)
            + f"; ratio {speed['by steps'] / speed['as named']:.2f}; refilled {refilled(steps, width):.0%} useful")
    executor.chunks = by_steps
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
