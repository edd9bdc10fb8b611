"""The page of runs: what they wrote, and, where a run has ended, what its models do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pilot_jax.compare.page import comparison_page, is_comparison, read_comparison
from pilot_jax.errors import InputError
from pilot_jax.evaluation.personalised import mean_score
from pilot_jax.report import charts
from pilot_jax.report.parts import Figures, decimal, document, escaped, grid, table_of, tiles, write
from pilot_jax.report.probes import Example, Inside, look_inside
from pilot_jax.report.record import RunRecord, read_run


def _score_table(runs: Sequence[RunRecord]) -> str:
    task_of = {c: t for r in runs for c, t in r.task_of.items()}
    base = runs[0].summary["score_base_by_client"]
    rows = []
    for task in dict.fromkeys(sorted(task_of.values())):
        clients = sorted(c for c in task_of if task_of[c] == task)
        rows += [[c, task, decimal(base.get(c)), *(decimal(r.summary["score_by_client"].get(c)) for r in runs)]
                 for c in clients]
        rows.append([f"{task}: mean", task, decimal(runs[0].summary["score_base_by_task"].get(task)),
                     *(decimal(r.summary["score_by_task"].get(task)) for r in runs)])
    return table_of(["client", "task", "base", *(r.name for r in runs)], rows)


def _of_run(run: RunRecord, prefix: str, figures: Figures) -> list[str]:
    cards = []
    if run.updates:
        cards.append(figures.card(f"{prefix}losses", "Loss of each phase, a line per client",
                                  f"Mean training loss of {len(run.task_of)} clients over the phases.",
                                  charts.losses(run), table_of(
            ["phase", "client", "task", "loss", "last step's"],
            [[f"{u['round']} {u['phase']}", u["client"], u["task"], decimal(u["loss"]), decimal(u["last_loss"])]
             for u in run.updates[-400:]])))
    shown = run.mixing if len(run.mixing) <= 6 else [*run.mixing[:2], *run.mixing[-4:]]
    for i, mixing in enumerate(shown):
        near = float(np.mean(mixing.effective_neighbors))
        table = table_of(["client", *mixing.clients], [[c, *(f"{w:.2f}" for w in row)] for c, row in zip(
            mixing.clients, mixing.weights, strict=True)]) if len(mixing.clients) <= charts.MOST_NAMES else ""
        cards.append(figures.card(
            f"{prefix}mixing-{i + 1}", f"Who received how much of whom: {mixing.name}; {near:.2f} effective "
            "neighbours", f"Mixing matrix of {len(mixing.clients)} clients in {mixing.name}; effective neighbours "
            f"{near:.2f} on average, oneself included.", charts.heat_map(mixing), table))
    last = next((m for m in reversed(run.mixing) if m.distances is not None and len(m.clients) > 2
                 and np.isfinite(m.distances).all()), None)
    if last is not None:
        cards.append(figures.card(f"{prefix}map", f"Clients by the distance of their LoRA: {last.name}",
                                  f"Two-dimensional map of {len(last.clients)} clients.", charts.client_map(run, last)))
    if any("bytes_up_by_subtree" in p for p in run.phases):
        cards.append(figures.card(f"{prefix}traffic", "Bytes by subtree", "Megabytes sent up and down by subtree.",
                                  charts.traffic(run)))
    if run.phases:
        cards.append(figures.card(f"{prefix}times", "Seconds by phase", "Seconds of each phase.", charts.times(run),
                                  table_of(["phase", "s", "client steps", "devices waited, s"], [
                                      [f"{p['round']} {p['phase']}", decimal(p["seconds"], 1), str(p["client_steps"]),
                                       decimal(p.get("waited_seconds"), 2)] for p in run.phases])))
    return cards


def _what(run: RunRecord) -> str:
    return (f'<p class="soft">{escaped(run.config.strategy.name)}: {len(run.task_of)} clients, tasks '
            f"{escaped(', '.join(run.tasks))}; "
            f"{run.config.federation.rounds} rounds, seed {run.config.system.seed}</p>")


def _run_tiles(run: RunRecord) -> str:
    s = run.summary
    if not s:
        return "<p>This run has not ended yet: no scores.</p>"
    values = {"score, mean over clients": decimal(s["score_mean"]), "of the base": decimal(s["score_base"]),
              "client steps": f"{s['client_steps']:,}", "client steps a second": f"{s['client_steps_per_second']:.1f}",
              "sent up / down, MB": f"{s['bytes_up'] / 1e6:.1f} / {s['bytes_down'] / 1e6:.1f}",
              "s in all / compiling": f"{s['wall_seconds']:.0f} / {s['compile_seconds']:.0f}",
              "peak memory": f"{s['peak_memory_bytes'] / 1e9:.2f} GB"}
    if s.get("quarantined"):
        values["uploads refused"] = str(s["quarantined"])
    if s.get("epsilon"):
        values["ε of the uploads"] = f"{s['epsilon']:.3g}"
    return tiles(values)


def _said(items: Sequence[Example]) -> str:
    cards = []
    for e in items:
        image = f'<img src="{e.image}" alt="What {escaped(e.client)} was shown">' if e.image else ""
        cards.append(f'<section class="card said">{image}<div><p class="soft">{escaped(e.client)}</p>'
                     f'<p>{escaped(e.question)}</p><p><b>{escaped(e.answer) or "(nothing)"}</b></p>'
                     f'<p class="soft">expected: {escaped(e.references[0])}</p></div></section>')
    return grid(cards)


def _able(run: RunRecord, inside: Inside, prefix: str, figures: Figures) -> list[str]:
    """What its models can do, and whom their routers ask."""
    cards = []
    if inside.abilities is not None:
        rows = [*inside.abilities.models, "base"]
        cards.append(figures.card(
            f"{prefix}abilities", "What each client's model can do on every task's data, and what is left of what the "
            f"base could: {inside.abilities.count} answers a client; the base, all", f"Scores of {len(rows)} models on "
            f"{', '.join(inside.abilities.columns)}.", charts.cells(
                inside.abilities.scores, rows, inside.abilities.columns, "scored on", "model of"),
            table_of(["model of", *inside.abilities.columns], [
                [name, *(decimal(None if np.isnan(v) else v, 2) for v in row)]
                for name, row in zip(rows, inside.abilities.scores, strict=True)])))
    if inside.routing:
        names = list(inside.routing)
        weights = np.stack([inside.routing[n] for n in names])
        cards.append(figures.card(
            f"{prefix}routing", "Whose expert each client's router asks: mean weight over the tokens of its own test "
            "images", f"Router weights of {len(names)} clients over {len(run.tasks)} tasks.",
            charts.cells(weights, names, run.tasks, "expert of", "router of"),
            table_of(["router of", *run.tasks], [[n, *(f"{w:.2f}" for w in row)]
                                                 for n, row in zip(names, weights, strict=True)])))
    return cards


def page(runs: Sequence[RunRecord], look: Callable[[RunRecord], Inside] = lambda run: Inside()
         ) -> tuple[str, dict[str, bytes]]:
    """(HTML, PNGs by name). `look` gives what the models of a run do."""
    figures, ended = Figures(), [r for r in runs if r.summary]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts, cards = [f"<h1>{escaped(title)}</h1>"], []
    if len(runs) > 1:
        parts.append("<nav aria-label='Runs'>" + "".join(
            f'<a href="#run-{i}">{escaped(r.name)}</a>' for i, r in enumerate(runs)) + "</nav>")
        parts.append(table_of(["run", "strategy", "score", "base", "MB up", "MB down", "s"], [
            [r.name, r.config.strategy.name, decimal(r.summary.get("score_mean")), decimal(r.summary.get("score_base")),
             *(("–",) * 3 if not r.summary else (f"{r.summary['bytes_up'] / 1e6:.1f}",
               f"{r.summary['bytes_down'] / 1e6:.1f}", f"{r.summary['wall_seconds']:.0f}"))] for r in runs]))
    if ended:
        cards.append(figures.card("scores", "Score of each client's own model, on its held-out data",
                                  f"Scores of {len(ended[0].summary['score_by_client'])} clients; mean "
                                  + ", ".join(f"{decimal(mean_score(list(r.summary['score_by_client'].values())))} "
                                              f"({r.name})" for r in ended), charts.scores(ended), _score_table(ended)))
    if any(r.validation for r in runs):
        cards.append(figures.card("validation", "Validation score over rounds", "Mean validation score by round.",
                                  charts.over_rounds([r for r in runs if r.validation])))
    if len(runs) > 1:
        parts.append(grid(cards))
    for i, run in enumerate(runs):
        inside, prefix = look(run), f"{i + 1}-" if len(runs) > 1 else ""
        if prefix:
            parts.append(f'<h2 id="run-{i}">{escaped(run.name)}</h2>')
        its = _of_run(run, prefix, figures) + _able(run, inside, prefix, figures)
        parts += [_what(run), _run_tiles(run), grid(its if prefix else cards + its)]
        if inside.examples:
            parts.append("<h3>What the models say</h3>" + _said(inside.examples))
        parts.append(f"<details><summary>Config</summary><pre>{escaped(run.config.to_yaml())}</pre></details>")
    return document(title, parts), figures.pngs


def write_report(folders: Sequence[str | Path], out: Path, count: int, asked: int = 8) -> list[Path]:
    """Write the page of runs, or of a comparison, and, in a folder of its name, the PNGs; what was written.

    Args:
        folders: run directories; or the folder of one comparison, or its `results.json`.
        count: answers shown of each task; 0 loads no model.
        asked: of each client's prompts, how many every model answers for its abilities.

    Raises:
        InputError: a folder is neither, or matplotlib is not installed.
    """
    charts.pyplot()
    if any(is_comparison(folder) for folder in folders):
        if len(folders) > 1:
            raise InputError("report: a comparison has a page of its own. Give one, or runs alone.")
        return write(out, *comparison_page(read_comparison(folders[0])))
    runs = [read_run(folder) for folder in folders]

    def inside(run: RunRecord) -> Inside:
        return look_inside(run.folder, count, asked) if count and run.summary else Inside()

    return write(out, *page(runs, inside))
