"""Measures in one command what this package does on one GPU or TPU core, and writes a JSON and a Markdown table.

    pip install '.[cuda,quant,torch]' && python benchmarks/accelerator.py [--minutes 25] [--json accelerator.json]
    python benchmarks/accelerator.py --resume [--only clients aggregation]
    python benchmarks/accelerator.py --toy

Local steps are those of LLaVA-1.5-7B's shape with random weights, of sequences of 576 image and 128 text tokens, 64 of
them learnt; `--toy` rehearses everything at the shape of the embedded base cut to two layers, on any device. Every part
runs in another process (accelerator_parts.py), so that what runs out of memory, crashes or hangs costs its own number
alone. The files are written after every case. A case that would not fit the time that is left is skipped, and said so;
`--resume` measures what the JSON of an earlier run on the same machine lacks.

"tokens/s" counts all tokens of the trained sequences. "of ceiling" is the speed of the step's matrix products (FLOPs of
its jaxpr, without recomputation, over its time) divided by that of the chain of products that is measured first.
"program GB" is XLA's own count of the compiled program, "peak GB" the allocator's peak in the process so far, "plan GB"
the estimate of `pilot-jax plan`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARTS = Path(__file__).parent / "accelerator_parts.py"
WHAT = {
    "ceiling": "speed of a chain of matrix products in bfloat16 (float32 on CPU), and of a copy: the device's ceilings",
    "claim": "one step of LoRA of rank 64 and the projector (fedavg): 1, 3 and 9 adapters on the same 9 sequences",
    "attention": "one step of Pilot's stage 2 with the package's own attention and with cuDNN's, activations stored, "
                 "recomputed, or recomputed but for the linear layers: what each costs in time and memory",
    "base": "one step with the base in bfloat16, 8 bits and 4 bits: memory saved, time that dequantising costs",
    "flags": "nine adapters as above, with options of XLA, each in a process of its own",
    "torch": "one step of torch and PEFT on the same number of tokens: a Llama of the same shape, without images",
    "clients": "one step of 1 to 16 clients side by side, LoRA of rank 8: how the speed grows with the work at once",
    "adapters": "one step of 64 sequences divided among 1 to 64 adapters of rank 8: what more adapters cost",
    "aggregation": "ATA's distances, by a Gram matrix and by sketches, and mixing, of LoRAs of the rank that is named",
}


def cases(toy: bool) -> list[list[dict]]:
    """Returns groups of cases, most important first; each group has a process of its own."""
    def case(group: str, part: str, **settings) -> dict:
        return {"group": group, "part": part, **settings}

    def step(group: str, clients: int, batch: int, **settings) -> dict:
        return case(group, "step", clients=clients, batch=batch, **settings)

    nine, many = (3, 4) if toy else (9, 64)
    rank = 8 if toy else 64
    claims = [case("ceiling", "ceiling"),
              *(step("claim", n, nine // n, rank=rank) for n in ((3, 1) if toy else (9, 1, 3)))]
    questions = [
        *(step("attention", 1, 2 if toy else 8, strategy="pilot", attention=kernel, remat=remat)
          for remat, kernel in ((False, "own"), (False, "cudnn"), ("selective", "cudnn"), (True, "cudnn"),
                                ("selective", "own"))),
        *(step("base", 1, 2 if toy else 8, base=base) for base in (["bf16"] * (not toy) + ["int8", "nf4"]))]
    flags = [] if toy else [[step("flags", 9, 1, rank=rank, flags="--xla_gpu_enable_dynamic_slice_fusion=true")]]
    beside = [case("torch", "torch_step", batch=nine, rank=rank, remat=remat) for remat in (False, True)]
    rest = [
        *(step("clients", n, batch, rank=8) for n, batch in (
            [(2, 1)] if toy else [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (1, 4), (4, 4), (16, 4)])),
        *(step("adapters", n, many // n, rank=8, remat=True) for n in ((4,) if toy else (1, 8, 64))),
        *(case("aggregation", "aggregation", clients=n, rank=8) for n in ((48,) if toy else (8, 64, 512)))]
    return [claims + questions + rest, beside] if toy else [claims, questions, beside, rest, *flags]


class Record:
    """All results so far, and the two files that show them."""

    def __init__(self, path: Path, groups: list[list[dict]], toy: bool) -> None:
        self.path, self.about = path, {"shape": "toy" if toy else "7b"}
        self.cases = [case for group in groups for case in group]
        self.rows = [case | {"what": WHAT[case["group"]], "status": "not reached"} for case in self.cases]

    def keep(self) -> None:
        """Takes over what the JSON file has measured of the same cases."""
        earlier = json.loads(self.path.read_text(encoding="utf-8"))
        self.about = earlier["about"]
        for i, case in enumerate(self.cases):
            same = [row for row in earlier["rows"] if row["status"] == "measured" and row.items() >= case.items()]
            self.rows[i] = same[0] if same else self.rows[i]

    def put(self, number: int, result: dict) -> None:
        self.rows[number] |= {"status": "measured", **result}
        top = next((row.get("flops_per_second") for row in self.rows if row["part"] == "ceiling"), None)
        for row in self.rows:
            if top and row["part"] == "step" and "flops_per_second" in row:
                row["of_ceiling"] = row["flops_per_second"] / top
        self.write()

    def claims(self) -> list[dict]:
        """Returns the claims that are to be judged, with what was measured, at LLaVA-1.5-7B's shape."""
        by = {row["clients"]: row for row in self.rows if row["group"] == "claim" and "tokens_per_second" in row}
        nine, one = by.get(9, {}), by.get(1, {})
        speed, share = nine.get("tokens_per_second"), nine.get("of_ceiling")
        slower = one["tokens_per_second"] / speed - 1 if speed and one else None
        wanted = (
            ("nine adapters of rank 64 in one batch: at least 17,500 trained tokens/s (on one H100)", speed,
             lambda x: x >= 17_500),
            ("the same: at least 50 % of the measured ceiling", share, lambda x: x >= 0.5),
            ("the same: at most 5 % slower than one adapter on the same tokens", slower, lambda x: x <= 0.05))
        return [{"claim": name, "measured": value, "holds": None if value is None else holds(value)}
                for name, value, holds in wanted]

    def write(self) -> None:
        """Writes both files; a reader never sees half of one."""
        out = {"about": self.about, "claims": self.claims(), "rows": self.rows}
        for path, text in ((self.path, json.dumps(out, indent=1) + "\n"),
                           (self.path.with_suffix(".md"), self.markdown())):
            partial = path.with_name(path.name + ".partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)

    def markdown(self) -> str:
        def number(value, scale: float = 1, form: str = ".1f") -> str:
            return "" if value is None else format(value * scale, form)

        lines = ["# Measured on one device", "", ", ".join(f"{k}: {v}" for k, v in self.about.items()), "",
                 "| claim | measured | holds |", "|---|---:|---|"]
        lines += [f"| {c['claim']} | {number(c['measured'], form='.4g') or 'not measured'} | "
                  f"{ {None: '', True: 'yes', False: 'no'}[c['holds']]} |" for c in self.claims()]
        for group, what in ((g, w) for g, w in WHAT.items() if any(row["group"] == g for row in self.rows)):
            lines += ["", f"**{group}**: {what}.", "", "| case | ms | tokens/s | TFLOP/s | of ceiling | GB/s | "
                      "program GB | peak GB | plan GB | |", "|---|" + "---:|" * 8 + "---|"]
            for row in (r for r in self.rows if r["group"] == group):
                ms = next((row[n] for n in ("seconds_per_step", "distances_s") if n in row), None)
                more = [f"{n[:-2]} {1e3 * row[n]:.1f} ms" for n in ("sketched_s", "mixing_s") if n in row]
                said = [] if row["status"] == "measured" else [row["status"]]
                cells = [described(row), number(ms, 1e3), number(row.get("tokens_per_second"), form=",.0f"),
                         number(row.get("flops_per_second"), 1e-12, ".2f"), number(row.get("of_ceiling"), 1, ".1%"),
                         number(row.get("bytes_per_second"), 1e-9), *(
                             number(row.get(f"{n}_bytes"), 1e-9, ".2f") for n in ("compiled", "peak", "planned")),
                         "; ".join(more + said).replace("|", "/")]
                lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def described(row: dict) -> str:
    """Returns a case's settings in words."""
    words = []
    if row["part"] == "ceiling":
        words = [f"{row.get('dtype', '')} {row.get('size', '')}".strip()]
    elif row["part"] == "aggregation":
        words = [f"{row['clients']} clients, distances"]
    elif row["part"] == "step":
        words = [f"{row['clients']} × {row['batch']} sequences", f"attention {row.get('attention', 'auto')}"]
    else:
        words = [f"1 × {row['batch']} sequences"]
    words += [f"rank {row['rank']}"] if "rank" in row else []
    words += [row[name] for name in ("base", "flags") if name in row]
    return ", ".join(words + {True: ["recomputed"], "selective": ["partly recomputed"]}.get(row.get("remat"), []))


def supervise(command: list[str], numbered: list[tuple[int, dict]], record: Record, deadline: float,
              limit: float) -> None:
    """Runs cases, all with the same `flags`, in processes until each has a result. A process that ends early costs the
    case that it was in; so does one that takes longer than `limit` seconds for a case, or that the deadline stops."""
    flags = [*filter(None, [os.environ.get("XLA_FLAGS"), *(case.get("flags") for _, case in numbered[:1])])]
    environment = os.environ | ({"XLA_FLAGS": " ".join(flags)} if flags else {})
    while numbered:
        with tempfile.TemporaryDirectory() as folder:
            results, current, since, read = Path(folder) / "results", None, time.time(), 0
            results.touch()
            waiting = Path(folder) / "cases"
            waiting.write_text(json.dumps(numbered), encoding="utf-8")
            with waiting.open("rb") as cases:
                process = subprocess.Popen([*command[:2], str(results), str(deadline), *command[2:]], stdin=cases,
                                           env=environment)
            try:
                while True:
                    ended = process.poll() is not None
                    lines = results.read_text(encoding="utf-8").splitlines()
                    for line in map(json.loads, lines[read:]):
                        read, since = read + 1, time.time()
                        if "about" in line:
                            record.about |= line["about"]
                        elif "started" in line:
                            current = line["started"]
                        else:
                            current, done = None, line.pop("case")
                            numbered = [pair for pair in numbered if pair[0] != done]
                            record.put(done, line)
                            row = record.rows[done]
                            print(f"{row['group']}: {described(row)}: {shown(row)}", flush=True)
                    if ended:
                        reason = f"the process ended with code {process.returncode}"
                        break
                    if time.time() > min(since + limit, deadline + 30):
                        reason = f"stopped after {time.time() - since:.0f} s"
                        break
                    time.sleep(0.1)
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
        if not numbered:
            break
        lost = next((pair for pair in numbered if pair[0] == current), numbered[0])
        record.put(lost[0], {"status": f"failed: {reason}"})
        print(f"{lost[1]['group']}: {described(lost[1])}: {reason}", flush=True)
        numbered = [pair for pair in numbered if pair[0] != lost[0]]


def shown(row: dict) -> str:
    if "tokens_per_second" in row:
        share = f", {row['of_ceiling']:.1%} of the ceiling" if "of_ceiling" in row else ""
        return f"{row['tokens_per_second']:,.0f} tokens/s{share}"
    if "distances_s" in row:
        return f"{1e3 * row['distances_s']:.1f} ms"
    return f"{row['flops_per_second'] / 1e12:.2f} TFLOP/s" if "flops_per_second" in row else row["status"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=25, help="time after which no further case is begun")
    parser.add_argument("--toy", action="store_true", help="a toy shape on any device")
    parser.add_argument("--only", nargs="+", choices=list(WHAT), help="measure these tables alone")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a case is given up")
    parser.add_argument("--resume", action="store_true", help="keep what the JSON file has, and measure the rest")
    parser.add_argument("--json", type=Path, default=Path("accelerator.json"))
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # JAX takes three quarters by itself
    if args.toy:  # compiling is most of a rehearsal
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    deadline, groups = time.time() + 60 * args.minutes, cases(args.toy)
    record, first = Record(args.json, groups, args.toy), 0
    if args.resume and args.json.exists():
        record.keep()
    record.write()
    for group in groups:
        numbered = [(number, case) for number, case in enumerate(group, first)
                    if record.rows[number]["status"] != "measured" and case["group"] in (args.only or WHAT)]
        first += len(group)
        if time.time() >= deadline:
            for number, _ in numbered:
                record.put(number, {"status": "skipped: no time was left"})
            continue
        command = [sys.executable, str(PARTS), *(["--toy"] if args.toy else [])]
        supervise(command, numbered, record, deadline, args.limit)
    print(f"\n{record.markdown()}\nWritten: {args.json}, {args.json.with_suffix('.md')}")


if __name__ == "__main__":
    main()
