"""Attacks that tell two data sets apart by noised uploads, which bound from below the ε that was really spent."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.stats import beta

from pilot_jax.config import PrivacyConfig
from pilot_jax.federation.privacy import Noise, multiplier, noised

ENTRIES = 8  # of an upload in `worst_case`


def lower_bound(one: np.ndarray, other: np.ndarray, delta: float, confidence: float = 0.95) -> float:
    """Returns a lower bound on ε, right with probability `confidence` if the trials are independent.

    For a mechanism that is (ε, δ)-private, P[s > t | one] ≤ exp(ε)·P[s > t | other] + δ for each threshold t. The first
    half of the trials chooses t; the second half bounds both probabilities (Clopper and Pearson, 1934).

    Args:
        one, other: the attacker's statistic s with the one and with the other data set, float [n]; larger speaks for
            `one`.
    """
    half = len(one) // 2
    failure = (1 - confidence) / 2

    def bound(a: np.ndarray, b: np.ndarray, threshold: float) -> float:
        hits, alarms = int(np.sum(a > threshold)), int(np.sum(b > threshold))
        low = float(beta.ppf(failure, hits, len(a) - hits + 1)) if hits else 0.0
        high = float(beta.ppf(1 - failure, alarms + 1, len(b) - alarms)) if alarms < len(b) else 1.0
        return math.log((low - delta) / high) if low > delta else 0.0

    thresholds = np.quantile(other[:half], 1 - np.geomspace(4 / half, 0.5, 30))
    best = max(thresholds, key=lambda threshold: bound(one[:half], other[:half], threshold))
    return max(0.0, bound(one[half:], other[half:], best))


def worst_case(privacy: PrivacyConfig, uploads: int, trials: int, rng: Noise,
               release: Callable[..., dict[str, np.ndarray]] = noised) -> float:
    """Returns `lower_bound` for a client whose two data sets move its uploads by opposite vectors of norm ≥ C.

    Args:
        uploads: of the client in the whole run; the attacker adds up all of them.
        release: what makes a noised upload, with the arguments of `privacy.noised`.
    """
    clip = privacy.clip
    assert clip is not None
    start, way = {"x": np.zeros(ENTRIES, np.float32)}, np.full(ENTRIES, ENTRIES ** -0.5)
    deviation = 2 * multiplier(privacy, uploads) * clip

    def statistics(sign: int) -> np.ndarray:
        upload = {"x": np.float32(3 * sign * clip * way)}
        seen = [sum(release(upload, start, clip, deviation, rng)["x"] @ way for _ in range(uploads))
                for _ in range(trials)]
        return np.asarray(seen)

    return lower_bound(statistics(1), statistics(-1), privacy.delta)
