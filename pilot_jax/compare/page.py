"""What a comparison leaves behind: `results.json`, its tables as Markdown, its figures, and the report's page."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml

from pilot_jax.compare import figures
from pilot_jax.compare.tables import (
    Record,
    by_score,
    score_rows,
    sweep_table,
    table,
    tasks_of,
    tuning_rows,
    tuning_table,
)
from pilot_jax.errors import InputError
from pilot_jax.report import charts
from pilot_jax.report.rendering import Card, Page, Table, decimal, figure_card, render, write_page
from pilot_jax.storage import atomic_write, read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _plots_installed() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _write_png(figure: Figure, path: Path) -> None:
    atomic_write(path, charts.png(figure))
    charts.pyplot().close(figure)


def write_results(results: Record, out: Path) -> None:
    """Writes `results.json`, `results.md` and, if matplotlib is installed, `results.png` into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "results.json", json.dumps(results, indent=1))
    text = [f"Scores on the {results['split']} split, {results['seeds']} seeds, ± standard error; the interval is "
            "Student's t over seeds, paired; * excludes 0. neighbours: effective ones, oneself included, in the last "
            "phase.", "", table(results), ""]
    if results["rates"]:
        text += ["Validation score by factor on the config's learning rates (a seed of its own):", "",
                 tuning_table(results), ""]
    text.append(f"{results['seconds_of_all']:.0f} s for the variants, {results['seconds_of_tuning']:.0f} s for tuning, "
                f"on {results['devices']} device(s) of kind {results['device']}.")
    atomic_write(out / "results.md", "\n".join(text) + "\n")
    if _plots_installed():
        _write_png(figures.overview(results), out / "results.png")


def write_sweep(key: str, values: Sequence[str], compared: Sequence[Record], out: Path) -> str:
    """Writes `sweep.json`, `sweep.md` and, if matplotlib is installed, `sweep.png`; returns the table.

    Args:
        key: the config key in which the comparisons differ.
        values: its values.
        compared: the results of `compare` at each value.
        out: a folder.
    """
    lines = [{"value": value, "variants": results["variants"], "rates": results["rates"], "base": results["base"],
              "seconds_of_all": results["seconds_of_all"], "seconds_of_tuning": results["seconds_of_tuning"]}
             for value, results in zip(values, compared, strict=True)]
    atomic_write(out / "sweep.json", json.dumps({"key": key, "values": lines}, indent=1))
    text = sweep_table(key, values, compared)
    seconds = sum(line["seconds_of_all"] + line["seconds_of_tuning"] for line in lines)
    atomic_write(out / "sweep.md", (
        f"Scores on the {compared[0]['split']} split, {compared[0]['seeds']} seeds, ± standard error; *: the paired "
        f"difference to Pilot excludes 0 (95 %).\n\n{text}\n\n{seconds:.0f} s with tuning.\n"))
    if _plots_installed():
        _write_png(figures.sweep(key, values, compared), out / "sweep.png")
    return text


def is_comparison(path: str | Path) -> bool:
    """Whether a path is the folder of a comparison, or a JSON file, and not a run directory."""
    path = Path(path)
    return path.suffix == ".json" or ((path / "results.json").is_file() and not (path / "metrics.jsonl").is_file())


def read_comparison(path: str | Path) -> Record:
    """Returns `results.json` of a comparison's folder, or a JSON file like it, with the comparison's `name`.

    Raises:
        InputError: it is not what `compare` writes.
    """
    path = Path(path)
    file = path if path.suffix == ".json" else path / "results.json"
    found = read_json(file, "Give the folder of a comparison, or its results.json.")
    needed = {"variants", "base", "seeds", "split", "config", "seconds_of_all", "seconds_of_tuning"}
    if not needed <= set(found) or not found["variants"]:
        raise InputError(f"{file}: not what `compare` writes (one comparison, not a sweep's sweep.json).")
    return found | {"name": file.resolve().parent.name if file.name == "results.json" else file.stem}


def _cards(results: Record) -> list[Card]:
    """Returns the figures; those for which there is nothing to show are left out."""
    lines, tasks = by_score(results)[::-1], tasks_of(results)
    cards = [figure_card("scores", "Score of each variant, ± standard error",
                         f"Scores of {len(lines)} variants, from {decimal(lines[-1]['score'])} to "
                         f"{decimal(lines[0]['score'])}.", figures.scores(results))]
    paired = sum(1 for line in lines if line.get("difference"))
    if paired:
        cards.append(figure_card("differences", "Pilot's lead, with its 95 % interval; filled where that excludes 0",
                                 f"Paired differences of Pilot to {paired} variants.", figures.differences(results)))
    by_task = np.asarray([[line["by_task"].get(t, np.nan) for t in tasks] for line in lines], np.float64)
    cards.append(figure_card("tasks", "Score by task", f"Scores of {len(lines)} variants on {len(tasks)} tasks.",
                             charts.cells(by_task, [line["name"] for line in lines], tasks, "task", "")))
    if any(line["bytes_up"] for line in lines):
        cards.append(figure_card("traffic", "What a score costs in bytes", "Score against megabytes sent.",
                                 figures.traffic(results)))
    return cards


def comparison_page(results: Record) -> Page:
    """Returns the page of a comparison; `results` are those of `read_comparison`."""
    lines, cards = by_score(results)[::-1], _cards(results)
    best, pilot = lines[0], next((line for line in lines if line["name"] == "pilot"), None)
    tiles = {f"best: {best['name']}": decimal(best["score"]), "of the base": decimal(results["base"]["score"])}
    if pilot is not None:
        tiles["pilot"] = decimal(pilot["score"])
    tiles |= {"s for the variants": f"{results['seconds_of_all']:.0f}",
              "s for tuning": f"{results['seconds_of_tuning']:.0f}"}
    description = (f"{len(lines)} variants × {results['seeds']} seeds on the {results['split']} split, tasks "
                   f"{', '.join(tasks_of(results))}; {results['config']['federation']['rounds']} rounds")
    head, *rows = score_rows(results)
    rates = None
    if results.get("rates"):
        rates_head, *rates_rows = tuning_rows(results)
        rates = Table(rates_head, rates_rows)
    return render("comparison.html.jinja", cards, title=results["name"], description=description, tiles=tiles,
                  cards=cards, numbers=Table(head, rows), rates=rates,
                  config_text=yaml.safe_dump(results["config"], sort_keys=False))


def write_comparison_report(path: str | Path, out: Path) -> list[Path]:
    """Writes a comparison's page and, in a folder of its name, its figures as PNG files; returns the files, page first.

    Args:
        path: the folder of a comparison, or its `results.json`.

    Raises:
        InputError: it is not what `compare` writes, or matplotlib is not installed.
    """
    charts.pyplot()
    return write_page(out, comparison_page(read_comparison(path)))
