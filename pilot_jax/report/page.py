"""Makes the HTML page about one or several runs: what they have written and what the models of finished runs answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from pilot_jax.data.given import PREFIX
from pilot_jax.report.alone import LOCAL, Alone, command_for_alone, find_alone, gains, outcome, verdict
from pilot_jax.report.overview import config_differences, overview_table, score_card, shared_cards
from pilot_jax.report.probes import Example, Inside, look_inside
from pilot_jax.report.record import RunRecord, read_run
from pilot_jax.report.rendering import Card, Page, decimal, render, write_page
from pilot_jax.report.run_cards import cost_cards, inside_cards, neighbour_cards, training_cards
from pilot_jax.words import change, counted, duration, listed, size


@dataclasses.dataclass(frozen=True)
class Section:
    """The part of the page about one run."""

    name: str
    anchor: str  # prefix of the ids in this part
    description: str
    verdict: Sequence[str]  # sentences; the first is the most important
    command: str  # what to run to see what training alone reaches; "" if that is known
    tiles: dict[str, str]  # main numbers by label; empty if the run has not ended
    missing: str  # why there are no answers; "" if there are some, or if none were asked for
    hero: Card | None  # what each client gained
    training: Sequence[Card]
    neighbours: Sequence[Card]
    inside: Sequence[Card]
    costs: Sequence[Card]
    cost_tiles: dict[str, str]
    examples: Sequence[Example]
    config: str

    def cards(self) -> list[Card]:
        """Returns all figures of this part."""
        return [*([self.hero] if self.hero is not None else []), *self.training, *self.neighbours, *self.inside,
                *self.costs]


def _without_answers(run: RunRecord) -> str:
    """Returns why the page has no answers of a finished run's models; "" if it can have them."""
    if run.summary.get("deployed"):
        return "This is a server's run, whose data are on other machines, so there are no scores and no answers."
    if not run.summary["score_by_client"]:
        return "The data have no test samples, so there are no scores and no answers."
    if run.config["data"]["path"].startswith(PREFIX):
        return "The samples were given in Python, so this page has no answers of the models."
    return ""


def _description(run: RunRecord) -> str:
    return (f"Strategy {run.strategy} · {counted(len(run.task_of), 'client')} · "
            f"{counted(len(run.tasks), 'task')}: {listed(run.tasks, 8)} · "
            f"{counted(run.config['federation']['rounds'], 'round')} · seed {run.config['system']['seed']}")


def _tiles(run: RunRecord, alone: Alone | None) -> dict[str, str]:
    """Returns the main scores by label; an empty dict if the run has not ended."""
    s = run.summary
    if not s or not s["score_by_client"]:
        return {"test score": "no test data"} if s else {}
    values = {"mean test score": decimal(s["score_mean"])}
    over = gains(s["score_by_client"], alone.scores) if alone is not None else None
    if over is not None:
        values["mean gain over training alone"] = change(over.mean, 3)
    values["base model, before training"] = decimal(s["score_base"])
    return values | {title: decimal(s[key]) for title, key in (
        ("common model, without personal parts", "score_common"), ("after fine-tuning", "score_finetuned"))
        if s.get(key) is not None}


def _cost_tiles(run: RunRecord) -> dict[str, str]:
    """Returns what a finished run has cost, by label."""
    s = run.summary
    if not s:
        return {}
    speed = s["client_steps_per_second"]
    values = {"uploaded": size(s["bytes_up"]), "downloaded": size(s["bytes_down"]),
              "client steps": f"{s['client_steps']:,}",
              **({"client steps per second of training": f"{speed:,.1f}"} if speed is not None else {}),
              "in total": duration(s["wall_seconds"]), "of it, compilation": duration(s["compile_seconds"]),
              "peak memory": size(s["peak_memory_bytes"])}
    if s.get("quarantined"):
        values["refused uploads"] = str(s["quarantined"])
    if s.get("epsilon") is not None:
        values["ε of a client's uploads (differential privacy)"] = f"{s['epsilon']:.3g}"
    return values


def _section(run: RunRecord, number: int, several: Sequence[RunRecord], inside: Inside) -> Section:
    """Returns the part of the page about one run; `number` counts from 1 where there are several, and is 0 else."""
    prefix = f"{number}-" if number else ""
    alone = find_alone(run, several)
    scored = bool(run.summary.get("score_by_client"))
    hero = score_card(run, alone) if scored else None
    if hero is not None and number:
        hero = dataclasses.replace(hero, name=f"{prefix}scores")
    unknown = scored and alone is None and run.strategy != LOCAL
    return Section(
        run.name, f"run-{number}", _description(run), verdict(run, alone, inside.prompts),
        command_for_alone(run) if unknown else "", _tiles(run, alone),
        _without_answers(run) if run.summary else "", hero, training_cards(run, prefix),
        neighbour_cards(run, prefix), inside_cards(run, inside, prefix), cost_cards(run, prefix), _cost_tiles(run),
        inside.examples, run.config_text)


def _headline(runs: Sequence[RunRecord]) -> list[str]:
    """Returns what several runs show together, in sentences."""
    ended = [run for run in runs if run.summary.get("score_by_client")]
    if not ended:
        return ["None of these runs has test scores yet."]
    best = max(ended, key=lambda run: run.summary["score_mean"])
    out = [f"{best.name} (strategy {best.strategy}) has the highest mean test score, "
           f"{decimal(best.summary['score_mean'])}; the others have "
           + listed([f"{decimal(run.summary['score_mean'])} ({run.name})" for run in ended if run is not best], 8) + "."
           ] if len(ended) > 1 else []
    for run in ended:
        alone = find_alone(run, runs)
        over = gains(run.summary["score_by_client"], alone.scores) if alone is not None else None
        if over is not None:
            out.append(f"{run.name}: {outcome(over, 'training alone')}")
    return out or [f"Only {best.name} has ended: its mean test score is {decimal(best.summary['score_mean'])}."]


def runs_page(runs: Sequence[RunRecord], look: Callable[[RunRecord], Inside] = lambda run: Inside()) -> Page:
    """Returns the HTML page of one or several runs; `look` returns what the models of a run answer."""
    several = len(runs) > 1
    shared = shared_cards(runs) if several else []
    sections = [_section(run, number * several, runs, look(run)) for number, run in enumerate(runs, 1)]
    return render("runs.html.jinja", [*shared, *(card for section in sections for card in section.cards())],
                  title=counted(len(runs), "run") if several else runs[0].name, sections=sections,
                  overview=overview_table(runs) if several else None, cards=shared,
                  headline=_headline(runs) if several else [],
                  differences=config_differences(runs) if several else None)


def write_report(folders: Sequence[str | Path], out: Path, examples: int, prompts: int = 8) -> list[Path]:
    """Writes the HTML page about runs and its figures as SVG files; returns the files, the page first.

    Args:
        folders: run directories, finished or not.
        out: the HTML file; the figures are written into the folder `out` without its suffix.
        examples: number of right and of wrong answers shown per client; with 0 no model is loaded.
        prompts: number of each client's test prompts that every model answers, to score each model on every task.

    Raises:
        InputError: a folder is not a run directory.
    """
    runs = [read_run(folder) for folder in folders]

    def look(run: RunRecord) -> Inside:
        if not examples or not run.summary or _without_answers(run):
            return Inside()
        return look_inside(run.folder, examples, prompts)

    return write_page(out, runs_page(runs, look))
