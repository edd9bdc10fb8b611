"""Makes the HTML page about one or several runs: what they have written and what the models of finished runs answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from pilot_jax.data.given import PREFIX
from pilot_jax.evaluation.personalised import mean_score
from pilot_jax.report import charts
from pilot_jax.report.probes import Example, Inside, look_inside
from pilot_jax.report.record import RunRecord, read_run
from pilot_jax.report.rendering import Card, Page, Table, decimal, figure_card, render, write_page
from pilot_jax.report.run_cards import inside_cards, run_cards


@dataclasses.dataclass(frozen=True)
class Section:
    """The part of the page about one run."""

    name: str
    description: str
    tiles: dict[str, str]  # main numbers by label; empty if the run has not ended
    missing: str  # why there are no answers; "" if there are some, or if none were asked for
    cards: Sequence[Card]
    examples: Sequence[Example]
    config: str


def _score_table(runs: Sequence[RunRecord]) -> Table:
    """Returns the table of every client's score in each run, with the mean of each task."""
    task_of = {c: t for r in runs for c, t in r.task_of.items()}
    base = runs[0].summary["score_base_by_client"]
    rows = []
    for task in dict.fromkeys(sorted(task_of.values())):
        clients = sorted(c for c in task_of if task_of[c] == task)
        rows += [[c, task, decimal(base.get(c)), *(decimal(r.summary["score_by_client"].get(c)) for r in runs)]
                 for c in clients]
        rows.append([f"{task}: mean", task, decimal(runs[0].summary["score_base_by_task"].get(task)),
                     *(decimal(r.summary["score_by_task"].get(task)) for r in runs)])
    return Table(["client", "task", "base model", *(r.name for r in runs)], rows)


def _score_cards(runs: Sequence[RunRecord]) -> list[Card]:
    """Returns the figures that show all runs together."""
    cards, ended = [], [r for r in runs if r.summary]
    if any(r.summary["score_by_client"] for r in ended):
        means = ", ".join(f"{decimal(mean_score(list(r.summary['score_by_client'].values())))} ({r.name})"
                          for r in ended)
        cards.append(figure_card(
            "scores", "Score of each client's personalised model on its own test data",
            f"Scores of {len(ended[0].summary['score_by_client'])} clients; mean {means}", charts.scores(ended),
            _score_table(ended)))
    validated = [r for r in runs if r.validation]
    if validated:
        cards.append(figure_card("validation", "Mean validation score after each scored round",
                                 "Mean validation score by round.", charts.over_rounds(validated)))
    return cards


def _without_answers(run: RunRecord) -> str:
    """Returns why the page has no answers of a finished run's models; "" if it can have them."""
    if not run.summary["score_by_client"]:
        return ("The data have no test samples, so there are no scores and no answers. Name the split of samples, or "
                "set data.hold_out.test, such as 0.1.")
    if run.config["data"]["path"].startswith(PREFIX):
        return "The samples were given in Python, so this page has no answers of the models."
    return ""


def _description(run: RunRecord) -> str:
    return (f"Strategy {run.strategy}; {len(run.task_of)} clients; tasks: {', '.join(run.tasks)}; "
            f"rounds: {run.config['federation']['rounds']}; seed: {run.config['system']['seed']}")


def _tiles(run: RunRecord) -> dict[str, str]:
    """Returns the main numbers of the summary by label; an empty dict if the run has not ended."""
    s = run.summary
    if not s:
        return {}
    scores = {"test score, mean over clients": decimal(s["score_mean"]),
              "test score of the base model": decimal(s["score_base"])}
    values = {**(scores if s["score_by_client"] else {"test score": "no test data"}),
              **{title: decimal(s[key]) for title, key in (
                  ("test score of the common model", "score_common"),
                  ("test score after fine-tuning", "score_finetuned")) if s.get(key) is not None},
              "client steps": f"{s['client_steps']:,}",
              "client steps per second": decimal(s["client_steps_per_second"], 1),
              "MB uploaded / downloaded": f"{s['bytes_up'] / 1e6:.1f} / {s['bytes_down'] / 1e6:.1f}",
              "seconds in total / of compilation": f"{s['wall_seconds']:.0f} / {s['compile_seconds']:.0f}",
              "peak memory": f"{s['peak_memory_bytes'] / 1e9:.2f} GB"}
    if s.get("quarantined"):
        values["refused uploads"] = str(s["quarantined"])
    if s.get("epsilon"):
        values["ε of a client's uploads (differential privacy)"] = f"{s['epsilon']:.3g}"
    return values


def _overview(runs: Sequence[RunRecord]) -> Table:
    """Returns the table with one row for each run."""
    rows = []
    for run in runs:
        s = run.summary
        cost = (f"{s['bytes_up'] / 1e6:.1f}", f"{s['bytes_down'] / 1e6:.1f}", f"{s['wall_seconds']:.0f}") if s else (
            "–", "–", "–")
        rows.append([run.name, run.strategy, decimal(s.get("score_mean")), decimal(s.get("score_base")), *cost])
    return Table(["run", "strategy", "test score", "base model", "MB uploaded", "MB downloaded", "seconds"], rows)


def runs_page(runs: Sequence[RunRecord], look: Callable[[RunRecord], Inside] = lambda run: Inside()) -> Page:
    """Returns the HTML page of one or several runs; `look` returns what the models of a run answer."""
    several, shared, sections = len(runs) > 1, _score_cards(runs), []
    for number, run in enumerate(runs, 1):
        inside, prefix = look(run), f"{number}-" if several else ""
        cards = run_cards(run, prefix) + inside_cards(run, inside, prefix)
        sections.append(Section(run.name, _description(run), _tiles(run),
                                _without_answers(run) if run.summary else "", cards if several else shared + cards,
                                inside.examples, run.config_text))
    return render("runs.html.jinja", [*shared, *(card for section in sections for card in section.cards)],
                  title=f"{len(runs)} runs" if several else runs[0].name, sections=sections,
                  overview=_overview(runs) if several else None, cards=shared if several else [])


def write_report(folders: Sequence[str | Path], out: Path, examples: int, prompts: int = 8) -> list[Path]:
    """Writes the HTML page about runs and its figures as PNG files; returns the files, the page first.

    Args:
        folders: run directories, finished or not.
        out: the HTML file; the figures are written into the folder `out` without its suffix.
        examples: number of answers shown per task; with 0 no model is loaded.
        prompts: number of each client's test prompts that every model answers, to score each model on every task.

    Raises:
        InputError: a folder is not a run directory, or matplotlib is not installed.
    """
    charts.pyplot()
    runs = [read_run(folder) for folder in folders]

    def look(run: RunRecord) -> Inside:
        if not examples or not run.summary or _without_answers(run):
            return Inside()
        return look_inside(run.folder, examples, prompts)

    return write_page(out, runs_page(runs, look))
