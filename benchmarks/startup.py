"""Measures the seconds from the start of Python to the first training step, with an empty and a warm compilation cache.

    python benchmarks/startup.py [--json FILE]

Every line is measured in a new process: `import pilot_jax`, `pilot-jax --help`, and the quickstart up to the end of its
first chunk of clients with one step each, divided into imports, data and features, and the chunk with compilation.
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

FIRST_STEP = """
import sys, time
began = time.perf_counter()
import pilot_jax
from pilot_jax.config import SystemConfig, load_config
from pilot_jax.parallel.devices import split_cpu
from pilot_jax.runs.events import CompileClock
split_cpu(SystemConfig())
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
from pilot_jax.errors import Interrupted
from pilot_jax.federation.executor import Work
from pilot_jax.federation.observer import RunObserver
from pilot_jax.runs import prepare
imported = time.perf_counter()
clock = CompileClock()
setup = prepare.prepare(load_config(sys.argv[1], ["federation.local_steps=1", "federation.rounds=1"]))
prepared = time.perf_counter()
class AfterOneChunk(RunObserver):
    def stop_requested(self):
        return 1
fed = setup.federation
everyone = dict.fromkeys(range(len(fed.clients)), prepare.initial_adapters(fed))
try:
    setup.executor.train([Work(fed, everyone, 1, "stage1", "stage1")], AfterOneChunk())
except Interrupted:
    pass
end = time.perf_counter()
print(imported - began, prepared - imported, end - prepared, clock.seconds)
"""


def timed(*command: str) -> tuple[float, str]:
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return time.perf_counter() - began, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    python, out = sys.executable, {}
    for name, command in {"import pilot_jax": (python, "-c", "import pilot_jax"),
                          "pilot-jax --help": (python, "-m", "pilot_jax", "--help")}.items():
        timed(*command)  # brings the files into the disk cache
        out[name] = min(timed(*command)[0] for _ in range(3))
        print(f"{name:<34} {out[name]:6.1f} s")
    with tempfile.TemporaryDirectory() as cache:
        for name in ("first step, empty cache", "first step, warm cache"):
            seconds, printed = timed(python, "-c", FIRST_STEP, str(ROOT / "configs" / "quickstart.yaml"), cache)
            imports, data, step, compiling = (float(x) for x in printed.split()[-4:])
            out[name] = {"total": seconds, "import": imports, "data": data, "step": step, "compiling": compiling}
            print(f"{name:<34} {seconds:6.1f} s: import {imports:.1f}, data and features {data:.1f}, first chunk "
                  f"{step:.1f}; XLA {compiling:.1f} of it")
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
