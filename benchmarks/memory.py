"""Measures the peak memory of one round of the quickstart, with and without `parallel.host_memory.give_back`.

    python benchmarks/memory.py [--repetitions 3] [--set KEY=VALUE …]

Runs alternate, each in a new process that keeps nothing in the cache folder. The medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

ONE_ROUND = """
import sys
from pilot_jax.parallel import host_memory
if sys.argv[1] == "without":
    host_memory.give_back = lambda: None  # must be replaced before other modules import it
from pilot_jax.config import load_config
from pilot_jax.runs.prepare import split_cpu_for
from pilot_jax.runs.simulate import simulate
config = load_config(sys.argv[2], ["federation.rounds=1", "system.cache=null", *sys.argv[3:]])
split_cpu_for(config)
print(simulate(config).summary["peak_memory_bytes"])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="config key to set, KEY=VALUE")
    args = parser.parse_args()
    peaks: dict[str, list[int]] = {"with": [], "without": []}
    for _ in range(args.repetitions):
        for how, seen in peaks.items():
            command = (sys.executable, "-c", ONE_ROUND, how, str(ROOT / "configs" / "quickstart.yaml"), *args.overrides)
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            seen.append(int(done.stdout.split()[-1]))
    for how, seen in peaks.items():
        print(f"{how:<12} {statistics.median(seen) / 1e9:.2f} GB  ({', '.join(f'{x / 1e9:.2f}' for x in seen)})")


if __name__ == "__main__":
    main()
