"""Estimates the mean of paired differences, with its error over seeds, over clients or over both; and Holm's p values.

`benchmarks/intervals.py` measures how often the intervals contain the truth. Differences are float64 [S, K]: of S seeds
and of the same K clients in each seed. In seed s and client k they are modelled as μ + a_s + b_k + e_sk.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Estimate:
    """An estimated mean difference, its standard error (above 0), and the degrees of freedom of Student's t."""

    mean: float
    error: float
    freedom: float

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Returns the two-sided confidence interval."""
        half = float(stats.t.ppf((1 + level) / 2, self.freedom)) * self.error
        return self.mean - half, self.mean + half

    def p(self) -> float:
        """Returns the two-sided p value of "the mean is 0"."""
        return 2 * min(self.p_below(0.0), self.p_above(0.0))

    def p_below(self, bound: float) -> float:
        """Returns the one-sided p value of "the mean is at most `bound`": small if it is clearly above."""
        return float(stats.t.sf((self.mean - bound) / self.error, self.freedom))

    def p_above(self, bound: float) -> float:
        """Returns the one-sided p value of "the mean is at least `bound`": small if it is clearly below."""
        return float(stats.t.cdf((self.mean - bound) / self.error, self.freedom))

    def p_equivalent(self, margin: float) -> float:
        """Returns the p value of two one-sided tests (TOST, Schuirmann 1987): small if |mean| is clearly below
        `margin`."""
        return max(self.p_below(-margin), self.p_above(margin))


NO_SPREAD = 1e-12  # a standard error of scores below this is rounding


def mean_of(values: np.ndarray) -> Estimate | None:
    """Returns the mean of independent values, float [n], with Student's error.

    Of the means of S seeds, it is the estimate for further seeds and the same clients. Of the K clients of a single
    seed, it is the estimate for further clients in the same seed.

    None for a single value. None for equal values too: scores are counts of answers, so that two seeds may agree by
    chance, which says nothing of the error.
    """
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
    return Estimate(float(values.mean()), error, len(values) - 1) if error > NO_SPREAD else None


def mean_over_both(differences: np.ndarray) -> Estimate | None:
    """Returns the mean of differences [S, K] with its error for further seeds and further clients.

    Both a_s and b_k are random. The variance of the mean is (M_a + M_b − M_e) / (S·K), with the mean squares of seeds,
    of clients and of the rest, and at least M_e / (S·K), its expectation without effects of seeds and clients. Its
    degrees of freedom are Satterthwaite's (1946), at least those of the smaller factor. None if S or K is 1, or if
    all differences are equal.
    """
    seeds, clients = differences.shape
    if min(seeds, clients) < 2:
        return None
    mean = differences.mean()
    by_seed, by_client = differences.mean(1) - mean, differences.mean(0) - mean
    rest = differences - mean - by_seed[:, None] - by_client
    of_seeds = clients * (by_seed**2).sum() / (seeds - 1)
    of_clients = seeds * (by_client**2).sum() / (clients - 1)
    of_rest = (rest**2).sum() / ((seeds - 1) * (clients - 1))
    variance = max(of_seeds + of_clients - of_rest, of_rest)
    parts = (of_seeds**2 / (seeds - 1) + of_clients**2 / (clients - 1)
             + of_rest**2 / ((seeds - 1) * (clients - 1)))
    error = math.sqrt(variance / (seeds * clients))
    if error <= NO_SPREAD:
        return None
    return Estimate(float(mean), error,
                    float(np.clip(variance**2 / parts, min(seeds, clients) - 1, seeds * clients - 1)))


def holm(p: Sequence[float]) -> list[float]:
    """Returns the p values of n hypotheses, adjusted by Holm (1979).

    Those that are at most α can be rejected together: an error among them then has at most the probability α.
    """
    order = sorted(range(len(p)), key=lambda i: p[i])
    out, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = out[i] = max(largest, min(1.0, (len(p) - rank) * p[i]))
    return out
