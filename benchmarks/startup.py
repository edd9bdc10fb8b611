"""Measures the seconds from the start of Python to the first trained clients, and to the end, of a short quickstart.

    python benchmarks/startup.py [--repetitions 3] [--against CHECKOUT] [--steps 1] [--json FILE]

Each line is measured from outside, in new processes: `import pilot_jax`, `pilot-jax --help`, and `pilot-jax run` on the
quickstart with `--steps` steps a phase and one round: until the first chunk of clients is trained, and until the end.
"cold" has an empty cache folder (`PILOT_JAX_CACHE`), "second run" the one that the cold run has filled.

--against CHECKOUT measures another checkout of the package too, such as a clone of an earlier version in which
`make test` has run, alternating with this one. Its interpreter is CHECKOUT/.venv/bin/python.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def seconds_of(command: list[str], where: Path) -> float:
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=where)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return time.perf_counter() - began


def run(python: str, where: Path, cache: Path, steps: int) -> dict[str, float]:
    """Runs a short quickstart in a new process; returns the seconds to its first chunk and to its end."""
    command = [python, "-m", "pilot_jax", "run", "configs/quickstart.yaml", "--out", tempfile.mkdtemp(dir=cache.parent),
               "--progress", "json", "--set", f"federation.local_steps={steps}", "--set", "federation.rounds=1"]
    # JAX's own cache is off, so that "cold" is cold.
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {
        "PILOT_JAX_CACHE": str(cache), "PILOT_JAX_KEEP": "1", "PYTHONUNBUFFERED": "1"}
    began, first = time.perf_counter(), None
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, cwd=where, env=env) as job:
        assert job.stdout is not None and job.stderr is not None
        for line in job.stdout:
            if first is None and '"chunk"' in line:
                first = time.perf_counter() - began
        error = job.stderr.read()
    if job.returncode or first is None:
        raise SystemExit(f"{where}: {error[-2000:]}")
    return {"first chunk": first, "whole": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    versions = {"this": (sys.executable, ROOT)}
    if args.against:
        versions["against"] = (str(args.against / ".venv" / "bin" / "python"), args.against)
    seen: dict[str, dict[str, list[float]]] = {name: {} for name in versions}
    for _ in range(args.repetitions):
        for name, (python, where) in versions.items():
            def note(what: str, seconds: float, name: str = name) -> None:
                seen[name].setdefault(what, []).append(seconds)

            note("import pilot_jax", seconds_of([python, "-c", "import pilot_jax"], where))
            note("pilot-jax --help", seconds_of([python, "-m", "pilot_jax", "--help"], where))
            with tempfile.TemporaryDirectory() as folder:
                (cache := Path(folder) / "cache").mkdir()
                for when in ("cold", "second run"):
                    for what, seconds in run(python, where, cache, args.steps).items():
                        note(f"{when}: {what}", seconds)
    for what in seen["this"]:
        medians = {name: statistics.median(times[what]) for name, times in seen.items()}
        ratio = f"; {medians['against'] / medians['this']:.2f} times as fast" if args.against else ""
        print(f"{what:<26} " + ", ".join(f"{name} {value:6.2f} s" for name, value in medians.items()) + ratio)
    if args.json:
        args.json.write_text(json.dumps(seen, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
