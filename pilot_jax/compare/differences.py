"""Computes the differences of each variant to the references: intervals, adjusted p values, non-inferiority.

A difference to `pilot` is Pilot − variant, and to every other reference variant − reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from pilot_jax.compare.intervals import Estimate, holm, mean_of, mean_over_both
from pilot_jax.errors import InputError

Record = dict[str, Any]  # a JSON object
REFERENCES = {"pilot": "Pilot", "local": "local", "fedavg_ft": "FedAvg + FT"}  # default references, and their titles
OWN = ("score_mean", "score_by_client")  # keys of the clients' own score in a seed's record: mean, by client
FINETUNED = ("score_finetuned", "score_finetuned_by_client")
ALPHA = 0.05


class Interval(TypedDict):
    """A 95 % interval and the p value of "no difference"."""

    low: float
    high: float
    p: float


class Difference(TypedDict):
    """A mean difference, with a 95 % interval; what is None cannot be computed: see `mean_of`."""

    mean: float
    low: float | None
    high: float | None
    unit: str  # what the interval is over: "seeds", or "clients" with a single seed
    p: float | None
    p_adjusted: float | None  # by Holm, over all differences to the same reference; so are the next two
    p_non_inferior: float | None  # of "the difference is −margin or less"
    p_equivalent: float | None  # of "the difference is margin or more, on either side"
    significant: bool | None  # p_adjusted < 0.05
    non_inferior: bool | None
    equivalent: bool | None
    with_other_clients: Interval | None  # for further seeds and further clients; None with a single seed


def check_references(against: Sequence[str], names: Sequence[str]) -> None:
    """Raises an `InputError` if a name of `against` is not among the names of the variants."""
    for name in against:
        if name not in names:
            raise InputError(f"--against: {name!r} is not compared. Compared are: {', '.join(names)}.")


def references(rows: Mapping[str, Record], against: Sequence[str] = ()) -> dict[str, tuple[Record, tuple[str, str]]]:
    """Returns the row of each reference and the keys of its score.

    References are the variants `against`; by default pilot, local and fedavg_ft, as far as they were compared. If
    fedavg_ft was not, but fedavg has scores of fine-tuned models, these take its place.
    """
    if against:
        return {name: (rows[name], OWN) for name in against}
    out = {name: (rows[name], OWN) for name in REFERENCES if name in rows}
    fedavg = rows.get("fedavg", {"seeds": []})
    if "fedavg_ft" not in rows and any(seed.get(FINETUNED[0]) is not None for seed in fedavg["seeds"]):
        out["fedavg_ft"] = fedavg, FINETUNED
    return out


def mean_scores(row: Record, key: str = OWN[0]) -> np.ndarray:
    """Returns the mean score of each seed, float64 [S]; 0 for a seed whose run diverged."""
    return np.asarray([0.0 if seed.get(key) is None else seed[key] for seed in row["seeds"]], np.float64)


def client_scores(one: Record, other: Record, keys: tuple[str, str]) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the scores of the same clients in two rows, float64 [S, K] each.

    Args:
        one: its scores are the clients' own.
        other: its scores have the keys `keys`.

    Returns: None unless all seeds of both have scores of the same clients; a seed that diverged has 0 for all of them.
    """
    pairs = ((one, OWN[1]), (other, keys[1]))
    names = {frozenset(seed.get(key) or ()) for row, key in pairs for seed in row["seeds"] if not seed["diverged"]}
    if len(names) != 1 or frozenset() in names:
        return None
    clients = sorted(*names)
    ours, theirs = (np.asarray([[(seed.get(key) or {}).get(name, 0.0) for name in clients] for seed in row["seeds"]])
                    for row, key in pairs)
    return ours, theirs


def _estimates(row: Record, reference: Record, keys: tuple[str, str],
               sign: int) -> tuple[float, Estimate | None, Estimate | None]:
    """Returns the mean difference, its estimate over seeds (of a single seed: over clients), and that over both."""
    by_seed = sign * (mean_scores(row) - mean_scores(reference, keys[0]))
    pair = client_scores(row, reference, keys)
    by_client = None if pair is None else sign * (pair[0] - pair[1])
    if len(by_seed) > 1:
        return float(by_seed.mean()), mean_of(by_seed), None if by_client is None else mean_over_both(by_client)
    return float(by_seed.mean()), None if by_client is None else mean_of(by_client[0]), None


def differences(rows: Mapping[str, Record], against: Sequence[str] = (),
                margin: float = 0.02) -> dict[str, dict[str, Difference]]:
    """Returns the differences of each variant to each reference, by names of variant and reference.

    Args:
        rows: the result of `runner.run_variant` for each variant; all have the same seeds in the same order.
        against: names of references (see `references`).
        margin: the largest difference of scores that does not matter, for non-inferiority and equivalence.
    """
    out: dict[str, dict[str, Difference]] = {name: {} for name in rows}
    for reference, (of, keys) in references(rows, against).items():
        names = [name for name in rows if name != reference]
        sign = -1 if reference == "pilot" else 1
        found = [_estimates(rows[name], of, keys, sign) for name in names]
        known = [i for i, (_, estimate, _) in enumerate(found) if estimate is not None]
        tested = [estimate for _, estimate, _ in found if estimate is not None]
        adjusted = [dict(zip(known, holm(p), strict=True)) for p in (
            [one.p() for one in tested], [one.p_below(-margin) for one in tested],
            [one.p_equivalent(margin) for one in tested])]
        unit = "seeds" if len(of["seeds"]) > 1 else "clients"
        for i, (name, (mean, estimate, both)) in enumerate(zip(names, found, strict=True)):
            out[name][reference] = _record(mean, unit, estimate, both, [p.get(i) for p in adjusted])
    return out


def _interval(estimate: Estimate) -> Interval:
    low, high = estimate.interval()
    return {"low": low, "high": high, "p": estimate.p()}


def _record(mean: float, unit: str, estimate: Estimate | None, both: Estimate | None,
            adjusted: Sequence[float | None]) -> Difference:
    own = None if estimate is None else _interval(estimate)
    significant, non_inferior, equivalent = (None if p is None else p < ALPHA for p in adjusted)
    p, p_non_inferior, p_equivalent = adjusted
    return {"mean": mean, "low": own and own["low"], "high": own and own["high"], "unit": unit, "p": own and own["p"],
            "p_adjusted": p, "p_non_inferior": p_non_inferior, "p_equivalent": p_equivalent,
            "significant": significant, "non_inferior": non_inferior, "equivalent": equivalent,
            "with_other_clients": None if both is None else _interval(both)}
