"""Means, standard errors and paired differences over seeds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pilot_jax.evaluation.personalised import mean_score


def summarise(name: str, rows: dict[str, dict], reference: str = "pilot") -> dict[str, Any]:
    """Mean, standard error and paired difference to `reference` of one variant; see `paired`."""
    seeds = rows[name]["seeds"]
    values = np.asarray([s["score_mean"] if s["score_mean"] is not None else 0.0 for s in seeds])
    tasks = sorted({t for s in seeds for t in s["score_by_task"]})
    out = {"name": name, "score": float(values.mean()), "standard_error": standard_error(values),
           "by_task": {t: float(np.mean([s["score_by_task"].get(t, 0.0) for s in seeds])) for t in tasks},
           "base_captions": mean_score([s["base_captions"] for s in seeds if s["base_captions"] is not None]),
           "effective_neighbors": mean_score([s["effective_neighbors"][-1] for s in seeds if not s["diverged"]]),
           "quarantined": sum(s.get("quarantined", 0) for s in seeds),
           "diverged": sum(s["diverged"] for s in seeds), "wall_seconds": rows[name]["wall_seconds"],
           "bytes_up": seeds[0].get("bytes_up"), "bytes_down": seeds[0].get("bytes_down")}
    if reference in rows and name != reference:
        theirs = np.asarray([s["score_mean"] or 0.0 for s in rows[reference]["seeds"]])
        out["difference"] = paired(theirs, values)
    return out


def standard_error(values: np.ndarray) -> float | None:
    return None if len(values) < 2 else float(values.std(ddof=1) / math.sqrt(len(values)))


def paired(reference: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    """reference − values, seed by seed: mean, and its 95 % confidence interval by Student's t."""
    from scipy import stats

    apart = reference - values
    error = standard_error(apart)
    if error is None:
        return {"mean": float(apart.mean()), "low": None, "high": None, "significant": None}
    half = float(stats.t.ppf(0.975, len(apart) - 1)) * error
    low, high = float(apart.mean() - half), float(apart.mean() + half)
    return {"mean": float(apart.mean()), "low": low, "high": high, "significant": low > 0 or high < 0}
