"""Measures a population with client states on disk: two rounds with 128 and with 1,024 clients, 64 in each round.

    python benchmarks/population.py [--clients 128 1024] [--json FILE]

Each size runs in a new process, with `configs/scale_1024.yaml`. Peak memory is that of the process. "prepare" is the
time of reading and padding the inputs of chunks, and "waited" how long devices waited for them. "written" is the time
of writing clients' adapters, and "write wait" how long training waited for that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def measure(clients: int) -> dict:
    from pilot_jax.config import load_config
    from pilot_jax.runs.prepare import split_cpu_for
    from pilot_jax.runs.simulate import simulate

    with tempfile.TemporaryDirectory() as folder:
        config = load_config(ROOT / "configs" / "scale_1024.yaml", [
            f"data.digits.clients_per_task={clients // 4}", f"system.store={folder}"])
        split_cpu_for(config)
        began = time.perf_counter()
        run = simulate(config, out=Path(folder) / "run")
        phases = [r for r in run.records if "waited_seconds" in r]
        store = run.federation.store
        return {"clients": clients, "seconds": time.perf_counter() - began,
                "peak_memory_bytes": run.summary["peak_memory_bytes"],
                "client_steps": run.summary["client_steps"],
                "ms_per_client_step": 1000 / run.summary["client_steps_per_second"],
                "train_seconds": sum(p["seconds"] for p in phases),
                "prepare_seconds": sum(p["prepare_seconds"] for p in phases),
                "waited_seconds": sum(p["waited_seconds"] for p in phases),
                "write_seconds": store.write_seconds, "write_waited_seconds": store.waited_seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    lines = []
    for clients in arguments.clients:
        done = subprocess.run([sys.executable, __file__, "--one", str(clients)], capture_output=True, text=True,
                              check=True)
        lines.append(json.loads(done.stdout.splitlines()[-1]))
        line = lines[-1]
        print(f"{clients:6d} clients: {line['seconds']:.0f} s, peak {line['peak_memory_bytes'] / 1e9:.2f} GB, "
              f"{line['ms_per_client_step']:.1f} ms a client step ({line['client_steps']} steps in "
              f"{line['train_seconds']:.1f} s), prepare {line['prepare_seconds']:.2f} s, waited "
              f"{line['waited_seconds']:.2f} s, written in {line['write_seconds']:.2f} s, write wait "
              f"{line['write_waited_seconds']:.2f} s", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(lines, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
