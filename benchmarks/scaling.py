"""Measures how the time of a client step, and memory, grow with clients, chunk size, sequence length and LoRA rank.

    python benchmarks/scaling.py [--only clients chunk length rank] [--clients 4 8 16 32 64 128 256] [--json FILE]

Each line is measured in a new process, with stage-1 phases of the quickstart's task `ocr` and four steps per client:
one phase to compile, then the fastest of two or three. "growth" is the peak memory minus that before training. `chunk`
also has lines marked "map", in which one program trains the clients one after another, for comparison with `vmap`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pilot_jax.federation.client import Adapters, ClientBatch, local_update
from pilot_jax.federation.phases import PhaseSpec
from pilot_jax.federation.roles import Tree

ROOT = Path(__file__).parent.parent
STEPS = 4


@partial(jax.jit, static_argnames=("spec", "mesh"))
def one_by_one(spec: PhaseSpec, base: Tree, own: Tree, received: Adapters, batch: ClientBatch,
               mesh: None = None) -> Any:
    """Computes `local_update` for one client after another in one program, instead of all at once by `vmap`."""
    def one(client: tuple[Tree, Tree, ClientBatch]) -> Any:
        own, read, its_batch = jax.tree.map(lambda leaf: leaf[None], client)
        return jax.tree.map(lambda leaf: leaf[0],
                            local_update(spec, base, own, Adapters(read, received.common), its_batch, mesh=mesh))

    return jax.lax.map(one, (own, received.own, batch))


def measure(case: dict) -> dict:
    import jax.numpy as jnp

    from pilot_jax.config import SystemConfig, load_config
    from pilot_jax.federation import executor
    from pilot_jax.parallel.devices import split_cpu
    from pilot_jax.runs import prepare
    from pilot_jax.testing.phases import train_phase

    split_cpu(SystemConfig(client_devices=case["devices"]))
    config = load_config(ROOT / "configs" / "quickstart.yaml", [
        f"federation.local_steps={STEPS}", "data.digits.train=32", "data.digits.validation=1", "data.digits.test=1",
        f"system.client_chunk={case['chunk']}", f"model.lora.rank={case['rank']}"])
    setup = prepare.prepare(config)
    fed = setup.federation
    one = next(c for c in fed.clients if c.name == "ocr_0")
    spare = case["length"] - one.train["input_ids"].shape[1]
    widened = {n: np.pad(v, ((0, 0), (0, spare))) if n in ("input_ids", "attention_mask") and spare > 0 else v
               for n, v in one.train.items()}
    clients = tuple(dataclasses.replace(one, name=f"ocr_{i:04d}", train=widened) for i in range(case["clients"]))
    fed = dataclasses.replace(fed, clients=clients, tasks=("ocr",))
    if spare > 0:  # the added tokens count as real ones, so that attention does not skip them
        widened["attention_mask"][:] = 1
    if case["map"]:
        executor.local_update = one_by_one  # the executor calls it by this name
    adapters = prepare.initial_adapters(fed)
    adapters["task_bank"], adapters["cross_task"] = (
        jax.tree.map(lambda x: jnp.asarray(x)[:1], adapters[n]) for n in ("task_bank", "cross_task"))
    everyone = dict.fromkeys(range(len(clients)), adapters)

    def phase() -> float:
        began = time.perf_counter()
        train_phase(fed, everyone, 1, "stage1", "stage1", setup.executor)
        return time.perf_counter() - began

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    phase()
    seconds = min(phase() for _ in range(case["repetitions"]))
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"ms_per_client_step": 1e3 * seconds / (len(clients) * STEPS), "growth_bytes": growth}


def cases(only: list[str], clients: list[int]) -> list[dict]:
    base = {"clients": 8, "chunk": 1, "length": 64, "rank": 8, "map": False, "devices": None, "repetitions": 3}
    out = []
    if "clients" in only:
        out += [base | {"what": "clients", "clients": n, "repetitions": 3 if n <= 64 else 2} for n in clients]
    if "chunk" in only:
        out += [base | {"what": "chunk", "chunk": n, "devices": 1, "map": mapped}
                for n in (1, 2, 4, 8) for mapped in ((False, True) if n > 1 else (False,))]
    if "length" in only:
        out += [base | {"what": "length", "length": n} for n in (64, 128, 256)]
    if "rank" in only:
        out += [base | {"what": "rank", "rank": n} for n in (4, 8, 16, 64)]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=("clients", "chunk", "length", "rank"),
                        default=["clients", "chunk", "length", "rank"])
    parser.add_argument("--clients", type=int, nargs="*", default=[4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)  # the case that this process measures
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case)))
        return
    rows = []
    print(f"{'':<8} {'clients':>7} {'chunk':>5} {'length':>6} {'rank':>4} {'ms a client step':>17} {'growth GB':>10}")
    for case in cases(args.only, args.clients):
        done = subprocess.run([sys.executable, __file__, "--case", json.dumps(case)], capture_output=True, text=True,
                              cwd=ROOT)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        rows.append(case | json.loads(done.stdout.splitlines()[-1]))
        row = rows[-1]
        print(f"{row['what']:<8} {row['clients']:>7} {row['chunk']:>5} {row['length']:>6} {row['rank']:>4} "
              f"{row['ms_per_client_step']:>17.1f} {row['growth_bytes'] / 1e9:>10.2f}"
              f"{'  map' if row['map'] else ''}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
