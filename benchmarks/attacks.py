"""Measures what attackers among 9 clients do to the honest ones, with and without bounds (`federation/defence.py`).

    python benchmarks/attacks.py RESULTS.jsonl [--settings pilot share …] [--defences none bounds …] [--seeds 3]
    python benchmarks/attacks.py RESULTS.jsonl --table
    python benchmarks/attacks.py RESULTS.jsonl --time 7

Every run appends a line to RESULTS.jsonl, and a run that has one is not repeated, so that the command can be stopped at
any time (`--minutes`). `--table` prints means and standard errors over seeds; `--time` trains an honest federation in
turn under each of the defences and prints medians. The clients are 3 tasks × 3 digit clients
of scenario A with equal looks and wordings (`data.digits.heterogeneity: 0`), where sharing pays; `--config` names
others. The last client of a task is the attacker, of 1, 2 or 3 tasks, and the victim of sybils is the first client of
another; scores are those of the clients that never attack. No GPU is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from pilot_jax.compare.together import run_all
from pilot_jax.config import load_config
from pilot_jax.data.arrays import ClientData
from pilot_jax.evaluation.scores import final_scores
from pilot_jax.federation.observer import RunObserver
from pilot_jax.runs.prepare import Setup, configure, load_samples, prepare, with_overrides, with_strategy
from pilot_jax.testing.attacks import Attack, AttackedExecutor, scaled, sybils, with_flipped_answers

CONFIG = Path(__file__).parent.parent / "configs" / "benchmark" / "digits.yaml"
DIGITS = ["data.digits.scenario=a", "data.digits.heterogeneity=0", "data.digits.look=own", "data.digits.wording=own",
          "data.digits.train=24", "data.digits.validation=2", "data.digits.test=60", "federation.rounds=3",
          "federation.local_steps=5", "federation.finetune_steps=null"]
SETTINGS = {
    "pilot": [],
    "share": ["strategy.ata.weighting=share_of_sizes"],
    "pilot_split_half": ["strategy.name=pilot_split_half"],
    "split_half": ["strategy.name=split_half"],
    "fedavg": ["strategy.name=fedavg"],
    "local": ["strategy.name=local"],
}
BOUNDS = ["strategy.clip=1", "strategy.ata.cap_one=0.2", "strategy.ata.cap_all=0.5"]
DEFENCES = {"none": [], "clip": BOUNDS[:1], "caps": BOUNDS[1:], "bounds": BOUNDS,
            "foolsgold": [*BOUNDS, "strategy.ata.foolsgold=true"]}
ATTACKS = ("none", "flip", "scaled", "labels", "sybils", "just_under", "differ")
POISONED = ("labels", "sybils", "just_under", "differ")  # attackers' answers are permuted


def attackers_of(tasks: dict[str, str]) -> list[str]:
    """Returns all that can be attackers, from the task of each client: the last client of each of the last 3 tasks."""
    last = {task: name for name, task in sorted(tasks.items())}
    return [last[task] for task in sorted(last, reverse=True)][:3]


class Watch(RunObserver):
    """Collects the attackers' weights in the mixtures of others, and who was refused."""

    def __init__(self, attackers: tuple[str, ...]) -> None:
        self.attackers, self.refused = attackers, list[str]()
        self.weights: list[dict[str, float]] = []  # by phase: of all attackers together, by honest client

    def phase_ended(self, state: Any, record: Any, mixing: Any, trained: Any) -> None:
        self.refused += record["quarantined"]
        if mixing is not None:
            names = list(mixing["client_ids"])
            bad = [i for i, n in enumerate(names) if n in self.attackers]
            self.weights.append({n: float(np.sum(mixing["weights"][i, bad])) for i, n in enumerate(names)
                                 if n not in self.attackers})


def attack_of(name: str, victim: int) -> Attack | None:
    """Returns what attackers do to their uploads; None: they have wrong data only, or there are none."""
    return {"flip": scaled(-1), "scaled": scaled(90), "sybils": sybils(victim, 0.5), "just_under": sybils(victim),
            "differ": sybils(victim, differ=True)}.get(name)


def setups_of(seed: int, config: Path, changes: list[str], poison: bool) -> tuple[Setup, tuple[ClientData, ...]]:
    """Returns a setup in which everybody is honest, and its clients where, with `poison`, attackers have wrong answers.
    """
    loaded = load_config(config, [*changes, f"system.seed={11 + seed}", f"data.digits.seed={11 + seed}",
                                  f"data.emoji.seed={11 + seed}"])
    configure(loaded)
    setup, samples = prepare(loaded), load_samples(loaded)
    flipped = with_flipped_answers(samples, attackers_of({s.client: s.task for s in samples}), seed)
    return setup, prepare(loaded, samples=flipped).evaluation.clients if poison else setup.evaluation.clients


def bounds_of(setting: str, defence: str) -> list[str]:
    """Returns the changes of the config that a defence is under a setting: what its strategy has of the bounds."""
    if setting == "split_half":
        return [change.replace(".ata", "") for change in DEFENCES[defence]]
    return [change for change in DEFENCES[defence] if ".ata" not in change or setting not in ("fedavg", "local")]


def attacked(setup: Setup, poisoned: tuple[ClientData, ...], cell: dict[str, Any]) -> dict[str, Any]:
    """Returns the line of one run."""
    names = [client.name for client in setup.evaluation.clients]
    possible = attackers_of({client.name: client.task for client in setup.evaluation.clients})
    attackers, victim = tuple(possible[:cell["attackers"]]), names[0]
    bad = tuple(names.index(a) for a in attackers)
    clients = tuple(poisoned[k] if k in bad and cell["attack"] in POISONED else client
                    for k, client in enumerate(setup.evaluation.clients))
    changes = [*SETTINGS[cell["setting"]], *bounds_of(cell["setting"], cell["defence"])]
    setup = dataclasses.replace(setup, evaluation=dataclasses.replace(setup.evaluation, clients=clients))
    setup = with_overrides(with_strategy(setup, setup.federation.strategy), changes)
    setup = dataclasses.replace(setup, executor=AttackedExecutor(
        setup.executor.client_chunk, setup.executor.steps_at_once, bad, attack_of(cell["attack"], 0)))
    watch, began = Watch(attackers), time.perf_counter()
    states = run_all([setup], [watch])
    scores, = final_scores([setup.evaluation], states, [None])
    honest = [n for n in names if n not in possible]
    weights = [np.mean(list(phase.values())) for phase in watch.weights]
    return {**cell, "score": float(np.mean([scores.own[n] for n in honest])), "victim": scores.own[victim],
            "by_client": scores.own, "weight": float(np.mean(weights)),
            "victim_weight": float(np.mean([phase.get(victim, 0) for phase in watch.weights])),
            "refused_honest": sum(n not in attackers for n in watch.refused),
            "refused_attackers": sum(n in attackers for n in watch.refused),
            "seconds": round(time.perf_counter() - began, 2)}


def table(lines: list[dict[str, Any]], score: str, weight: str, attacks: tuple[str, ...]) -> None:
    """Prints, for each defence, mean and standard error over seeds of a score, and the mean of attackers' weights."""
    defences = [d for d in DEFENCES if any(x["defence"] == d for x in lines)]
    print("| setting | attack | attackers | " + " | ".join([f"{score}: {d}" for d in defences] + [
        f"weight: {d}" for d in defences]) + " | refused honest | refused attackers | seeds |\n|---|---|"
        + "---:|" * (2 * len(defences) + 4))
    kinds = {(x["setting"], x["attack"], x["attackers"]) for x in lines if x["attack"] in attacks}
    order = [list(SETTINGS).index, list(ATTACKS).index, int]
    for setting, attack, attackers in sorted(kinds, key=lambda kind: [f(v) for f, v in zip(order, kind, strict=True)]):
        own = [x for x in lines if (x["setting"], x["attack"], x["attackers"]) == (setting, attack, attackers)]
        scores, weights = [], []
        for defence in defences:
            values = np.asarray([x[score] for x in own if x["defence"] == defence])
            error = f" ± {np.std(values, ddof=1) / np.sqrt(len(values)):.3f}" if len(values) > 1 else ""
            scores.append(f"{np.mean(values):.3f}{error}" if len(values) else "")
            weights.append(f"{np.mean([x[weight] for x in own if x['defence'] == defence]):.3f}" if len(values) else "")
        print(f"| {setting} | {attack} | {attackers} | {' | '.join(scores + weights)} | "
              f"{sum(x['refused_honest'] for x in own)} | {sum(x['refused_attackers'] for x in own)} | "
              f"{len({x['seed'] for x in own})} |")


def timed(setup: Setup, settings: list[str], defences: list[str], repetitions: int) -> None:
    """Prints the median seconds of an honest federation's training by setting and defence, in alternating runs."""
    for setting in settings:
        setups = {d: with_overrides(setup, [*SETTINGS[setting], *bounds_of(setting, d)]) for d in defences}
        seconds: dict[str, list[float]] = {d: [] for d in defences}
        for repetition, defence in itertools.product(range(repetitions + 1), defences):  # the first compiles
            began = time.perf_counter()
            run_all([setups[defence]])
            seconds[defence] += [time.perf_counter() - began] if repetition else []
        first = np.median(seconds[defences[0]])
        print(setting, ", ".join(f"{d} {np.median(s):.2f} s ({np.median(s) / first - 1:+.1%}; {min(s):.2f} to "
                                 f"{max(s):.2f})" for d, s in seconds.items()), flush=True)


def cells(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns what is to be run, seed by seed."""
    out = []
    for seed, setting, attack, count, defence in itertools.product(
            range(args.first_seed, args.first_seed + args.seeds), args.settings, args.attacks, args.attackers,
            args.defences):
        fits = count == 0 if attack == "none" else count > (1 if attack == "differ" else 0)
        if fits and (setting, defence) != ("split_half", "foolsgold"):  # which does not have it
            out.append({"seed": seed, "setting": setting, "attack": attack, "attackers": count, "defence": defence})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--settings", nargs="+", default=["pilot", "share", "pilot_split_half", "split_half"],
                        choices=SETTINGS)
    parser.add_argument("--defences", nargs="+", default=["none", "bounds"], choices=DEFENCES)
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=ATTACKS)
    parser.add_argument("--attackers", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="no run is begun after that")
    parser.add_argument("--set", nargs="*", default=[], help="changes of the config, as section.key=value")
    parser.add_argument("--time", type=int, default=0, help="number of timed runs of each setting and defence")
    parser.add_argument("--table", action="store_true", help="print the table of RESULTS.jsonl and run nothing")
    args = parser.parse_args()
    lines = [json.loads(x) for x in args.results.read_text().splitlines()] if args.results.exists() else []
    if args.table:
        table(lines, "score", "weight", ATTACKS)
        print()
        table(lines, "victim", "victim_weight", ("none", "sybils", "just_under", "differ"))
        return
    changes = [*(DIGITS if args.config == CONFIG else []), *args.set]
    if args.time:
        timed(setups_of(args.first_seed, args.config, changes, False)[0], args.settings, args.defences, args.time)
        return
    done = [{k: x[k] for k in ("seed", "setting", "attack", "attackers", "defence")} for x in lines]
    end, prepared = time.monotonic() + 60 * args.minutes, dict[int, Any]()
    for cell in cells(args):
        if cell in done or time.monotonic() > end:
            continue
        if cell["seed"] not in prepared:
            poison = any(attack in POISONED for attack in args.attacks)
            prepared = {cell["seed"]: setups_of(cell["seed"], args.config, changes, poison)}
        line = attacked(*prepared[cell["seed"]], cell)
        with args.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print({k: v for k, v in line.items() if k != "by_client"}, flush=True)


if __name__ == "__main__":
    main()
