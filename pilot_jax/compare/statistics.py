"""Computes the means and standard errors of a variant over seeds, and finds learning rates at the edge of the grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pilot_jax.compare.differences import mean_scores
from pilot_jax.evaluation.personalised import mean_score

Record = dict[str, Any]  # a JSON object


def summarise(name: str, row: Record) -> Record:
    """Returns a variant's mean and standard error as `results.json` holds them, without differences to others.

    Args:
        name: the name of the variant.
        row: the result of `runner.run_variant`.
    """
    seeds, values = row["seeds"], mean_scores(row)
    tasks = sorted({t for s in seeds for t in s["score_by_task"]})
    return {"name": name, "score": float(values.mean()), "standard_error": standard_error(values),
            "common": _other(seeds, "score_common"), "finetuned": _other(seeds, "score_finetuned"),
            "token_accuracy": _other(seeds, "token_accuracy"),
            "by_task": {t: float(np.mean([s["score_by_task"].get(t, 0.0) for s in seeds])) for t in tasks
                        if all(s["score_by_task"].get(t, 0.0) is not None for s in seeds)},  # None without data
            "base_captions": mean_score([s["base_captions"] for s in seeds if s["base_captions"] is not None]),
            "effective_neighbors": mean_score([s["effective_neighbors"][-1] for s in seeds if not s["diverged"]]),
            "quarantined": sum(s.get("quarantined", 0) for s in seeds),
            "diverged": sum(s["diverged"] for s in seeds), "wall_seconds": row["wall_seconds"],
            "bytes_up": seeds[0].get("bytes_up"), "bytes_down": seeds[0].get("bytes_down"),
            "server": seeds[0].get("server")}


def _other(seeds: Sequence[Record], key: str) -> Record | None:
    """Returns mean and standard error over seeds of another score than the clients' own; None if no seed has it. A seed
    whose run diverged counts as 0."""
    values = [seed.get(key) for seed in seeds]
    if all(value is None for value in values):
        return None
    array = np.asarray([0.0 if value is None else value for value in values])
    return {"score": float(array.mean()), "standard_error": standard_error(array)}


def standard_error(values: np.ndarray) -> float | None:
    """Returns the standard error of the mean; None for a single value."""
    return None if len(values) < 2 else float(values.std(ddof=1) / math.sqrt(len(values)))


def best_factor(validation: Mapping[str, float]) -> float:
    """Returns the factor with the best validation score, or the smallest of several."""
    return max(map(float, validation), key=lambda factor: (validation[f"{factor:g}"], -factor))


def beyond(validation: Mapping[str, float]) -> float | None:
    """Returns the next factor beyond the end of those tried at which the best one lies; None: it lies within.

    It continues the ratio of the last two. Of a single factor there is no next one.
    """
    tried, best = sorted(map(float, validation)), best_factor(validation)
    if len(tried) < 2 or best not in (tried[0], tried[-1]):
        return None
    beside = tried[1] if best == tried[0] else tried[-2]
    return float(f"{best * best / beside:.3g}")


def edge_warnings(rates: Mapping[str, Record]) -> list[str]:
    """Returns a sentence for each strategy whose best learning rates are the largest or the smallest of those tried.

    Args:
        rates: the result of `Comparison.rates` for each strategy.
    """
    return [f"{name}: learning rates × {rate['factor']:g}, its best, are the "
            f"{'largest' if further > rate['factor'] else 'smallest'} of those tried. Better ones may lie beyond: add "
            f"{further:g} to --rates."
            for name, rate in rates.items() if (further := beyond(rate["validation"])) is not None]
