"""Measures the peak memory of a short quickstart, with and without what the package asks of glibc's allocator.

    python benchmarks/memory.py [--repetitions 3] [--set KEY=VALUE …]

"as it is": `pilot-jax run`. "several pools": without `use_one_arena`, each thread has a pool of memory. "nothing
returned": without `give_back` either. Each runs in a new process, cold (an empty cache folder) and then a second time
(with that folder); they alternate, and medians are printed. One round of one step a phase, unless --set changes it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
WAYS = {"as it is": (), "several pools": ("use_one_arena",), "nothing returned": ("use_one_arena", "give_back")}
RUN = """
import sys
from pilot_jax.parallel import allocator
for name in filter(None, sys.argv.pop(1).split(",")):
    setattr(allocator, name, lambda: None)  # must be replaced before other modules import it
from pilot_jax.cli import main
main()
"""


def peak(without: tuple[str, ...], cache: str, overrides: list[str]) -> float:
    """Returns the peak memory in GB of a run in a new process."""
    with tempfile.TemporaryDirectory() as out:
        settings = [part for text in ("federation.rounds=1", "federation.local_steps=1", *overrides)
                    for part in ("--set", text)]
        command = [sys.executable, "-c", RUN, ",".join(without), "run", str(ROOT / "configs" / "quickstart.yaml"),
                   "--out", f"{out}/run", "--progress", "quiet", *settings]
        environment = os.environ | {"PILOT_JAX_CACHE": cache, "JAX_ENABLE_COMPILATION_CACHE": "false"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        return json.loads(Path(out, "run", "summary.json").read_text(encoding="utf-8"))["peak_memory_bytes"] / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="config key to set, KEY=VALUE")
    args = parser.parse_args()
    peaks: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.repetitions):
        for way, without in WAYS.items():
            with tempfile.TemporaryDirectory() as cache:
                for when in ("cold", "second run"):
                    peaks.setdefault((way, when), []).append(peak(without, cache, args.overrides))
    for (way, when), seen in peaks.items():
        print(f"{way:<17} {when:<11} {statistics.median(seen):.2f} GB  ({', '.join(f'{x:.2f}' for x in seen)})")


if __name__ == "__main__":
    main()
