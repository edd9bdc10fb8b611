"""Client-level differential privacy of uploads: clip the change, add Gaussian noise, account for every upload.

The server mixes single uploads (ATA needs them one by one), so each is protected by itself, before it leaves, and the
guarantee holds against the server too: whatever a client's data are, its uploads look the same up to (ε, δ). A change
is clipped to L2 norm C, so two data sets move it by at most 2C; the noise has standard deviation z·2C in every entry.
Several uploads of a client compose; sampling clients gains nothing, because the server sees who takes part. Everything
after the upload (distances, mixing, what others receive) is computed from noised values alone: the clients' numbers of
samples, which would weigh means and could be computed back from them, count as equal (`Federation.weight`).
"""

from __future__ import annotations

import math
import os
from typing import Any

import jax
import numpy as np

from pilot_jax.config import PrivacyConfig
from pilot_jax.errors import InputError


def _accounting() -> Any:
    try:
        import dp_accounting
    except ImportError:
        raise InputError("federation.privacy: needs dp-accounting. Run: pip install dp-accounting") from None
    return dp_accounting


def epsilon(noise_multiplier: float, uploads: int, delta: float) -> float:
    """Returns ε of `uploads` releases with noise of `noise_multiplier` (z) times the sensitivity. n Gaussian releases
    equal one with noise z/√n, whose ε is exact (Balle and Wang, ICML 2018).

    Raises:
        InputError: dp-accounting is not installed.
    """
    accounting = _accounting()
    return float(accounting.get_epsilon_gaussian(noise_multiplier / math.sqrt(uploads), delta)) if uploads else 0.0


def noise_multiplier(target: float, uploads: int, delta: float) -> float:
    """Returns the z with which `uploads` releases have the ε `target`."""
    return float(_accounting().get_sigma_gaussian(target, delta)) * math.sqrt(uploads)


def multiplier(privacy: PrivacyConfig, uploads: int) -> float:
    """Returns z: the configured one, or the one that the configured ε needs for `uploads` of one client.

    Raises:
        InputError: dp-accounting, which computes the ε of every phase, is not installed.
    """
    _accounting()
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    assert privacy.epsilon is not None  # the config has one of the two
    return noise_multiplier(privacy.epsilon, max(uploads, 1), privacy.delta)


class SystemNoise:
    """Standard normal numbers, float64, from the random bits of the operating system, which no seed repeats.

    The inverse of the normal distribution function is taken of the middles of 2⁵³ equal parts of [0, 1].
    """

    def standard_normal(self, size: tuple[int, ...], /) -> np.ndarray:
        from scipy.special import ndtri  # takes a quarter of a second

        bits = np.frombuffer(os.urandom(8 * math.prod(size)), np.uint64) >> np.uint64(11)
        return ndtri((bits + 0.5) * 2.0**-53).reshape(size)


Noise = np.random.Generator | SystemNoise


def noised(upload: Any, start: Any, clip: float, deviation: float, rng: Noise) -> Any:
    """Returns start + (upload − start)·min(1, clip/‖upload − start‖₂) + N(0, deviation²); computed in float64.

    start: the subtrees that the client began with, which the server knows. A change that is not finite counts as no
    change, so that the upload does not reveal it.
    """
    apart = jax.tree.map(lambda u, s: np.subtract(u, s, dtype=np.float64), upload, start)
    norm = float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(apart))))
    scale = min(1.0, clip / norm) if 0 < norm < np.inf else 0.0

    def one(leaf: np.ndarray, origin: np.ndarray) -> np.ndarray:
        moved = origin + (scale * leaf if scale else 0.0)
        return (moved + deviation * rng.standard_normal(leaf.shape)).astype(np.asarray(origin).dtype)

    return jax.tree.map(one, apart, start)
