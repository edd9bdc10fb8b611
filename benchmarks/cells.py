"""Prints several comparisons side by side, and whether a strategy is anywhere below another, with Holm over them.

usage: python benchmarks/cells.py NAME=RESULTS … [--of split_half] [--against local] [--margin 0.02]
                                   [--also NAME=MEAN,LOW,HIGH,SEEDS …]

RESULTS is the `results.json` in the folder of a `pilot-jax compare`. --also adds a difference of which only the mean
and the two-sided 95 % interval are known. First the scores, mean over seeds ± standard
error, also of fine-tuned models. Then the difference of the two strategies in each comparison, its two-sided 95 %
interval (Student's t over seeds), the lower end of the one-sided one, and p values by Holm over the comparisons: of
"not above" and of "below by the margin".
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from scipy import stats

from pilot_jax.compare.differences import mean_scores
from pilot_jax.compare.intervals import Estimate, holm, mean_of
from pilot_jax.compare.statistics import standard_error


def cell(row: dict, key: str) -> str:
    """Returns a mean over seeds and its standard error; – without such a score."""
    if any(seed.get(key) is None for seed in row["seeds"]):
        return "–"
    values = mean_scores(row, key)
    error = standard_error(values)
    return f"{values.mean():.3f}" + ("" if error is None else f" ± {error:.3f}")


def told(numbers: str) -> Estimate:
    """Returns the estimate with the mean and the 95 % interval that are given, of so many seeds."""
    mean, low, high, seeds = map(float, numbers.split(","))
    return Estimate(mean, (high - low) / 2 / float(stats.t.ppf(0.975, seeds - 1)), seeds - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparisons", nargs="+", metavar="NAME=RESULTS")
    parser.add_argument("--of", default="split_half")
    parser.add_argument("--against", default="local")
    parser.add_argument("--margin", type=float, default=0.02)
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=MEAN,LOW,HIGH,SEEDS")
    args = parser.parse_args()
    found = {name: json.loads(Path(file).read_text(encoding="utf-8"))
             for name, file in (one.split("=", 1) for one in args.comparisons)}
    strategies = list(dict.fromkeys(name for results in found.values() for name in results["rows"]))
    print(f"| | base | {' | '.join(f'{s} | fine-tuned' for s in strategies)} |\n|---|---:|"
          + "---:|" * 2 * len(strategies))
    for name, results in found.items():
        rows = [results["rows"].get(strategy, {"seeds": [{}]}) for strategy in strategies]
        print(f"| {name} | {results['base']['score']:.3f} | "
              + " | ".join(f"{cell(row, 'score_mean')} | {cell(row, 'score_finetuned')}" for row in rows) + " |")
    rows_of = {name: results["rows"] for name, results in found.items()}
    estimates = {name: mean_of(mean_scores(rows[args.of]) - mean_scores(rows[args.against]))
                 for name, rows in rows_of.items() if {args.of, args.against} <= set(rows)}
    known = {name: estimate for name, estimate in estimates.items() if estimate is not None}
    known |= {name: told(numbers) for name, numbers in (one.split("=", 1) for one in args.also)}
    above, below = ([*holm([one.p_below(bound) for one in known.values()])] for bound in (0.0, -args.margin))
    print(f"\n| | {args.of} − {args.against} | one-sided lower end | p, not above | p, below by {args.margin:g} |\n"
          "|---|---:|---:|---:|---:|")
    for (name, one), p, q in zip(known.items(), above, below, strict=True):
        low, high = one.interval()
        one_sided = one.interval(0.9)[0]
        print(f"| {name} | {one.mean:+.3f} [{low:+.3f}, {high:+.3f}] | {one_sided:+.3f} | {p:.3f} | {q:.3f} |")


if __name__ == "__main__":
    main()
