"""Prints several comparisons side by side, and whether a strategy is anywhere below another, with Holm over them.

usage: python benchmarks/cells.py NAME=RESULTS … [--of split_half] [--against local,fedavg_ft] [--margin 0.02]
                                   [--clients A,B] [--models own] [--also NAME=MEAN,LOW,HIGH,SEEDS …]
                                   [--figure FILE.png]

RESULTS is the `results.json` in the folder of a `pilot-jax compare`, or several of the same data and seeds, joined by
"+": of a strategy that is in two, the last counts. --of and --against may name several, separated by commas: each of
the former is compared with each of the latter. --clients restricts all scores to some clients, and `--models
fine-tuned` makes the differences those of fine-tuned models. --also adds a difference of which only the mean and the
two-sided 95 % interval are known. First the scores, mean over seeds ± standard error, also of fine-tuned models. Then
the difference of the two strategies in each comparison, its two-sided 95 % interval (Student's t over seeds), the lower
end of the one-sided one, and p values by Holm over all rows: of "not above", of "below by the margin" and of "above by
the margin". --figure draws every strategy's difference to the first of --against, with its interval.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from pilot_jax.compare.figures import png, pyplot
from pilot_jax.compare.intervals import Estimate, holm, mean_of
from pilot_jax.compare.statistics import standard_error

Comparison = dict[str, Any]  # a results.json
Difference = Estimate | float  # without an error if all seeds have the same difference, or there is one seed
KINDS = {"own": ("score_mean", "score_by_client"), "fine-tuned": ("score_finetuned", "score_finetuned_by_client")}


def read(files: str) -> Comparison:
    """Returns the comparison in a file, or of files joined by "+" the first with the rows of all.

    Raises:
        SystemExit: they are not of the same model, data, federation, split and seeds.
    """
    first, *others = (json.loads(Path(file).read_text(encoding="utf-8")) for file in files.split("+"))
    for other in others:
        if (other["split"], other["seeds"]) != (first["split"], first["seeds"]):
            sys.exit(f"{files}: not of the same split and seeds.")
        if key := next((key for section in ("model", "data", "federation") for key in unlike(
                first["config"][section], other["config"][section], section)), None):
            sys.exit(f"{files}: not of the same {key}.")
        first["rows"] |= other["rows"]
    return first


def unlike(one: Mapping[str, Any], other: Mapping[str, Any], at: str) -> Iterator[str]:
    """Yields the keys whose values differ, without those that one config lacks (a key may be newer than a file), and
    without federation.finetune_steps, which is fedavg_ft's own setting."""
    for key in (key for key in one if key in other and key != "finetune_steps"):
        if isinstance(one[key], dict) and isinstance(other[key], dict) and key != "joins":  # its keys are clients
            yield from unlike(one[key], other[key], f"{at}.{key}")
        elif one[key] != other[key]:
            yield f"{at}.{key}"


def scores(row: Mapping[str, Any], kind: str, clients: tuple[str, ...]) -> np.ndarray | None:
    """Returns a strategy's score by seed, the mean over `clients` or, if there are none, over all; None: no score."""
    mean, by_client = KINDS[kind]
    if any(seed.get(mean) is None for seed in row["seeds"]):
        return None
    return np.asarray([np.mean([seed[by_client][c] for c in clients]) if clients else seed[mean]
                       for seed in row["seeds"]])


def cell(values: np.ndarray | None) -> str:
    """Returns a mean over seeds and its standard error; – without such a score."""
    if values is None:
        return "–"
    error = standard_error(values)
    return f"{values.mean():.3f}" + ("" if error is None else f" ± {error:.3f}")


def told(numbers: str) -> Estimate:
    """Returns the estimate with the mean and the 95 % interval that are given, of so many seeds."""
    mean, low, high, seeds = map(float, numbers.split(","))
    return Estimate(mean, (high - low) / 2 / float(stats.t.ppf(0.975, seeds - 1)), seeds - 1)


def differences(found: Mapping[str, Comparison], of: str, against: str, clients: tuple[str, ...],
                models: str = "own") -> dict[str, Difference]:
    """Returns the mean difference of two strategies, paired by seed, in each comparison that has both."""
    out = {}
    for name, results in found.items():
        if {of, against} <= set(results["rows"]):
            one, other = (scores(results["rows"][strategy], models, clients) for strategy in (of, against))
            if one is not None and other is not None:
                out[name] = mean_of(one - other) or float(np.mean(one - other))
    return out


def of_all_pairs(found: Mapping[str, Comparison], args: argparse.Namespace) -> dict[str, Difference]:
    """Returns the differences of each of --of to each of --against, by comparison and, if there are several, pair."""
    pairs = [(of, against) for of in args.of for against in args.against if of != against]
    out = {}
    for of, against in pairs:
        for name, one in differences(found, of, against, args.clients, args.models).items():
            out[name if len(pairs) == 1 else f"{name}: {of} − {against}"] = one
    return out


def check_names(found: Mapping[str, Comparison], args: argparse.Namespace) -> None:
    """Ends the program if a strategy is in no comparison, or a client not in each."""
    strategies = list(dict.fromkeys(name for results in found.values() for name in results["rows"]))
    for key in ("of", "against"):
        if unknown := [name for name in getattr(args, key) if name not in strategies]:
            sys.exit(f"--{key}: {', '.join(unknown)} is in no comparison. Its strategies: {', '.join(strategies)}.")
    for name, results in found.items() if args.clients else ():
        here = next(iter(results["rows"].values()))["seeds"][0]["score_by_client"]
        if unknown := [client for client in args.clients if client not in here]:
            sys.exit(f"--clients: {', '.join(unknown)} is not in {name}. Its clients: {', '.join(here)}.")


def draw(found: Mapping[str, Comparison], against: str, clients: tuple[str, ...], file: Path) -> None:
    """Draws, for each comparison, the difference of every strategy to `against` with its 95 % interval."""
    strategies = [s for s in dict.fromkeys(name for one in found.values() for name in one["rows"]) if s != against]
    known_of = {strategy: {name: one for name, one in differences(found, strategy, against, clients).items()
                           if isinstance(one, Estimate)} for strategy in strategies}
    at_of, rows = dict[tuple[str, str], int](), 0
    for name in found:  # a row for each difference, and one between comparisons
        for strategy in (s for s in strategies if name in known_of[s]):
            at_of[name, strategy], rows = rows, rows + 1
        rows += 1
    figure, axes = pyplot().subplots(figsize=(7.2, 0.6 + 0.16 * rows), layout="constrained")
    marks = "osD^v<>Ph*"
    for k, (strategy, known) in enumerate(known_of.items()):
        at = [at_of[name, strategy] for name in known]
        middle = [one.mean for one in known.values()]
        reach = [one.interval()[1] - one.mean for one in known.values()]
        axes.errorbar(middle, at, xerr=reach, fmt=marks[k % len(marks)], ms=4, lw=0.9, capsize=1.5, color=f"C{k}",
                      label=strategy)
    axes.axvline(0, color="#1b1f24", lw=0.7)
    axes.set_yticks([np.mean([at for (cell, _), at in at_of.items() if cell == name]) for name in found], list(found))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.15, lw=0.5)
    axes.set_xlabel(f"score minus {against}, with 95 % interval over seeds")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    file.write_bytes(png(figure))


def print_scores(found: Mapping[str, Comparison], clients: tuple[str, ...]) -> None:
    """Prints a row for each comparison: the base, and each strategy's own and fine-tuned score."""
    strategies = list(dict.fromkeys(name for results in found.values() for name in results["rows"]))
    print(f"| | base | {' | '.join(f'{s} | fine-tuned' for s in strategies)} |\n|---|---:|"
          + "---:|" * 2 * len(strategies))
    for name, results in found.items():
        rows = [results["rows"].get(strategy, {"seeds": [{}]}) for strategy in strategies]
        base = "–" if clients or results["base"]["score"] is None else f"{results['base']['score']:.3f}"
        print(f"| {name} | {base} | "
              + " | ".join(cell(scores(row, kind, clients)) for row in rows for kind in KINDS) + " |")


def print_differences(found: Mapping[str, Difference], head: str, margin: float) -> None:
    """Prints a row for each difference: mean, intervals, and p values by Holm over all rows that have an error."""
    known = {name: one for name, one in found.items() if isinstance(one, Estimate)}
    adjusted = [dict(zip(known, holm(p), strict=True)) for p in (
        [one.p_below(0.0) for one in known.values()], [one.p_below(-margin) for one in known.values()],
        [one.p_above(margin) for one in known.values()])]
    print(f"\n| | {head} | one-sided lower end | p, not above | p, below by {margin:g} | p, above by {margin:g} |\n"
          "|---|---:|---:|---:|---:|---:|")
    for name, one in found.items():
        if isinstance(one, Estimate):
            low, high = one.interval()
            cells = [f"{one.mean:+.3f} [{low:+.3f}, {high:+.3f}]", f"{one.interval(0.9)[0]:+.3f}",
                     *(f"{p[name]:.3f}" for p in adjusted)]
        else:
            cells = [f"{one:+.3f}, no error known", "–", "–", "–", "–"]
        print(f"| {name} | {' | '.join(cells)} |")


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparisons", nargs="+", metavar="NAME=RESULTS")
    parser.add_argument("--of", type=_names, default=("split_half",), metavar="STRATEGY,STRATEGY")
    parser.add_argument("--against", type=_names, default=("local",), metavar="STRATEGY,STRATEGY")
    parser.add_argument("--margin", type=float, default=0.02)
    parser.add_argument("--clients", type=_names, default=(), metavar="NAME,NAME")
    parser.add_argument("--models", choices=tuple(KINDS), default="own")
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=MEAN,LOW,HIGH,SEEDS")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    found = {name: read(files) for name, files in (one.split("=", 1) for one in args.comparisons)}
    check_names(found, args)
    print_scores(found, args.clients)
    also = {name: told(numbers) for name, numbers in (one.split("=", 1) for one in args.also)}
    head = f"{args.of[0]} − {args.against[0]}" if len(args.of) == len(args.against) == 1 else "difference"
    print_differences(of_all_pairs(found, args) | also, head, args.margin)
    if args.figure:
        draw(found, args.against[0], args.clients, args.figure)


if __name__ == "__main__":
    main()
