"""Makes the figures of one run, in cards; `prefix` makes the names of several runs' figures on one page different."""

from __future__ import annotations

import numpy as np

from pilot_jax.report import charts
from pilot_jax.report.probes import CAPTIONS, Abilities, Inside
from pilot_jax.report.record import Mixing, RunRecord
from pilot_jax.report.rendering import Card, Table, decimal, figure_card

MOST_UPDATES = 400  # most rows in the table of losses; the last ones are shown
MOST_MATRICES = 6  # most mixing matrices; if there are more, the first two and the last four are shown


def run_cards(run: RunRecord, prefix: str) -> list[Card]:
    """Returns the figures of the run's files; a figure without data yet is left out."""
    cards = []
    if run.updates:
        cards.append(_loss_card(run, prefix))
    shown = run.mixing if len(run.mixing) <= MOST_MATRICES else [*run.mixing[:2], *run.mixing[-4:]]
    cards += [_mixing_card(mixing, f"{prefix}mixing-{number}") for number, mixing in enumerate(shown, 1)]
    last = next((m for m in reversed(run.mixing) if m.distances is not None and len(m.clients) > 2
                 and np.isfinite(m.distances).all()), None)
    if last is not None:
        cards.append(figure_card(f"{prefix}map", "Map of the clients, in which distances approximate those between "
                                 f"their uploaded LoRA parameters: {last.name}",
                                 f"Two-dimensional map of {len(last.clients)} clients.", charts.client_map(run, last)))
    if any("bytes_up_by_subtree" in p for p in run.phases):
        cards.append(figure_card(f"{prefix}traffic", "Megabytes uploaded and downloaded, by part of the adapters",
                                 "Megabytes uploaded and downloaded by subtree.", charts.traffic(run)))
    if run.phases:
        rows = [[f"{p['round']} {p['phase']}", decimal(p["seconds"], 1), str(p["client_steps"]),
                 decimal(p.get("waited_seconds"), 2)] for p in run.phases]
        cards.append(figure_card(
            f"{prefix}times", "Seconds of each phase", "Seconds of each phase.", charts.times(run),
            Table(["phase", "seconds", "client steps", "seconds that devices waited for data"], rows)))
    return cards


def _loss_card(run: RunRecord, prefix: str) -> Card:
    rows = [[f"{u['round']} {u['phase']}", u["client"], u["task"], decimal(u["loss"]), decimal(u["last_loss"])]
            for u in run.updates[-MOST_UPDATES:]]
    return figure_card(f"{prefix}losses", "Mean training loss in each phase, one line per client",
                       f"Mean training loss of {len(run.task_of)} clients over the phases.", charts.losses(run),
                       Table(["phase", "client", "task", "mean loss", "loss of the last step"], rows))


def _mixing_card(mixing: Mixing, name: str) -> Card:
    neighbors = float(np.mean(mixing.effective_neighbors))
    table = Table(["client", *mixing.clients], _weight_rows(mixing.clients, mixing.weights)
                  ) if len(mixing.clients) <= charts.MOST_NAMES else None
    return figure_card(
        name, f"Mixing matrix of {mixing.name}: the weight of each client's upload in each client's result. A client "
        f"has {neighbors:.2f} effective neighbours on average, itself included.",
        f"Mixing matrix of {len(mixing.clients)} clients in {mixing.name}; {neighbors:.2f} effective neighbours on "
        "average.", charts.heat_map(mixing), table)


def _weight_rows(names: list[str], weights: np.ndarray) -> list[list[str]]:
    return [[name, *(f"{w:.2f}" for w in row)] for name, row in zip(names, weights, strict=True)]


def inside_cards(run: RunRecord, inside: Inside, prefix: str) -> list[Card]:
    """Returns the figures of the scores of the run's models on every task, and of their router weights."""
    cards = []
    if inside.abilities is not None:
        cards.append(_ability_card(inside.abilities, f"{prefix}abilities"))
    if inside.routing:
        names = list(inside.routing)
        weights = np.stack([inside.routing[n] for n in names])
        cards.append(figure_card(
            f"{prefix}routing", "Weight that each client's router gives to each task's expert: mean over the image "
            "tokens of its own test images", f"Router weights of {len(names)} clients over {len(run.tasks)} tasks.",
            charts.cells(weights, names, run.tasks, "task of the expert", "client of the router"),
            Table(["client", *run.tasks], _weight_rows(names, weights))))
    return cards


def _ability_card(abilities: Abilities, name: str) -> Card:
    models = [*abilities.models, "base model"]
    rows = [[model, *(decimal(None if np.isnan(v) else v, 2) for v in row)]
            for model, row in zip(models, abilities.scores, strict=True)]
    captions = " and on captions like those of the base model's pretraining" if CAPTIONS in abilities.columns else ""
    return figure_card(
        name, f"Score of each client's model on the test data of every task{captions}. Every model answers "
        f"{abilities.prompts} prompt{'s' * (abilities.prompts > 1)} of each client; the base model answers all.",
        f"Scores of {len(models)} models on {', '.join(abilities.columns)}.",
        charts.cells(abilities.scores, models, abilities.columns, "test data", "model"),
        Table(["model", *abilities.columns], rows))
