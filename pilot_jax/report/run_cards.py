"""Makes the figures of one run, in cards; `prefix` makes the names of several runs' figures on one page different."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pilot_jax.report.charts import Axis, Line, Mark, Point, Row, lines_chart, points_chart, rows_chart
from pilot_jax.report.drawing import COLOURS, Key
from pilot_jax.report.mixing_card import mixing_card
from pilot_jax.report.probes import CAPTIONS, Abilities, Inside
from pilot_jax.report.record import Mixing, Record, RunRecord
from pilot_jax.report.rendering import Card, Heat, Table, decimal
from pilot_jax.words import counted, duration, size

MOST_ROWS = 400  # most rows in a table of losses; the last ones are shown


def phase_name(line: Record) -> str:
    """Returns a phase as the axes name it, such as 2·1 for stage 1 of round 2."""
    return f"{line['round']}·{line['phase'].removeprefix('stage')}"


def task_keys(tasks: Sequence[str]) -> dict[str, Key]:
    """Returns the colour and marker of each task."""
    return {task: Key(task, number % COLOURS, number % COLOURS) for number, task in enumerate(tasks)}


def training_cards(run: RunRecord, prefix: str) -> list[Card]:
    """Returns the figures of losses and validation scores; one without data yet is left out."""
    cards = [_loss_card(run, f"{prefix}losses")] if run.updates else []
    if run.validation:
        cards.append(_validation_card(run, f"{prefix}validation"))
    return cards


def _loss_card(run: RunRecord, name: str) -> Card:
    keys, places = task_keys(run.tasks), list(dict.fromkeys(map(phase_name, run.updates)))
    of: dict[str, list[Record]] = {}
    for update in run.updates:
        of.setdefault(update["client"], []).append(update)
    lines = [Line(keys[run.task_of[client]], [
        (places.index(phase_name(u)), u["loss"], f"{client}, round {u['round']} {u['phase']}: loss {u['loss']:.3f}")
        for u in own], thin=len(of) > 12) for client, own in of.items() if run.task_of.get(client) in keys]
    kept = run.updates[-MOST_ROWS:]
    table = Table(["phase", "client", "task", "mean loss", "loss of the last step"],
                  [[f"round {u['round']} {u['phase']}", u["client"], u["task"], decimal(u["loss"]),
                    decimal(u["last_loss"])] for u in kept],
                  left_out=f"The last {MOST_ROWS} of {len(run.updates):,} rows; metrics.jsonl has all."
                  if len(kept) < len(run.updates) else "")
    return Card(name, "Training loss of each client", f"Mean training loss of {counted(len(of), 'client')} in "
                f"{counted(len(places), 'phase')}, one line per client.",
                lines_chart(lines, places, "phase: round·stage" if "stage" in run.updates[0]["phase"] else
                            "round and phase", "mean training loss", [0.0], list(keys.values())), table=table)


def _validation_card(run: RunRecord, name: str) -> Card:
    keys, rounds = task_keys(run.tasks), sorted({v["round"] for v in run.validation})
    groups = {"all clients": run.validation} | {
        task: [v for v in run.validation if run.task_of.get(v["client"]) == task] for task in run.tasks}
    mean = Key("all clients", COLOURS - 1, 0)
    lines, rows = [], []
    for title, values in groups.items():
        points = mean_by_round(values)
        lines.append(Line(keys.get(title, mean), [(rounds.index(r), v, f"{title}, round {r}: {v:.3f}")
                                                  for r, v in points.items()]))
        rows.append([title, *(decimal(points.get(r)) for r in rounds)])
    return Card(name, "Score on validation data", f"Mean validation score in {counted(len(rounds), 'scored round')}.",
                lines_chart(lines, [str(r) for r in rounds], "round", "mean score on validation data", [0.0, 1.0],
                            [mean, *keys.values()]), table=Table(["", *(f"round {r}" for r in rounds)], rows))


def mean_by_round(values: Sequence[Record]) -> dict[int, float]:
    """Returns the mean score of each round."""
    rounds = sorted({v["round"] for v in values})
    return {r: float(np.mean([v["score"] for v in values if v["round"] == r])) for r in rounds}


def neighbour_cards(run: RunRecord, prefix: str) -> list[Card]:
    """Returns the mixing matrices, and the map of the clients."""
    cards = [mixing_card(run.mixing, run.task_of, f"{prefix}mixing")] if run.mixing else []
    last = next((m for m in reversed(run.mixing) if m.distances is not None and len(m.clients) > 2
                 and np.isfinite(m.distances).all()), None)
    return [*cards, _map_card(run, last, f"{prefix}map")] if last is not None else cards


def positions(distances: np.ndarray) -> np.ndarray:
    """Returns points [S, 2] whose distances approximate `distances` [S, S], by classical multidimensional scaling."""
    squared = np.where(np.isfinite(distances), distances, 0.0) ** 2
    centre = np.eye(len(squared)) - 1 / len(squared)
    values, vectors = np.linalg.eigh(-0.5 * centre @ squared @ centre)
    best = np.argsort(values)[::-1][:2]
    return vectors[:, best] * np.sqrt(np.maximum(values[best], 0))


def _map_card(run: RunRecord, mixing: Mixing, name: str) -> Card:
    assert mixing.distances is not None
    keys = task_keys(run.tasks)
    distances = np.where(np.eye(len(mixing.clients), dtype=bool), np.inf, mixing.distances)
    nearest = [mixing.clients[j] for j in distances.argmin(axis=1)]
    points = [Point(keys[run.task_of[client]], float(x), float(y), client,
                    f"{client} ({run.task_of[client]}); nearest: {near}")
              for client, (x, y), near in zip(mixing.clients, positions(mixing.distances), nearest, strict=True)
              if run.task_of.get(client) in keys]
    rows = [[client, run.task_of.get(client, "–"), near, f"{row.min():.4g}"]
            for client, near, row in zip(mixing.clients, nearest, distances, strict=True)]
    return Card(name, "Map of the clients by what they have learned",
                f"Two-dimensional map of {counted(len(points), 'client')}, by the distances of their uploads.",
                points_chart(points, "", "", equal=True, legend=list(keys.values())),
                about=f"Distances approximate those between the LoRA parameters that the clients uploaded in "
                      f"{mixing.name}. The directions mean nothing.",
                table=Table(["client", "task", "nearest client", "distance to it"], rows))


def inside_cards(run: RunRecord, inside: Inside, prefix: str) -> list[Card]:
    """Returns the scores of the run's models on every task, and their router weights."""
    cards = []
    if inside.abilities is not None:
        cards.append(_ability_card(inside.abilities, f"{prefix}abilities"))
    if inside.routing:
        cards.append(Card(
            f"{prefix}routing", "What the routers choose", f"Router weights of "
            f"{counted(len(inside.routing), 'client')} over {counted(len(run.tasks), 'task')}.",
            heat=Heat("client", run.tasks, [(name, [float(w) for w in row]) for name, row in inside.routing.items()]),
            about="The weight that each client's router gives to each task's expert: mean over the image tokens of "
                  f"the client's own test images. Equal weights would be {1 / len(run.tasks):.2f}."))
    return cards


def _ability_card(abilities: Abilities, name: str) -> Card:
    models = [*abilities.models, "base model"]
    rows = [(model, [None if np.isnan(v) else float(v) for v in row])
            for model, row in zip(models, abilities.scores, strict=True)]
    captions = (" The last column is what the base model was pretrained on: it shows what the models have forgotten."
                if CAPTIONS in abilities.columns else "")
    return Card(
        name, "Every model on every task", f"Scores of {len(models)} models on {', '.join(abilities.columns)}.",
        heat=Heat("model of", abilities.columns, rows),
        about=f"A task's score is the mean over its clients' data, also those of other clients, so a model that knows "
              f"one client's style scores low on the others'. Models answer {counted(abilities.prompts, 'prompt')} of "
              f"each client; the base model answers all.{captions}")


def cost_cards(run: RunRecord, prefix: str) -> list[Card]:
    """Returns what was transferred, and the time of each phase."""
    cards = []
    totals = traffic(run.phases)
    if totals:
        up, down = Key("uploaded", 0, 1), Key("downloaded", 1, 1)
        rows = [Row(f"{name}: {key.name}", [Mark(key, ways[way] / 1e6, f"{name} {key.name}: {size(ways[way])}",
                                                 bar=True)], size(ways[way]))
                for name, ways in totals.items() for way, key in (("up", up), ("down", down)) if ways[way]]
        if rows:
            cards.append(Card(
                f"{prefix}traffic", "What was transferred", f"Bytes of {counted(len(totals), 'part')} of the adapters, "
                "uploaded and downloaded.", rows_chart(rows, Axis("MB, all clients and rounds", [0.0]), [up, down]),
                table=Table(["part of the adapters", "uploaded", "downloaded"],
                            [[name, size(ways["up"]), size(ways["down"])] for name, ways in totals.items()])))
    return [*cards, _time_card(run, f"{prefix}times")] if run.phases else cards


def traffic(phases: Sequence[Record]) -> dict[str, Mapping[str, int]]:
    """Returns the bytes uploaded and downloaded in all phases, by subtree of the adapters."""
    totals: dict[str, dict[str, int]] = {}
    for way in ("up", "down"):
        for phase in phases:
            for name, count in phase.get(f"bytes_{way}_by_subtree", {}).items():
                totals.setdefault(name, {"up": 0, "down": 0})[way] += count
    return dict(totals)


def _time_card(run: RunRecord, name: str) -> Card:
    places = [phase_name(p) for p in run.phases]
    series = [(Key("training, compilation included", 0, 0), "seconds"), (Key("image features", 1, 1),
                                                                         "feature_seconds"),
              (Key("waiting for data", 2, 2), "waited_seconds")]
    lines = [Line(key, [(i, p.get(field) or 0.0, f"round {p['round']} {p['phase']}, {key.name}: "
                         f"{duration(p.get(field) or 0.0)}") for i, p in enumerate(run.phases)])
             for key, field in series if max(p.get(field) or 0.0 for p in run.phases) > 0.05 or field == "seconds"]
    rows = [[f"round {p['round']} {p['phase']}", decimal(p["seconds"], 1), f"{p['client_steps']:,}",
             decimal(p.get("feature_seconds"), 1), decimal(p.get("waited_seconds"), 2)] for p in run.phases]
    return Card(name, "Time of each phase", f"Seconds of {counted(len(places), 'phase')}.",
                lines_chart(lines, places, "phase: round·stage", "seconds", [0.0], [line.key for line in lines]),
                table=Table(["phase", "seconds", "client steps", "seconds of image features",
                             "seconds that devices waited for data"], rows))


