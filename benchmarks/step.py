"""Shows where one client's training step spends its time, on one device and one core, from XLA's own trace.

    taskset -c 0 python benchmarks/step.py [--stage stage1] [--client caption_0] [--top 30]

Prints the milliseconds per step in four runs of ten steps. Then it prints the time of each kind and shape of operation,
with the speed of matrix products. Operations that run at the same time count fully, so that the sum is a little above
the time of the step.
"""

from __future__ import annotations

import argparse
import collections
import glob
import gzip
import json
import math
import os
import re
import tempfile
import time
from pathlib import Path

STEPS = 10
SHAPE = r"([a-z0-9]+\[[\d,]*\])"


def dims(shape: str) -> list[int]:
    return [int(n) for n in shape[shape.index("[") + 1:-1].split(",") if n]


def instructions(text: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Returns (line of each instruction, lines of each computation) of an HLO module."""
    lines, bodies, body = {}, {}, []
    for line in text.splitlines():
        if head := re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{", line):
            body = bodies.setdefault(head.group(1), [])
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
            lines[found.group(1)] = found.group(2)
            body.append(found.group(2))
    return lines, bodies


def describe(line: str, lines: dict[str, str], bodies: dict[str, list[str]]) -> tuple[str, int]:
    """Returns (kind and shapes, FLOPs of its matrix products) of an instruction."""
    def shape_of(name: str) -> str:
        found = re.match(rf"\(?{SHAPE}", lines.get(name, ""))
        return found.group(1) if found else "?"

    called = re.search(r"calls=%?([\w.\-]+)", line)
    products, flops = [], 0
    for inner in bodies.get(called.group(1), [line]) if called else [line]:
        found = re.match(rf"{SHAPE}\S* dot\(%?([\w.\-]+), %?([\w.\-]+)\).*lhs_contracting_dims=\{{([\d,]*)\}}", inner)
        if found:
            out, left, right, axes = found.groups()
            left = shape_of(left)
            products.append(f"{left} x {shape_of(right)}")
            flops += 2 * math.prod(dims(out)) * math.prod(dims(left)[int(a)] for a in axes.split(",") if left != "?")
    if products:
        return "product " + " + ".join(products), flops
    kind = re.match(rf"\(?{SHAPE}.*?\)?\S* ([\w\-]+)\(", line)
    return f"{kind.group(2) if kind else 'other'} -> {kind.group(1) if kind else '?'}", 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=("stage1", "stage2"), default="stage1")
    parser.add_argument("--client", default="caption_0")
    parser.add_argument("--top", type=int, default=30)
    args = parser.parse_args()
    dump = tempfile.mkdtemp()
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
        f" --xla_cpu_multi_thread_eigen=false --xla_dump_to={dump} --xla_dump_hlo_as_text"
        " --xla_dump_hlo_module_re=.*local_update.*")
    import jax

    from pilot_jax.config import load_config
    from pilot_jax.runs import prepare
    from pilot_jax.testing.phases import train_phase

    config = load_config(Path(__file__).parent.parent / "configs" / "quickstart.yaml", [
        f"federation.local_steps={STEPS}", "data.digits.train=96", "data.digits.test=1", "data.digits.validation=1"])
    setup = prepare.prepare(config)
    fed = setup.federation
    who = {[c.name for c in fed.clients].index(args.client): prepare.initial_adapters(fed)}

    def phase() -> float:
        began = time.perf_counter()
        train_phase(fed, who, 1, args.stage, args.stage, setup.executor)
        return time.perf_counter() - began

    phase()
    print("ms a step:", " ".join(f"{1e3 * phase() / STEPS:.1f}" for _ in range(4)))
    folder = tempfile.mkdtemp()
    with jax.profiler.trace(folder):
        phase()
    trace = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)[0]
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    spent: collections.Counter = collections.Counter()
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            spent[event["args"]["hlo_op"]] += event["dur"] / 1e3 / STEPS  # from µs of all steps to ms per step
    module = max(glob.glob(f"{dump}/*after_optimizations.txt"), key=os.path.getsize)
    lines, bodies = instructions(Path(module).read_text(encoding="utf-8"))
    kinds: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0, 0.0])
    for name, milliseconds in spent.items():
        if name in lines and not name.startswith(("while", "call")):
            kind, flops = describe(lines[name], lines, bodies)
            for i, value in enumerate((milliseconds, 1, flops)):
                kinds[kind][i] += value
    total = {group: sum(v[0] for k, v in kinds.items() if k.startswith("product") == group) for group in (True, False)}
    gflops = sum(v[2] for v in kinds.values()) / 1e9
    print(f"matrix products {total[True]:.1f} ms ({gflops:.2f} GFLOP), everything else {total[False]:.1f} ms")
    for kind, (milliseconds, count, flops) in sorted(kinds.items(), key=lambda item: -item[1][0])[:args.top]:
        speed = f"{flops / milliseconds / 1e6:5.0f} GFLOP/s" if flops else " " * 13
        print(f"{milliseconds:7.3f} ms {count:4d} {speed}  {kind}")


if __name__ == "__main__":
    main()
