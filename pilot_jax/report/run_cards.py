"""The figures of one run, in cards; `prefix` tells the figures of several runs on one page apart."""

from __future__ import annotations

import numpy as np

from pilot_jax.report import charts
from pilot_jax.report.probes import Abilities, Inside
from pilot_jax.report.record import Mixing, RunRecord
from pilot_jax.report.rendering import Card, Table, decimal, figure_card

MOST_UPDATES = 400  # the last lines of the table of losses that are shown
MOST_MATRICES = 6  # mixing matrices; of more, the first two and the last four


def run_cards(run: RunRecord, prefix: str) -> list[Card]:
    """Returns the figures of what the run has written; those for which there is nothing yet are left out."""
    cards = []
    if run.updates:
        cards.append(_loss_card(run, prefix))
    shown = run.mixing if len(run.mixing) <= MOST_MATRICES else [*run.mixing[:2], *run.mixing[-4:]]
    cards += [_mixing_card(mixing, f"{prefix}mixing-{number}") for number, mixing in enumerate(shown, 1)]
    last = next((m for m in reversed(run.mixing) if m.distances is not None and len(m.clients) > 2
                 and np.isfinite(m.distances).all()), None)
    if last is not None:
        cards.append(figure_card(f"{prefix}map", f"Clients by the distance of their LoRA: {last.name}",
                                 f"Two-dimensional map of {len(last.clients)} clients.", charts.client_map(run, last)))
    if any("bytes_up_by_subtree" in p for p in run.phases):
        cards.append(figure_card(f"{prefix}traffic", "Bytes by subtree", "Megabytes sent up and down by subtree.",
                                 charts.traffic(run)))
    if run.phases:
        rows = [[f"{p['round']} {p['phase']}", decimal(p["seconds"], 1), str(p["client_steps"]),
                 decimal(p.get("waited_seconds"), 2)] for p in run.phases]
        cards.append(figure_card(f"{prefix}times", "Seconds by phase", "Seconds of each phase.", charts.times(run),
                                 Table(["phase", "s", "client steps", "devices waited, s"], rows)))
    return cards


def _loss_card(run: RunRecord, prefix: str) -> Card:
    rows = [[f"{u['round']} {u['phase']}", u["client"], u["task"], decimal(u["loss"]), decimal(u["last_loss"])]
            for u in run.updates[-MOST_UPDATES:]]
    return figure_card(f"{prefix}losses", "Loss of each phase, a line per client",
                       f"Mean training loss of {len(run.task_of)} clients over the phases.", charts.losses(run),
                       Table(["phase", "client", "task", "loss", "last step's"], rows))


def _mixing_card(mixing: Mixing, name: str) -> Card:
    neighbors = float(np.mean(mixing.effective_neighbors))
    table = Table(["client", *mixing.clients], _weight_rows(mixing.clients, mixing.weights)
                  ) if len(mixing.clients) <= charts.MOST_NAMES else None
    return figure_card(
        name, f"Who received how much of whom: {mixing.name}; {neighbors:.2f} effective neighbours",
        f"Mixing matrix of {len(mixing.clients)} clients in {mixing.name}; effective neighbours {neighbors:.2f} on "
        "average, oneself included.", charts.heat_map(mixing), table)


def _weight_rows(names: list[str], weights: np.ndarray) -> list[list[str]]:
    return [[name, *(f"{w:.2f}" for w in row)] for name, row in zip(names, weights, strict=True)]


def inside_cards(run: RunRecord, inside: Inside, prefix: str) -> list[Card]:
    """Returns the figures of what the run's models can do, and whom their routers consult."""
    cards = []
    if inside.abilities is not None:
        cards.append(_ability_card(inside.abilities, f"{prefix}abilities"))
    if inside.routing:
        names = list(inside.routing)
        weights = np.stack([inside.routing[n] for n in names])
        cards.append(figure_card(
            f"{prefix}routing", "Whose expert each client's router asks: mean weight over the tokens of its own test "
            "images", f"Router weights of {len(names)} clients over {len(run.tasks)} tasks.",
            charts.cells(weights, names, run.tasks, "expert of", "router of"),
            Table(["router of", *run.tasks], _weight_rows(names, weights))))
    return cards


def _ability_card(abilities: Abilities, name: str) -> Card:
    models = [*abilities.models, "base"]
    rows = [[model, *(decimal(None if np.isnan(v) else v, 2) for v in row)]
            for model, row in zip(models, abilities.scores, strict=True)]
    return figure_card(
        name, "What each client's model can do on every task's data, and what is left of what the base could: "
        f"{abilities.prompts} answers a client; the base, all",
        f"Scores of {len(models)} models on {', '.join(abilities.columns)}.",
        charts.cells(abilities.scores, models, abilities.columns, "scored on", "model of"),
        Table(["model of", *abilities.columns], rows))
