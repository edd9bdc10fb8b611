"""Measures the speed and the error of `model.operands: bfloat16` against float32, in training steps of one client.

    python benchmarks/operands.py [--steps 10] [--repetitions 5] [--client caption_0] [--json FILE]

A stage-1 phase of the quickstart's client. Both settings alternate in one process; medians of milliseconds per step.
The error is the difference of the mean and of the last loss of the `--steps` steps. It needs a CPU that multiplies
bfloat16 (the flag avx512_bf16 of /proc/cpuinfo); elsewhere bfloat16 is slower.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--client", default="caption_0")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    from pilot_jax.config import load_config
    from pilot_jax.runs import prepare
    from pilot_jax.testing.phases import train_phase

    phases, seconds, records = {}, dict[str, list[float]](), dict[str, dict]()
    for operands in ("float32", "bfloat16"):
        setup = prepare.prepare(load_config(ROOT / "configs" / "quickstart.yaml", [
            f"federation.local_steps={args.steps}", "data.digits.validation=1", "data.digits.test=1",
            f"model.operands={operands}", "system.cache=null"]))
        fed = setup.federation
        client = next(i for i, c in enumerate(fed.clients) if c.name == args.client)
        phases[operands] = fed, {client: prepare.initial_adapters(fed)}, setup.executor
        seconds[operands] = []
    for repetition in range(args.repetitions + 1):  # the first one compiles
        for operands, (fed, adapters, executor) in phases.items():
            began = time.perf_counter()
            _, (records[operands],) = train_phase(fed, adapters, 1, "stage1", "stage1", executor)
            seconds[operands] += [time.perf_counter() - began] if repetition else []
    times = {name: 1000 * statistics.median(values) / args.steps for name, values in seconds.items()}
    errors = {name: records["bfloat16"][name] - records["float32"][name] for name in ("loss", "last_loss")}
    print(", ".join(f"{name} {value:.1f} ms per step" for name, value in times.items())
          + f": {times['float32'] / times['bfloat16']:.2f} times as fast")
    print(f"after {args.steps} steps: mean loss {records['float32']['loss']:.4f}, difference {errors['loss']:+.1e}; "
          f"last loss {records['float32']['last_loss']:.4f}, difference {errors['last_loss']:+.1e}")
    if args.json:
        args.json.write_text(json.dumps({"ms_per_step": times, "errors": errors}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
