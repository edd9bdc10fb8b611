"""Makes the figures of a comparison's HTML page, and says in words what the comparison shows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pilot_jax.compare.difference_table import difference_to, references_of, subject
from pilot_jax.compare.tables import Record, by_score, tasks_of
from pilot_jax.report.alone import LOCAL, Gains, outcome
from pilot_jax.report.charts import Axis, Mark, Point, Row, points_chart, rows_chart, strips
from pilot_jax.report.drawing import Key
from pilot_jax.report.overview import MOST_ROWS, by_task
from pilot_jax.report.rendering import Card, Heat, Table, decimal
from pilot_jax.words import change, counted, listed

PILOT, OTHER = Key("pilot", 1, 0), Key("other variants", 0, 0)
CLEAR, UNCLEAR = Key("significant", 1, 0), Key("not significant", 1, 0)


def _key(line: Record) -> Key:
    return PILOT if line["name"] == "pilot" else OTHER


def score_card(results: Record) -> Card:
    """Returns the variants' mean scores with their standard errors, the best on top."""
    lines, base = by_score(results)[::-1], results["base"]["score"]
    rows = []
    for line in lines:
        error = line["standard_error"]
        low, high = (None, None) if error is None else (line["score"] - error, line["score"] + error)
        about = "" if error is None else f" ± {error:.3f}"
        rows.append(Row(line["name"], [Mark(_key(line), line["score"], f"{line['name']}: {line['score']:.3f}{about}",
                                            low, high, bar=True)], decimal(line["score"])))
    legend = [PILOT, OTHER] if any(line["name"] == "pilot" for line in lines) else []
    axis = Axis("score: mean over clients and seeds", [0.0], base, f"base model: {decimal(base)}" if base else "")
    return Card("scores", "Mean score of each variant", f"Scores of {counted(len(lines), 'variant')}, from "
                f"{decimal(lines[-1]['score'])} to {decimal(lines[0]['score'])}.", rows_chart(rows, axis, legend),
                about="A thin line is the standard error over seeds." + (
                    f" The dashed line is the base model before training ({decimal(base)})." if base else ""),
                table=Table(["variant", "score", "standard error"],
                            [[line["name"], decimal(line["score"]), decimal(line["standard_error"])]
                             for line in lines]))


def difference_card(results: Record, reference: str, name: str) -> Card:
    """Returns each variant's difference to a reference with its 95 % interval."""
    lines = [(line, found) for line in by_score(results)[::-1] if (found := difference_to(line, reference))]
    tested = results.get("margin") is not None
    meaning = "is significant" if tested else "has an interval that excludes 0"
    rows = [Row(line["name"], [Mark(
        CLEAR if d["significant"] else UNCLEAR, d["mean"],
        f"{line['name']}: {change(d['mean'], 3)}"
        + ("" if d["low"] is None else f", 95 % from {change(d['low'], 3)} to {change(d['high'], 3)}"),
        d["low"], d["high"], hollow=not d["significant"])], change(d["mean"], 3)) for line, d in lines]
    clear = sum(1 for _, d in lines if d["significant"])
    return Card(name, f"Difference to {reference}", f"Differences of {counted(len(lines), 'variant')}, "
                f"{subject(reference)}; {clear} of them significant.",
                rows_chart(rows, Axis(f"difference of scores, {subject(reference)}", [0.0], 0.0)),
                about=f"With 95 % intervals; a filled mark {meaning}.",
                table=Table(["variant", subject(reference), "from", "to"],
                            [[line["name"], change(d["mean"], 3), *("–" if v is None else change(v, 3)
                                                                    for v in (d["low"], d["high"]))]
                             for line, d in lines]))


def task_card(results: Record) -> Card:
    """Returns the variants' mean scores on each task."""
    lines, tasks = by_score(results)[::-1], tasks_of(results)
    return Card("tasks", "Mean score on each task", f"Scores of {counted(len(lines), 'variant')} on "
                f"{counted(len(tasks), 'task')}.",
                heat=Heat("variant", tasks, [(line["name"], [line["by_task"].get(t) for t in tasks])
                                             for line in lines], 3))


def traffic_card(results: Record) -> Card | None:
    """Returns the variants' scores against what the run of one seed transfers; None if nothing is known of it."""
    lines = [line for line in by_score(results)[::-1] if line["bytes_up"] is not None]
    if not any(line["bytes_up"] for line in lines):
        return None
    points = [Point(_key(line), (line["bytes_up"] + line["bytes_down"]) / 1e6, line["score"], line["name"],
                    f"{line['name']}: {line['score']:.3f}, {(line['bytes_up'] + line['bytes_down']) / 1e6:,.1f} MB")
              for line in lines]
    return Card("traffic", "Score against traffic", f"Score of {counted(len(points), 'variant')} against megabytes.",
                points_chart(points, "MB up and down, all clients and rounds, one seed", "score",
                             around=([0.0], [0.0])),
                table=Table(["variant", "MB up and down", "score"],
                            [[p.name, f"{p.x:,.1f}", decimal(p.y)] for p in points]))


def client_gains(results: Record, name: str) -> dict[str, np.ndarray] | None:
    """Returns each client's gain of a variant over local, an array over seeds; None if the results have none.

    Seeds in which one of the two diverged are left out."""
    rows = results.get("rows", {})
    if name not in rows or LOCAL not in rows or name == LOCAL:
        return None
    scores = [(a.get("score_by_client"), b.get("score_by_client"))
              for a, b in zip(rows[name]["seeds"], rows[LOCAL]["seeds"], strict=False)]
    pairs = [(a, b) for a, b in scores if a and b]
    clients = [c for c in (pairs[0][0] if pairs else {}) if all(c in a and c in b for a, b in pairs)]
    return {c: np.asarray([a[c] - b[c] for a, b in pairs]) for c in clients} or None


def shown_variant(results: Record) -> Record:
    """Returns the variant whose gains by client are shown: pilot, or the best one that is not a reference run."""
    lines = by_score(results)[::-1]
    federated = [line for line in lines if line["name"] not in (LOCAL, "centralised")]
    return next((line for line in lines if line["name"] == "pilot"), (federated or lines)[0])


def gain_card(results: Record) -> Card | None:
    """Returns what each client gains over training alone, with its standard error over seeds."""
    name = shown_variant(results)["name"]
    found = client_gains(results, name)
    if found is None:
        return None
    key, means = Key(name, 1, 0), {c: float(v.mean()) for c, v in found.items()}
    errors = {c: None if len(v) < 2 else float(v.std(ddof=1) / math.sqrt(len(v))) for c, v in found.items()}
    axis, seeds = Axis("gain over training alone", [0.0], 0.0), len(next(iter(found.values())))
    task_of = _task_of(list(found), tasks_of(results))
    if len(found) <= MOST_ROWS:
        rows = []
        for c in found:
            error = errors[c]
            low, high = (None, None) if error is None else (means[c] - error, means[c] + error)
            about = "" if error is None else f" ± {error:.3f}"
            rows.append(Row(c, [Mark(key, means[c], f"{c}: {change(means[c], 3)}{about}", low, high)],
                            change(means[c], 3)))
        drawn = rows_chart(rows, axis)
    else:
        drawn = strips({task or "all clients": [Mark(key, means[c], f"{c}: {change(means[c], 3)}") for c in clients]
                        for task, clients in by_task(list(found), task_of).items()}, axis)
    return Card("gains", f"Whom {name} helps: gain of each client over training alone",
                f"Gains of {counted(len(found), 'client')} over training alone.", drawn,
                about=f"Mean over {counted(seeds, 'seed')}{' with its standard error' if seeds > 1 else ''}.",
                table=Table(["client", "gain", "standard error"],
                            [[c, change(means[c], 3), decimal(errors[c])] for c in found]))


def _task_of(clients: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """Returns the task of each client whose name begins with a task's name, as in the scenarios."""
    return {c: t for c in clients for t in sorted(tasks, key=len) if c.startswith(t)}


def headline(results: Record) -> list[str]:
    """Returns what a comparison shows, in sentences, the most important first."""
    lines = by_score(results)[::-1]
    best, shown, base = lines[0], shown_variant(results), results["base"]["score"]
    out = [f"{best['name']} has the highest mean score, {decimal(best['score'])}"
           + (f"; {shown['name']} has {decimal(shown['score'])}" if shown is not best else "")
           + ("." if base is None else f". The base model before training has {decimal(base)}.")]
    found = client_gains(results, shown["name"])
    if found is not None:
        text = outcome(Gains({c: float(v.mean()) for c, v in found.items()}), "training alone")
        out.append(f"With {shown['name']}: {text}")
    for reference in references_of(results):
        pairs = [(line["name"], d) for line in lines if (d := difference_to(line, reference))]
        above = [name for name, d in pairs if d["significant"] and (d["mean"] > 0) is not (reference == "pilot")]
        below = [name for name, d in pairs if d["significant"] and (d["mean"] > 0) is (reference == "pilot")]
        alike = len(pairs) - len(above) - len(below)
        parts = [f"{listed(names, 5)} {'is' if len(names) == 1 else 'are'} clearly {word}"
                 for names, word in ((above, "better"), (below, "worse")) if names]
        if alike:
            parts.append(f"for {counted(alike, 'variant')} the difference is not clear")
        out.append(f"Against {reference}: {'; '.join(parts)}.")
    return out
