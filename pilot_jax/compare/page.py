"""What a comparison leaves behind: `results.json`, its tables in Markdown, plots, and the report's page."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pilot_jax.errors import InputError
from pilot_jax.report import charts
from pilot_jax.report.parts import Figures, decimal, document, escaped, grid, table_of, tiles
from pilot_jax.storage import read_json


def _difference(line: dict[str, Any]) -> str:
    d = line.get("difference")
    if d is None:
        return "–"
    if d["low"] is None:
        return f"{d['mean']:+.3f}"
    return f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]{' *' if d['significant'] else ''}"


def _score(line: dict[str, Any]) -> str:
    return decimal(line["score"]) + ("" if line["standard_error"] is None else f" ± {line['standard_error']:.3f}")


def rows_of(results: dict[str, Any]) -> list[list[str]]:
    """Head, the variants from best to worst, the base: what the Markdown and the report's page show."""
    lines = results["variants"]
    tasks = sorted({task for line in lines for task in line["by_task"]})
    rows = [["", "score", *tasks, "Pilot − it [95 %]", "neighbours", "base's captions", "rates ×", "MB up", "MB down",
             "s"]]
    for line in sorted(lines, key=lambda one: -one["score"]):
        name = line["name"] + (f" ({line['diverged']} diverged)" if line["diverged"] else "")
        name += f" ({line['quarantined']} uploads refused)" if line.get("quarantined") else ""
        up, down = (None if line[k] is None else line[k] / 1e6 for k in ("bytes_up", "bytes_down"))
        rows.append([name, _score(line), *(decimal(line["by_task"].get(t)) for t in tasks), _difference(line),
                     decimal(line["effective_neighbors"], 1), decimal(line["base_captions"], 2),
                     f"{line['rate_factor']:g}", decimal(up, 1), decimal(down, 1), f"{line['wall_seconds']:.0f}"])
    rows.append(["base", decimal(results["base"]["score"]), *[""] * len(tasks), "", "",
                 decimal(results["base"]["base_captions"], 2), "", "", "", ""])
    return rows


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))


def table(results: dict[str, Any]) -> str:
    """`rows_of` as Markdown."""
    *rows, base = rows_of(results)
    return _markdown([*rows, [f"*{base[0]}*", *base[1:]]])


def tuning_table(results: dict[str, Any]) -> str:
    factors = [f"{f:g}" for f in results["factors"]]
    rows = [["", *(f"× {f}" for f in factors)]]
    for family, rate in results["rates"].items():
        best = f"{rate['factor']:g}"
        rows.append([family, *(f"**{rate['validation'][f]:.3f}**" if f == best else f"{rate['validation'][f]:.3f}"
                               for f in factors)])
    return _markdown(rows)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _plot(results: dict[str, Any], path: Path) -> None:
    pyplot = _pyplot()
    lines = sorted(results["variants"], key=lambda one: one["score"])
    tasks = sorted({task for line in lines for task in line["by_task"]})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.8 + 0.32 * len(lines)), sharey=True,
                                            layout="constrained", width_ratios=(3, 2))
    places = range(len(lines))
    colours = ["#c2410c" if line["name"] == "pilot" else "#64748b" for line in lines]
    left.barh(places, [line["score"] for line in lines], xerr=[line["standard_error"] or 0 for line in lines],
              color=colours, height=0.65, error_kw={"ecolor": "#0f172a", "lw": 1})
    for task, mark in zip(tasks, "osD^v<>", strict=False):
        left.scatter([line["by_task"].get(task, 0) for line in lines], places, marker=mark, s=16, zorder=3,
                     facecolor="white", edgecolor="#0f172a", lw=0.8, label=task)
    left.set_yticks(places, [line["name"] for line in lines])
    left.set_xlabel("score: mean over clients and seeds; marks: tasks")
    left.set_xlim(0, 1)
    left.legend(loc="lower right", fontsize=8)
    for place, line in zip(places, lines, strict=True):
        d = line.get("difference")
        if d is not None:
            low, high = (d["mean"], d["mean"]) if d["low"] is None else (d["low"], d["high"])
            right.plot([low, high], [place, place], color="#0f172a", lw=1)
            right.plot(d["mean"], place, "o", color="#c2410c" if d["significant"] else "#94a3b8", ms=5)
    right.axvline(0, color="#94a3b8", lw=1)
    right.set_xlabel("Pilot − variant, paired by seed, 95 % interval")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def sweep_table(key: str, values: Sequence[str], done: Sequence[dict[str, Any]]) -> str:
    """Score of each variant (rows) at each value of a config key, and where Pilot's difference excludes 0: *."""
    names = [line["name"] for line in done[0]["variants"]]
    rows = [["", *(f"{key} = {value}" for value in values)]]
    for name in names:
        cells = []
        for results in done:
            line = next(one for one in results["variants"] if one["name"] == name)
            star = " *" if line.get("difference", {}).get("significant") else ""
            cells.append(_score(line) + star)
        rows.append([name, *cells])
    return _markdown(rows)


def _plot_sweep(key: str, values: Sequence[str], done: Sequence[dict[str, Any]], path: Path) -> None:
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name in (line["name"] for line in done[0]["variants"]):
        lines = [next(one for one in results["variants"] if one["name"] == name) for results in done]
        axes.errorbar(range(len(values)), [one["score"] for one in lines],
                      yerr=[one["standard_error"] or 0 for one in lines], marker="o", ms=4, capsize=2, label=name,
                      lw=2.2 if name == "pilot" else 1.2)
    axes.set_xticks(range(len(values)), values)
    axes.set_xlabel(key)
    axes.set_ylabel("score: mean over clients and seeds")
    axes.set_ylim(0, 1)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write_sweep(key: str, values: Sequence[str], done: Sequence[dict[str, Any]], out: Path) -> str:
    """`sweep.json`, `sweep.md` and `sweep.png` of comparisons that differ in one key of the config; the table."""
    lines = [{"value": value, "variants": results["variants"], "rates": results["rates"], "base": results["base"],
              "seconds_of_all": results["seconds_of_all"], "seconds_of_tuning": results["seconds_of_tuning"]}
             for value, results in zip(values, done, strict=True)]
    (out / "sweep.json").write_text(json.dumps({"key": key, "values": lines}, indent=1), encoding="utf-8")
    text = sweep_table(key, values, done)
    seconds = sum(line["seconds_of_all"] + line["seconds_of_tuning"] for line in lines)
    (out / "sweep.md").write_text(
        f"Scores on the {done[0]['split']} split, {done[0]['seeds']} seeds, ± standard error; *: the paired difference "
        f"to Pilot excludes 0 (95 %).\n\n{text}\n\n{seconds:.0f} s with tuning.\n", encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is not None:
        _plot_sweep(key, values, done, out / "sweep.png")
    return text


def write_results(results: dict[str, Any], out: Path) -> None:
    """Write what `compare` found into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    text = [f"Scores on the {results['split']} split, {results['seeds']} seeds, ± standard error; the interval is "
            "Student's t over seeds, paired; * excludes 0. neighbours: effective ones, oneself included, in the last "
            "phase.", "", table(results), ""]
    if results["rates"]:
        text += ["Validation score by factor on the config's learning rates (a seed of its own):", "",
                 tuning_table(results), ""]
    text.append(f"{results['seconds_of_all']:.0f} s for the variants, {results['seconds_of_tuning']:.0f} s for tuning, "
                f"on {results['devices']} device(s) of kind {results['device']}.")
    (out / "results.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is not None:
        _plot(results, out / "results.png")


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
