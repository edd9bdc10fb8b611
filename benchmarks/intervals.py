"""Measures how often the 95 % intervals of `pilot-jax compare` contain the truth, beside other ways to compute them.

    python benchmarks/intervals.py [--repetitions 2000] [--mixed 200]

The difference of two variants in seed s and client k is drawn as μ + a_s + b_k + e_sk, with standard deviations as in
docs/results: e 0.07; a 0 to 0.05; b 0 to 0.06 where both variants score alike, and 0.15 to 0.32 where one of them fails
on some tasks. "48 answers": e is that of two scores of 48 right or wrong answers each.

A cell has the percentage of intervals that contain the mean over these clients, and over all clients of which these are
a sample (for both, over all seeds), and the intervals' median width. Right are 95 and 95; below 95 the interval claims
too much. `--mixed N` adds statsmodels' mixed model, by N repetitions (50 ms each). No GPU is needed; a run takes three
minutes.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import numpy as np
from scipy import stats

from pilot_jax.compare.intervals import Estimate, mean_of, mean_over_both

Interval = tuple[float, float]
NOISE, ANSWERS = 0.07, 48
TRUTHS = [(0.0, 0.0, "normal"), (0.02, 0.03, "normal"), (0.05, 0.0, "normal"), (0.0, 0.17, "normal"),
          (0.05, 0.17, "normal"), (0.02, 0.03, "48 answers")]  # deviations of a and b, and what e is


def interval_of(found: Estimate | None) -> Interval:
    return (np.nan, np.nan) if found is None else found.interval()  # without an interval, the truth is not in it


def by_seed(x: np.ndarray) -> Interval:
    """Student's t over the seeds' means; `compare` has it in the table."""
    return interval_of(mean_of(x.mean(1)))


def both(x: np.ndarray) -> Interval:
    """Crossed random effects; `compare` has it as `with_other_clients`."""
    return interval_of(mean_over_both(x))


def by_client(x: np.ndarray) -> Interval:
    """Student's t over the clients' means; `compare` has it in the table of a single seed."""
    return interval_of(mean_of(x.mean(0)))


def cells(x: np.ndarray) -> Interval:
    """Student's t over all seeds and clients as if they were independent."""
    return interval_of(mean_of(x.ravel()))


def bootstrap(x: np.ndarray, samples: int = 400) -> Interval:
    """Percentiles of the mean of resampled seeds, and of resampled clients in each of them."""
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, x.shape[0], (samples, x.shape[0], 1))
    clients = rng.integers(0, x.shape[1], (samples, *x.shape))
    low, high = np.quantile(x[seeds, clients].mean((1, 2)), [0.025, 0.975])
    return float(low), float(high)


def mixed(x: np.ndarray) -> Interval:
    """statsmodels' MixedLM with random intercepts of seeds and clients, by REML, and its interval by the normal
    distribution."""
    import pandas as pd
    from statsmodels.formula.api import mixedlm

    seeds, clients = np.indices(x.shape)
    frame = pd.DataFrame({"d": x.ravel(), "s": seeds.ravel(), "k": clients.ravel(), "one": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fit = mixedlm("d ~ 1", frame, groups="one", vc_formula={"s": "0 + C(s)", "k": "0 + C(k)"}).fit(reml=True)
        except np.linalg.LinAlgError:  # "Singular matrix": it finds no estimate
            return np.nan, np.nan
    half = stats.norm.ppf(0.975) * fit.bse["Intercept"]
    return float(fit.params["Intercept"] - half), float(fit.params["Intercept"] + half)


def draw(rng: np.random.Generator, shape: tuple[int, int], truth: tuple[float, float, str]) -> tuple[np.ndarray, float]:
    """Returns differences [S, K] whose mean over all seeds and clients is 0, and their mean over all seeds and these
    clients."""
    of_seed, of_client, noise = truth
    clients = rng.normal(0, of_client, shape[1])
    exact = rng.normal(0, of_seed, (shape[0], 1)) + clients
    if noise == "normal":
        return exact + rng.normal(0, NOISE, shape), float(clients.mean())
    one, other = np.clip(0.75 + exact / 2, 0, 1), np.clip(0.75 - exact / 2, 0, 1)
    return (rng.binomial(ANSWERS, one) - rng.binomial(ANSWERS, other)) / ANSWERS, float(clients.mean())


def coverage(method: Callable[[np.ndarray], Interval], shape: tuple[int, int], truth: tuple[float, float, str],
             repetitions: int) -> str:
    """Returns the percentages of intervals that contain the two means, and their median width."""
    rng, found = np.random.default_rng(1), []
    for _ in range(repetitions):
        x, of_these = draw(rng, shape, truth)
        low, high = method(x)
        found.append((low <= of_these <= high, low <= 0 <= high, high - low))
    these, every, _ = 100 * np.mean(found, 0)
    return f"{these:.0f} / {every:.0f} ({np.nanmedian([width for *_, width in found]):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--mixed", type=int, default=0, help="repetitions with statsmodels' mixed model")
    args = parser.parse_args()
    methods = {"t over seeds": by_seed, "seeds and clients": both, "t over clients": by_client, "t over all": cells,
               "bootstrap": bootstrap} | ({"mixed model": mixed} if args.mixed else {})
    print("| seeds × clients | deviation of seeds | of clients | rest | " + " | ".join(methods) + " |")
    print("|---|---:|---:|---|" + "---:|" * len(methods))
    for shape in ((1, 9), (2, 9), (3, 9), (3, 12), (5, 9), (5, 12)):
        for truth in TRUTHS:
            cell = [coverage(method, shape, truth, args.mixed if method is mixed else args.repetitions)
                    if shape[0] > 1 or method is by_client else "–" for method in methods.values()]
            print(f"| {shape[0]} × {shape[1]} | {truth[0]:g} | {truth[1]:g} | {truth[2]} | " + " | ".join(cell) + " |",
                  flush=True)


if __name__ == "__main__":
    main()
