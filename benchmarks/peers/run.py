"""Compares whole jobs of this package and of other simulators on the same small federation.

    python benchmarks/peers/run.py [--clients 9 36] [--repetitions 3] [--no-trial] [--json FILE]     (make bench-peers)

The work (`work.py`): LoRA of 94,208 parameters on a random LLaVA, 32 samples for each client, eight AdamW steps of four
samples in each of three rounds, FedAvg. Each job is a new process, timed from its start to its end; none evaluates.
Systems alternate, and medians are printed. "cold": nothing is compiled beforehand; "again": the next job with the same
cache. Every peer is first tried once with each of its settings for two cores, and goes on with the fastest.

No time is printed unless all systems have done the same: the norms of the last LoRA and of its change in training, and
the mean losses of the first and the last round, may differ by 0.1 % from this package's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ENVIRONMENTS = ROOT / "build" / "peers"  # made by `make bench-peers`
COLD, AGAIN = "pilot_jax, cold", "pilot_jax, again"
COMPARED = ("lora_norm", "change_norm", "loss_first_round", "loss_last_round")
MOST_DIFFERENCE = 1e-3  # relative
SETTINGS = ((2, 1), (1, 2), (1, 1))  # (processes that train, torch threads of each)


@dataclasses.dataclass(frozen=True)
class System:
    """A system that can run the work."""

    script: str
    environment: str = ""  # a folder of ENVIRONMENTS; "" is the environment of this script
    option: str = ""  # the script's option for the number of processes; "" if it has one setting
    beside: str = ""  # what else runs, for the table

    @property
    def python(self) -> Path:
        return ENVIRONMENTS / self.environment / "bin" / "python" if self.environment else Path(sys.executable)

    def arguments(self, setting: tuple[int, int]) -> list[str]:
        return [self.option, str(setting[0]), "--threads", str(setting[1])] if self.option else []


SYSTEMS = {
    COLD: System("with_pilot_jax.py"),
    AGAIN: System("with_pilot_jax.py"),
    "torch": System("with_torch.py", "torch", "--processes"),
    "Flower": System("with_flower.py", "flower", "--workers", " + server, Ray"),
    "pfl-research": System("with_pfl.py", "pfl", "--processes"),
}


def run(system: System, setting: tuple[int, int], work: Path, cache: Path) -> dict[str, Any]:
    """Runs a system in a new process; returns what it prints, and its seconds from start to end as `seconds`."""
    environment = os.environ | {"PILOT_JAX_CACHE": str(cache), "PYTHONPATH": "" if system.environment else str(ROOT)}
    command = [str(system.python), str(HERE / system.script), str(work), *system.arguments(setting)]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1]) | {"seconds": seconds}


def make_work(folder: Path, clients: int) -> Path:
    """Writes the work of a number of clients in another process, so that this one stays small."""
    work = folder / f"{clients}-clients"
    subprocess.run([sys.executable, HERE / "work.py", work, "--clients", str(clients)], check=True,
                   env=os.environ | {"PYTHONPATH": str(ROOT)})
    return work


def try_settings(names: list[str], work: Path, folder: Path) -> dict[str, tuple[int, int]]:
    """Returns each system's fastest setting in one job each, and prints the times of all."""
    best = {}
    for name in names:
        if not SYSTEMS[name].option:
            continue
        seconds = {setting: run(SYSTEMS[name], setting, work, folder)["seconds"] for setting in SETTINGS}
        best[name] = min(seconds, key=lambda setting: seconds[setting])
        print(f"{name:<18} " + ", ".join(f"{p} × {t}: {s:.1f} s" for (p, t), s in seconds.items()), flush=True)
    return best


def measure(names: list[str], settings: dict[str, tuple[int, int]], work: Path, folder: Path, repetitions: int,
            ) -> dict[str, list[dict[str, Any]]]:
    """Returns the results of all jobs, by system; the systems alternate."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for repetition in range(repetitions):
        cache = folder / f"cache-{work.name}-{repetition}"
        if AGAIN in names and COLD not in names:
            run(SYSTEMS[COLD], SETTINGS[0], work, cache)
        for name in names:
            results[name].append(run(SYSTEMS[name], settings.get(name, SETTINGS[0]), work, cache))
    return results


def check_same(results: dict[str, list[dict[str, Any]]]) -> None:
    """Prints what the systems have computed, and ends the run if they differ."""
    first, different = next(iter(results.values()))[0], []
    for name, jobs in results.items():
        print(f"{name:<18} " + ", ".join(f"{key} {jobs[-1][key]:.6f}" for key in COMPARED))
        different += [f"{name}: {key} {job[key]}, but {first[key]}" for job in jobs for key in COMPARED
                      if not abs(job[key] - first[key]) <= MOST_DIFFERENCE * abs(first[key])]  # NaN is different too
    if different:
        raise SystemExit("the systems do not do the same work, so their times are not reported:\n"
                         + "\n".join(different))


def print_table(results: dict[str, list[dict[str, Any]]], settings: dict[str, tuple[int, int]]) -> dict[str, float]:
    """Prints the median times; returns those of whole jobs by system."""
    def median(name: str, key: str) -> float:
        return statistics.median(job[key] for job in results[name])

    print(f"{'system':<18} {'processes × threads':<20} {'whole job':>10} {'(from, to)':>16} {'rounds alone':>13}  "
          "pilot_jax is faster: cold, again")
    whole = {name: median(name, "seconds") for name in results}
    for name, seconds in whole.items():
        spread = [job["seconds"] for job in results[name]]
        used = "{} × {}".format(*settings.get(name, (1, 2))) + SYSTEMS[name].beside
        ratios = "" if "pilot_jax" in name else ", ".join(
            f"{seconds / whole[ours]:.2f} ×" for ours in (COLD, AGAIN) if ours in whole)
        print(f"{name:<18} {used:<20} {seconds:8.1f} s ({min(spread):5.1f}, {max(spread):5.1f}) "
              f"{median(name, 'seconds_training'):11.1f} s  {ratios}")
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[9, 36])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--no-trial", action="store_true", help="two processes of one thread for every peer")
    parser.add_argument("--only", nargs="*", choices=SYSTEMS, default=list(SYSTEMS), help="systems to run")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    missing = sorted({SYSTEMS[name].environment for name in args.only if not SYSTEMS[name].python.exists()})
    if missing:
        raise SystemExit(f"{ENVIRONMENTS} lacks {', '.join(missing)}. `make bench-peers` makes them.")
    out: dict[str, Any] = {"cpus": os.cpu_count(), "repetitions": args.repetitions, "clients": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = dict.fromkeys((name for name in args.only if SYSTEMS[name].option), SETTINGS[0])
        for number, clients in enumerate(args.clients):
            print(f"{clients} clients", flush=True)
            work = make_work(folder, clients)
            if number == 0 and not args.no_trial:
                settings = try_settings(args.only, work, folder)
            results = measure(args.only, settings, work, folder, args.repetitions)
            check_same(results)
            whole = print_table(results, settings)
            out["clients"][clients] = {"seconds": whole, "jobs": results, "settings": settings}
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
