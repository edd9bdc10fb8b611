"""The page of a comparison: what `pilot-jax compare` found, from its `results.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pilot_jax.comparison_report import rows_of
from pilot_jax.errors import InputError
from pilot_jax.models.config import read_json
from pilot_jax.report import charts
from pilot_jax.report.parts import Figures, decimal, document, escaped, grid, table_of, tiles


def is_comparison(path: str | Path) -> bool:
    path = Path(path)
    return path.suffix == ".json" or ((path / "results.json").is_file() and not (path / "metrics.jsonl").is_file())


def read_comparison(path: str | Path) -> dict[str, Any]:
    """`results.json`, with `name`, the comparison's.

    Raises:
        InputError: it is not one that `compare` wrote.
    """
    path = Path(path)
    file = path if path.suffix == ".json" else path / "results.json"
    found = read_json(file, "Give the folder of a comparison, or its results.json.")
    wanted = {"variants", "base", "seeds", "split", "config", "seconds_of_all", "seconds_of_tuning"}
    if not isinstance(found, dict) or not wanted <= set(found) or not found["variants"]:
        raise InputError(f"{file}: not what `compare` writes (one comparison, not a sweep's sweep.json).")
    return found | {"name": file.resolve().parent.name if file.name == "results.json" else file.stem}


def _by_score(results: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(results["variants"], key=lambda line: line["score"])


def _tasks(lines: Sequence[dict[str, Any]]) -> list[str]:
    return sorted({task for line in lines for task in line["by_task"]})


def _colour(line: dict[str, Any]) -> str:
    return charts.COLOURS[1] if line["name"] == "pilot" else charts.COLOURS[0]


def scores(results: dict[str, Any]) -> Any:
    """Mean score with its standard error; Pilot in a colour of its own."""
    lines = _by_score(results)
    figure, axes = charts.new_axes(0.7 + 0.2 * len(lines))
    at = np.arange(len(lines))
    axes.barh(at, [line["score"] for line in lines], xerr=[line["standard_error"] or 0 for line in lines], height=0.62,
              color=[_colour(line) for line in lines], alpha=0.85, error_kw={"ecolor": charts.INK, "lw": 0.8})
    if results["base"]["score"] is not None:
        axes.axvline(results["base"]["score"], color=charts.INK, lw=0.8, ls=":", label="base")
        axes.legend(loc="lower right")
    axes.set_yticks(at, [line["name"] for line in lines])
    axes.set_xlim(0, 1)
    axes.set_xlabel("score: mean over clients and seeds")
    return figure


def differences(results: dict[str, Any]) -> Any:
    """Pilot − it, paired by seed, with the 95 % interval; filled where that excludes 0."""
    lines = [line for line in _by_score(results) if line.get("difference")]
    figure, axes = charts.new_axes(0.7 + 0.2 * len(lines))
    for at, line in enumerate(lines):
        d = line["difference"]
        low, high = (d["mean"], d["mean"]) if d["low"] is None else (d["low"], d["high"])
        axes.plot([low, high], [at, at], color=charts.INK, lw=0.9)
        axes.plot(d["mean"], at, "o", ms=4.5, color=charts.COLOURS[1], mew=1,
                  markerfacecolor=charts.COLOURS[1] if d["significant"] else "none")
    axes.axvline(0, color=charts.INK, lw=0.6, alpha=0.6)
    axes.set_yticks(range(len(lines)), [line["name"] for line in lines])
    axes.set_xlabel("Pilot − it, paired by seed")
    axes.grid(axis="x", color=charts.INK, alpha=0.12, lw=0.5)
    return figure


def traffic(results: dict[str, Any]) -> Any:
    """What a score costs in bytes: up and down, of one seed's run."""
    figure, axes = charts.new_axes(2.6)
    for line in results["variants"]:
        if line["bytes_up"] is None:
            continue
        sent = (line["bytes_up"] + line["bytes_down"]) / 1e6
        axes.scatter(sent, line["score"], color=_colour(line), s=22, alpha=0.85)
        if line["name"] == "pilot":
            axes.annotate("pilot", (sent, line["score"]), textcoords="offset points", xytext=(5, 3), fontsize=7)
    axes.set_ylim(0, 1)
    axes.set_xlabel("MB sent, up and down")
    axes.set_ylabel("score")
    axes.grid(color=charts.INK, alpha=0.12, lw=0.5)
    return figure


def comparison_page(results: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """(HTML, PNGs by name)."""
    figures, lines = Figures(), _by_score(results)[::-1]
    tasks, paired = _tasks(lines), [line for line in lines if line.get("difference")]
    best, names = lines[0], [line["name"] for line in lines]
    config = results["config"]
    parts = [f"<h1>{escaped(results['name'])}</h1>",
             f'<p class="soft">{len(lines)} variants × {results["seeds"]} seeds on the {escaped(results["split"])} '
             f"split, tasks {escaped(', '.join(tasks))}; {config['federation']['rounds']} rounds</p>",
             tiles({f"best: {best['name']}": decimal(best["score"]),
                    "of the base": decimal(results["base"]["score"]),
                    **({"pilot": decimal(next(x["score"] for x in lines if x["name"] == "pilot"))}
                       if "pilot" in names else {}),
                    "s for the variants": f"{results['seconds_of_all']:.0f}",
                    "s for tuning": f"{results['seconds_of_tuning']:.0f}"})]

    cards = [figures.card("scores", "Score of each variant, ± standard error",
                          f"Scores of {len(lines)} variants, from {decimal(lines[-1]['score'])} to "
                          f"{decimal(best['score'])}.", scores(results))]
    if paired:
        cards.append(figures.card("differences", "Pilot's lead, with its 95 % interval; filled where that excludes 0",
                                  f"Paired differences of Pilot to {len(paired)} variants.", differences(results)))
    cards.append(figures.card("tasks", "Score by task", f"Scores of {len(lines)} variants on {len(tasks)} tasks.",
                              charts.cells(np.asarray([[line["by_task"].get(t, np.nan) for t in tasks]
                                                       for line in lines], np.float64), names, tasks, "task", "")))
    if any(line["bytes_up"] for line in lines):
        cards.append(figures.card("traffic", "What a score costs in bytes", "Score against megabytes sent.",
                                  traffic(results)))
    parts.append(grid(cards))
    head, *rows = rows_of(results)
    parts.append("<h2>All numbers</h2>" + table_of(head, rows))
    if results.get("rates"):
        factors = [f"{f:g}" for f in results["factors"]]
        parts.append("<h2>How the learning rates were chosen</h2><p class='soft'>Validation score by factor on the "
                     "config's rates, on data of a seed of its own</p>" + table_of(
                         ["", *(f"× {f}" for f in factors), "taken"],
                         [[family, *(decimal(rate["validation"].get(f)) for f in factors), f"× {rate['factor']:g}"]
                          for family, rate in results["rates"].items()]))
    import yaml

    parts.append(f"<details><summary>Config</summary><pre>{escaped(yaml.safe_dump(config, sort_keys=False))}</pre>"
                 "</details>")
    return document(results["name"], parts), figures.pngs
