"""Writes differences to references as cells of tables, and explains their marks.

Results of earlier versions have one difference, to Pilot, whose star means that the interval excludes 0.
"""

from __future__ import annotations

from typing import Any

from pilot_jax.compare.differences import REFERENCES

Record = dict[str, Any]  # a JSON object: `results.json`, or a variant's entry in it


def difference_to(line: Record, reference: str = "pilot") -> Record | None:
    """Returns a variant's difference to a reference; None if there is none."""
    old = line.get("difference") if reference == "pilot" else None
    return line.get("differences", {}).get(reference, old)


def references_of(results: Record) -> list[str]:
    """Returns the names of the references, in the order of their columns."""
    names = {name: None for line in results["variants"] for name in line.get("differences", {})}
    if not names and any(difference_to(line) for line in results["variants"]):
        return ["pilot"]
    return [*(name for name in REFERENCES if name in names), *(name for name in names if name not in REFERENCES)]


def title(reference: str) -> str:
    """Returns the title of a column of differences."""
    return subject(reference).replace("variant − ", "minus ")


def subject(reference: str) -> str:
    """Returns which difference to a reference is meant."""
    name = REFERENCES.get(reference, reference)
    return f"{name} − variant" if reference == "pilot" else f"variant − {name}"


def marks(difference: Record) -> str:
    """Returns the marks beside a difference, which `difference_explanations` explains."""
    above = difference["significant"] and difference["mean"] > 0
    margin = "≈" if difference.get("equivalent") else "≥" if difference.get("non_inferior") and not above else ""
    return " ".join(mark for mark in ("*" if difference["significant"] else "", margin) if mark)


def _bracket(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{low:+.3f}, {high:+.3f}]"


def difference_cell(line: Record, reference: str) -> str:
    """Returns a difference with its interval and marks; a dash if there is none."""
    found = difference_to(line, reference)
    if found is None:
        return "–"
    parts = (f"{found['mean']:+.3f}", _bracket(found["low"], found["high"]), marks(found))
    return " ".join(part for part in parts if part)


def difference_explanations(results: Record) -> list[str]:
    """Returns sentences about the columns of differences; none if there are no differences."""
    names, margin = references_of(results), results.get("margin")
    if not names:
        return []
    if margin is None:
        return ["Pilot − variant: mean difference of the scores, paired by seed, with its 95 % interval by Student's "
                "t. A * marks an interval that excludes 0."]
    if results["seeds"] > 1:
        pairs = ("paired by seed, with its 95 % interval by Student's t over seeds. It is about the same clients with "
                 "further seeds.")
    else:
        pairs = ("paired by client, with its 95 % interval by Student's t over the clients of this one seed. How much "
                 "another seed would differ is not known; that takes two seeds or more.")
    about = f"{', '.join(map(title, names))}: mean difference of the scores, {pairs}"
    if any(name != "pilot" for name in names):
        about += " The columns named minus have the variant's score minus the reference's."
    if any(found["low"] is None for line in results["variants"] for found in line.get("differences", {}).values()):
        about += " Without an interval: there is only one difference, or all are equal, so that their error is unknown."
    return [about,
            "*: p < 0.05 after Holm's correction over the variants of the column. The intervals are not corrected.",
            f"≥: non-inferior, the difference is above −{margin:g}; ≈: equivalent, it is between −{margin:g} and "
            f"{margin:g}. Both by one-sided tests at 5 %, corrected in the same way. ≥ is left out beside a positive "
            "difference with *."]


def _p(value: float | None) -> str:
    return "–" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def detail_rows(results: Record) -> list[list[str]]:
    """Returns the header row, and each difference with both intervals and all p values; empty for old results."""
    if results.get("margin") is None or not references_of(results):
        return []
    margin = f"{results['margin']:g}"
    unit = "seeds" if results["seeds"] > 1 else "clients of this seed"
    rows = [["", "difference", "mean", f"95 %: further {unit}", "95 %: further seeds and clients", "p", "p (Holm)",
             f"p: > −{margin} (Holm)", f"p: within ±{margin} (Holm)"]]
    for reference in references_of(results):
        for line in sorted(results["variants"], key=lambda one: -one["score"]):
            found = line.get("differences", {}).get(reference)
            if found is not None:
                both = found["with_other_clients"] or {"low": None, "high": None}
                rows.append([line["name"], subject(reference), f"{found['mean']:+.3f}",
                             _bracket(found["low"], found["high"]) or "–", _bracket(both["low"], both["high"]) or "–",
                             *(_p(found[key]) for key in ("p", "p_adjusted", "p_non_inferior", "p_equivalent"))])
    return rows
