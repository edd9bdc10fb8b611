"""The page: one HTML file that asks for nothing from anywhere, and each figure as PNG beside it."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pilot_jax.federation.examination import mean_score
from pilot_jax.report import charts
from pilot_jax.report.examples import Example
from pilot_jax.report.record import RunRecord

STYLE = """
:root{color-scheme:light dark;--ground:#fbfaf8;--card:#fff;--ink:#1b1f24;--soft:#5b6470;--line:#dedbd5;--accent:#1f62b5}
@media (prefers-color-scheme:dark){:root{--ground:#14161a;--card:#1c1f25;--ink:#e8e6e1;--soft:#a2a9b4;--line:#343943;
--accent:#7db2ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:20px 16px 60px}
h1{font-size:1.5rem;line-height:1.25;margin:.2em 0}h2{font-size:1.2rem;margin:2.2em 0 .6em}
h3{font-size:.95rem;margin:0 0 .5em}main>h3{margin-top:1.8em}p{margin:.3em 0}.soft{color:var(--soft)}
a{color:var(--accent)}:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.tiles,.cards{display:grid;gap:12px}
.tiles{grid-template-columns:repeat(auto-fit,minmax(140px,1fr));margin:14px 0}
.cards{grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));align-items:start}
.tile,.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px;min-width:0}
.tile b{display:block;font-size:1.15rem;white-space:nowrap;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.85rem}
.card svg{display:block;width:100%;height:auto;max-width:480px;color:var(--ink)}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:3px 10px 3px 0;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{font-weight:600}
details{margin-top:8px}summary{cursor:pointer;color:var(--accent);font-size:.85rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.8rem}
.said{display:flex;gap:12px}.said img{width:96px;height:96px;object-fit:contain;image-rendering:pixelated;
border:1px solid var(--line);border-radius:4px;flex:none}.said div{min-width:0;overflow-wrap:anywhere;font-size:.88rem}
nav{font-size:.9rem}nav a{margin-right:14px}
@media print{:root{--ground:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#bbb;--accent:#000}
body{font-size:11px}nav,summary{display:none}.card,.tile{break-inside:avoid}.cards{grid-template-columns:1fr 1fr}}
"""


def _text(value: Any) -> str:
    return html.escape(str(value))


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{_text(c)}</th>' for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{_text(v)}</td>" for v in row) + "</tr>" for row in rows)
    return f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _tiles(values: Mapping[str, str]) -> str:
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><b>{_text(v)}</b><span>{_text(k)}</span></div>' for k, v in values.items()) + "</div>"


class _Figures:
    """Cards with a figure each; keeps the PNGs."""

    def __init__(self) -> None:
        self.pngs: dict[str, bytes] = {}

    def card(self, name: str, title: str, alt: str, figure: Any, table: str = "") -> str:
        picture = charts.svg(figure, name, alt)
        self.pngs[name] = charts.png(figure)
        charts.pyplot().close(figure)
        more = f"<details><summary>As a table</summary>{table}</details>" if table else ""
        return f'<section class="card"><h3>{_text(title)}</h3>{picture}{more}</section>'


def _score_table(runs: Sequence[RunRecord]) -> str:
    task_of = {c: t for r in runs for c, t in r.task_of.items()}
    base = runs[0].summary["score_base_by_client"]
    rows = []
    for task in dict.fromkeys(sorted(task_of.values())):
        clients = sorted(c for c in task_of if task_of[c] == task)
        rows += [[c, task, _number(base.get(c)), *(_number(r.summary["score_by_client"].get(c)) for r in runs)]
                 for c in clients]
        rows.append([f"{task}: mean", task, _number(runs[0].summary["score_base_by_task"].get(task)),
                     *(_number(r.summary["score_by_task"].get(task)) for r in runs)])
    return _table(["client", "task", "base", *(r.name for r in runs)], rows)


def _of_run(run: RunRecord, prefix: str, figures: _Figures) -> list[str]:
    cards = []
    if run.updates:
        cards.append(figures.card(f"{prefix}losses", "Loss of each phase, a line per client",
                                  f"Mean training loss of {len(run.task_of)} clients over the phases.",
                                  charts.losses(run), _table(
            ["phase", "client", "task", "loss", "last step's"],
            [[f"{u['round']} {u['phase']}", u["client"], u["task"], _number(u["loss"]), _number(u["last_loss"])]
             for u in run.updates[-400:]])))
    shown = run.mixing if len(run.mixing) <= 6 else [*run.mixing[:2], *run.mixing[-4:]]
    for number, mixing in enumerate(shown):
        near = float(np.mean(mixing.effective_neighbors))
        table = _table(["client", *mixing.clients], [[c, *(f"{w:.2f}" for w in row)] for c, row in zip(
            mixing.clients, mixing.weights, strict=True)]) if len(mixing.clients) <= charts.MOST_NAMES else ""
        cards.append(figures.card(
            f"{prefix}mixing-{number + 1}", f"Who received how much of whom: {mixing.name}; {near:.2f} effective "
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
                                  _table(["phase", "s", "client steps", "devices waited, s"], [
                                      [f"{p['round']} {p['phase']}", _number(p["seconds"], 1), str(p["client_steps"]),
                                       _number(p.get("waited_seconds"), 2)] for p in run.phases])))
    return cards


def _grid(cards: Sequence[str]) -> str:
    return '<div class="cards">' + "".join(cards) + "</div>" if cards else ""


def _what(run: RunRecord) -> str:
    return (f'<p class="soft">{_text(run.config.strategy.name)}: {len(run.task_of)} clients, tasks '
            f"{_text(', '.join(run.tasks))}; {run.config.federation.rounds} rounds, seed {run.config.system.seed}</p>")


def _run_tiles(run: RunRecord) -> str:
    s = run.summary
    if not s:
        return "<p>This run has not ended yet: no scores.</p>"
    values = {"score, mean over clients": _number(s["score_mean"]), "of the base": _number(s["score_base"]),
              "client steps": f"{s['client_steps']:,}", "client steps a second": f"{s['client_steps_per_second']:.1f}",
              "sent up / down, MB": f"{s['bytes_up'] / 1e6:.1f} / {s['bytes_down'] / 1e6:.1f}",
              "s in all / compiling": f"{s['wall_seconds']:.0f} / {s['compile_seconds']:.0f}",
              "peak memory": f"{s['peak_memory_bytes'] / 1e9:.2f} GB"}
    if s.get("quarantined"):
        values["uploads refused"] = str(s["quarantined"])
    if s.get("epsilon"):
        values["ε of the uploads"] = f"{s['epsilon']:.3g}"
    return _tiles(values)


def _said(items: Sequence[Example]) -> str:
    cards = []
    for e in items:
        image = f'<img src="{e.image}" alt="What {_text(e.client)} was shown">' if e.image else ""
        cards.append(f'<section class="card said">{image}<div><p class="soft">{_text(e.client)}</p>'
                     f'<p>{_text(e.question)}</p><p><b>{_text(e.answer) or "(nothing)"}</b></p>'
                     f'<p class="soft">expected: {_text(e.references[0])}</p></div></section>')
    return _grid(cards)


def page(runs: Sequence[RunRecord], asked: Callable[[RunRecord], list[Example]] = lambda run: []
         ) -> tuple[str, dict[str, bytes]]:
    """(HTML, PNGs by name). `asked` gives the answers that are shown of a run."""
    figures, ended = _Figures(), [r for r in runs if r.summary]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = [f"<h1>{_text(title)}</h1>"]
    if len(runs) > 1:
        parts.append("<nav aria-label='Runs'>" + "".join(
            f'<a href="#run-{i}">{_text(r.name)}</a>' for i, r in enumerate(runs)) + "</nav>")
        parts.append(_table(["run", "strategy", "score", "base", "MB up", "MB down", "s"], [
            [r.name, r.config.strategy.name, _number(r.summary.get("score_mean")), _number(r.summary.get("score_base")),
             *(("–",) * 3 if not r.summary else (f"{r.summary['bytes_up'] / 1e6:.1f}",
               f"{r.summary['bytes_down'] / 1e6:.1f}", f"{r.summary['wall_seconds']:.0f}"))] for r in runs]))
    if len(runs) == 1:
        parts += [_what(runs[0]), _run_tiles(runs[0])]
    cards = []
    if ended:
        cards.append(figures.card("scores", "Score of each client's own model, on its held-out data",
                                  f"Scores of {len(ended[0].summary['score_by_client'])} clients; mean "
                                  + ", ".join(f"{_number(mean_score(list(r.summary['score_by_client'].values())))} "
                                              f"({r.name})" for r in ended), charts.scores(ended), _score_table(ended)))
    if any(r.validation for r in runs):
        cards.append(figures.card("validation", "Validation score over rounds", "Mean validation score by round.",
                                  charts.over_rounds([r for r in runs if r.validation])))
    if len(runs) == 1:
        parts.append(_grid(cards + _of_run(runs[0], "", figures)))
    else:
        parts.append(_grid(cards))
    for number, run in enumerate(runs):
        if len(runs) > 1:
            parts += [f'<h2 id="run-{number}">{_text(run.name)}</h2>{_what(run)}', _run_tiles(run),
                      _grid(_of_run(run, f"{number + 1}-", figures))]
        if items := asked(run):
            parts.append("<h3>What the models say</h3>" + _said(items))
        parts.append(f"<details><summary>Config</summary><pre>{_text(run.config.to_yaml())}</pre></details>")
    body = "\n".join(parts)
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width,initial-scale=1"><title>{_text(title)} · pilot-jax</title><link rel="icon" '
            f'href="data:,"><style>{STYLE}</style></head><body><main>{body}</main></body></html>', figures.pngs)


def write_report(folders: Sequence[str | Path], out: Path, count: int) -> list[Path]:
    """Write the page and, in a folder of its name, the PNGs; what was written.

    Args:
        count: answers shown of each task; 0 loads no model.

    Raises:
        InputError: a folder is no run's, or matplotlib is not installed.
    """
    from pilot_jax.report.examples import examples
    from pilot_jax.report.record import read_run

    charts.pyplot()
    runs = [read_run(folder) for folder in folders]
    text, pngs = page(runs, lambda run: examples(run.folder, count) if count and run.summary else [])
    pictures = out.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    for name, data in pngs.items():
        (pictures / f"{name}.png").write_bytes(data)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(out)
    return [out, *(pictures / f"{name}.png" for name in pngs)]
