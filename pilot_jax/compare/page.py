"""Writes the results of a comparison: `results.json`, tables as Markdown, figures, and an HTML page."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pydantic import BaseModel, Field, FiniteFloat

from pilot_jax.compare import cards, figures
from pilot_jax.compare.difference_table import detail_rows, references_of
from pilot_jax.compare.tables import (
    Record,
    by_score,
    explanations,
    markdown,
    score_rows,
    sweep_table,
    table,
    tasks_of,
    tuning_rows,
    tuning_table,
)
from pilot_jax.errors import InputError
from pilot_jax.files import atomic_write, read_json
from pilot_jax.report.record import check_record
from pilot_jax.report.rendering import Card, Page, Table, decimal, render, write_page
from pilot_jax.words import counted, duration, listed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _plots_installed() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _write_png(figure: Figure, path: Path) -> None:
    atomic_write(path, figures.png(figure))


def write_results(results: Record, out: Path) -> None:
    """Writes `results.json`, `results.md` and, if matplotlib is installed, `results.png` into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "results.json", json.dumps(results, indent=1))
    seeds = counted(results["seeds"], "seed")
    text = [f"Scores on the {results['split']} split: mean over {seeds} ± standard error.", "",
            *(f"- {line}" for line in explanations(results)), "", table(results), ""]
    text += [f"Warning: {warning}\n" for warning in results["warnings"]]
    if details := detail_rows(results):
        text += ["Every difference:", "", markdown(details), ""]
    if results["rates"]:
        text += ["Mean validation score of each strategy by the factor on the config's learning rates, on data of a "
                 "separate seed. The score of the chosen factor is bold.", "", tuning_table(results), ""]
    tuning = f" and the tuning {duration(results['seconds_of_tuning'])}" if results["seconds_of_tuning"] else ""
    text.append(f"The variants took {duration(results['seconds_of_all'])}{tuning}, on "
                f"{counted(results['devices'], 'device')} of kind {results['device']}.")
    atomic_write(out / "results.md", "\n".join(text) + "\n")
    if _plots_installed():
        _write_png(figures.overview(results), out / "results.png")


def write_sweep(key: str, values: Sequence[str], compared: Sequence[Record], out: Path) -> str:
    """Writes `sweep.json`, `sweep.md` and, if matplotlib is installed, `sweep.png`; returns the table.

    Args:
        key: the config key that differs between the comparisons.
        values: the values of that key.
        compared: the results of `compare` for each value.
        out: an existing folder.
    """
    lines = [{"value": value, "variants": results["variants"], "rates": results["rates"], "base": results["base"],
              "seconds_of_all": results["seconds_of_all"], "seconds_of_tuning": results["seconds_of_tuning"]}
             for value, results in zip(values, compared, strict=True)]
    atomic_write(out / "sweep.json", json.dumps({"key": key, "values": lines}, indent=1))
    text = sweep_table(key, values, compared)
    seconds = sum(line["seconds_of_all"] + line["seconds_of_tuning"] for line in lines)
    seeds = counted(compared[0]["seeds"], "seed")
    atomic_write(out / "sweep.md", (
        f"Scores on the {compared[0]['split']} split: mean over {seeds} ± standard error. A * marks a significant "
        "difference to Pilot, paired by seed: p < 0.05 after Holm's correction over the variants."
        f"\n\n{text}\n\nIt took {duration(seconds)}, tuning included.\n"))
    if _plots_installed():
        _write_png(figures.sweep(key, values, compared), out / "sweep.png")
    return text


class _Interval(BaseModel):
    low: FiniteFloat
    high: FiniteFloat
    p: FiniteFloat


class _Difference(BaseModel):  # of earlier versions
    mean: FiniteFloat
    low: FiniteFloat | None
    high: FiniteFloat | None
    significant: bool | None


class _TestedDifference(_Difference):
    p: FiniteFloat | None
    p_adjusted: FiniteFloat | None
    p_non_inferior: FiniteFloat | None
    p_equivalent: FiniteFloat | None
    non_inferior: bool | None
    equivalent: bool | None
    with_other_clients: _Interval | None


class _Score(BaseModel):
    score: FiniteFloat
    standard_error: FiniteFloat | None


class _Server(BaseModel):
    flops: int
    bytes: int


class _Variant(BaseModel, extra="allow"):
    name: str
    score: FiniteFloat
    standard_error: FiniteFloat | None
    common: _Score | None = None
    finetuned: _Score | None = None
    token_accuracy: _Score | None = None
    by_task: dict[str, FiniteFloat]
    base_captions: FiniteFloat | None
    effective_neighbors: FiniteFloat | None
    diverged: int
    quarantined: int = 0
    wall_seconds: FiniteFloat
    bytes_up: int | None
    bytes_down: int | None
    server: _Server | None = None
    rate_factor: FiniteFloat
    difference: _Difference | None = None
    differences: dict[str, _TestedDifference] = {}


class _Base(BaseModel):
    score: FiniteFloat | None
    base_captions: FiniteFloat | None


class _Rate(BaseModel, extra="allow"):
    factor: FiniteFloat
    validation: dict[str, FiniteFloat]


class _Rounds(BaseModel, extra="allow"):
    rounds: int


class _Config(BaseModel, extra="allow"):
    federation: _Rounds


class _Results(BaseModel, extra="allow"):
    """What the page of a comparison needs of its results.json."""

    variants: list[_Variant] = Field(min_length=1)
    base: _Base
    seeds: int
    split: str
    config: _Config
    factors: list[FiniteFloat] = []
    rates: dict[str, _Rate] = {}
    margin: FiniteFloat | None = None  # results of earlier versions have none
    warnings: list[str] = []
    seconds_of_all: FiniteFloat
    seconds_of_tuning: FiniteFloat


def is_comparison(path: str | Path) -> bool:
    """Returns whether a path is a comparison's folder or a JSON file, and not a run directory."""
    path = Path(path)
    return path.suffix == ".json" or ((path / "results.json").is_file() and not (path / "metrics.jsonl").is_file())


def read_comparison(path: str | Path) -> Record:
    """Returns the content of a comparison's `results.json`, with the comparison's `name` added.

    Args:
        path: the comparison's folder, or its JSON file under any name.

    Raises:
        InputError: the file is not one that `compare` writes.
    """
    path = Path(path)
    file = path if path.suffix == ".json" else path / "results.json"
    found = read_json(file, "Give the folder of a comparison, or its results.json.")
    if "variants" not in found:
        raise InputError(f"{file}: not what `compare` writes. Give the results.json of one comparison, not the "
                         "sweep.json of several.")
    check_record(_Results, found, str(file))
    return found | {"name": file.resolve().parent.name if file.name == "results.json" else file.stem}


def _cards(results: Record) -> list[Card]:
    """Returns the figures in cards, the most important first; a figure without data is left out."""
    names = references_of(results)
    found = [cards.score_card(results), cards.gain_card(results),
             *(cards.difference_card(results, name, f"differences-{number}" if number else "differences")
               for number, name in enumerate(names)),
             cards.task_card(results), cards.traffic_card(results)]
    return [card for card in found if card is not None]


def comparison_page(results: Record) -> Page:
    """Returns the HTML page of a comparison; `results` is the result of `read_comparison`."""
    lines, found = by_score(results)[::-1], _cards(results)
    best, pilot = lines[0], next((line for line in lines if line["name"] == "pilot"), None)
    tiles = {f"score of the best variant ({best['name']})": decimal(best["score"]),
             "score of the base model": decimal(results["base"]["score"])}
    if pilot is not None and pilot is not best:
        tiles["score of Pilot"] = decimal(pilot["score"])
    tiles |= {"for all variants": duration(results["seconds_of_all"])}
    if results["seconds_of_tuning"]:
        tiles["for tuning"] = duration(results["seconds_of_tuning"])
    description = (f"{counted(len(lines), 'variant')} with {counted(results['seeds'], 'seed')} each, "
                   f"{counted(results['config']['federation']['rounds'], 'round')}, scored on the {results['split']} "
                   f"split of {counted(len(tasks_of(results)), 'task')}: {listed(tasks_of(results), 8)}")
    head, *rows = score_rows(results)
    rates = None
    if results.get("rates"):
        rates_head, *rates_rows = tuning_rows(results)
        rates = Table(rates_head, rates_rows)
    details = detail_rows(results)
    return render("comparison.html.jinja", found, title=results["name"], description=description, tiles=tiles,
                  cards=found, headline=cards.headline(results), numbers=Table(head, rows),
                  explanations=explanations(results), rates=rates, warnings=results.get("warnings", []),
                  details=Table(details[0], details[1:]) if details else None,
                  config_text=yaml.safe_dump(results["config"], sort_keys=False))


def write_comparison_report(path: str | Path, out: Path) -> list[Path]:
    """Writes a comparison's HTML page and its figures as SVG files; returns the files, the page first.

    Args:
        path: the folder of a comparison, or its `results.json`.
        out: the HTML file; the figures are written into the folder `out` without its suffix.

    Raises:
        InputError: `path` is not what `compare` writes.
    """
    return write_page(out, comparison_page(read_comparison(path)))
