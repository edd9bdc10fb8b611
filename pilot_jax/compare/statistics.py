"""Computes means, standard errors and paired differences over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from scipy import stats

from pilot_jax.evaluation.personalised import mean_score

Record = dict[str, Any]  # a JSON object


class Difference(TypedDict):
    """A paired difference over seeds with its 95 % interval; with a single seed only `mean` is not None."""

    mean: float
    low: float | None
    high: float | None
    significant: bool | None


def summarise(name: str, rows: Mapping[str, Record], reference: str = "pilot") -> Record:
    """Returns a variant's mean, standard error and paired difference to `reference`, as `results.json` holds them.

    Args:
        name: the name of the variant.
        rows: the result of `runner.run_variant` for each variant; all have the same seeds in the same order.
        reference: the name of the variant to compare with; if it is not in `rows`, the difference is left out.
    """
    seeds = rows[name]["seeds"]
    values = _mean_scores(rows[name])
    tasks = sorted({t for s in seeds for t in s["score_by_task"]})
    out = {"name": name, "score": float(values.mean()), "standard_error": standard_error(values),
           "common": _other(seeds, "score_common"), "finetuned": _other(seeds, "score_finetuned"),
           "token_accuracy": _other(seeds, "token_accuracy"),
           "by_task": {t: float(np.mean([s["score_by_task"].get(t, 0.0) for s in seeds])) for t in tasks},
           "base_captions": mean_score([s["base_captions"] for s in seeds if s["base_captions"] is not None]),
           "effective_neighbors": mean_score([s["effective_neighbors"][-1] for s in seeds if not s["diverged"]]),
           "quarantined": sum(s.get("quarantined", 0) for s in seeds),
           "diverged": sum(s["diverged"] for s in seeds), "wall_seconds": rows[name]["wall_seconds"],
           "bytes_up": seeds[0].get("bytes_up"), "bytes_down": seeds[0].get("bytes_down"),
           "server": seeds[0].get("server")}
    if reference in rows and name != reference:
        out["difference"] = paired(_mean_scores(rows[reference]), values)
    return out


def _other(seeds: Sequence[Record], key: str) -> Record | None:
    """Returns mean and standard error over seeds of another score than the clients' own; None if no seed has it. A seed
    whose run diverged counts as 0."""
    values = [seed.get(key) for seed in seeds]
    if all(value is None for value in values):
        return None
    array = np.asarray([0.0 if value is None else value for value in values])
    return {"score": float(array.mean()), "standard_error": standard_error(array)}


def _mean_scores(row: Record) -> np.ndarray:
    """Returns the mean score of each seed, float64 [seeds]; 0 for a seed whose run diverged."""
    return np.asarray([s["score_mean"] if s["score_mean"] is not None else 0.0 for s in row["seeds"]])


def standard_error(values: np.ndarray) -> float | None:
    """Returns the standard error of the mean; None for a single value."""
    return None if len(values) < 2 else float(values.std(ddof=1) / math.sqrt(len(values)))


def paired(reference: np.ndarray, values: np.ndarray) -> Difference:
    """Returns the mean of reference − values, seed by seed, with its 95 % confidence interval by Student's t.

    Args:
        reference: float [seeds].
        values: float [seeds], for the same seeds in the same order.
    """
    apart = reference - values
    mean, error = float(apart.mean()), standard_error(apart)
    if error is None:
        return {"mean": mean, "low": None, "high": None, "significant": None}
    # If all differences are equal, SciPy returns [nan, nan]; the interval is then that single value.
    low, high = map(float, stats.t.interval(0.95, len(apart) - 1, mean, error)) if error else (mean, mean)
    return {"mean": mean, "low": low, "high": high, "significant": low > 0 or high < 0}
