"""Makes the figures about the clients' scores, of one run or of several, and the tables that compare runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pilot_jax.config import Config, differences
from pilot_jax.evaluation.personalised import mean_score
from pilot_jax.report.alone import Alone, gains
from pilot_jax.report.charts import Axis, Line, Mark, Row, lines_chart, rows_chart, strips
from pilot_jax.report.drawing import COLOURS, Key
from pilot_jax.report.record import RunRecord
from pilot_jax.report.rendering import Card, Table, decimal
from pilot_jax.report.run_cards import mean_by_round, task_keys
from pilot_jax.runs.manifest import run_config
from pilot_jax.words import change, counted, duration, size

MOST_ROWS = 40  # most clients with a row each; of more, strips of dots
BASE, ALONE = Key("base model", COLOURS - 1, 6), Key("training alone", 1, 3)


def by_task(clients: Sequence[str], task_of: Mapping[str, str]) -> dict[str, list[str]]:
    """Returns the clients of each task, in order."""
    out: dict[str, list[str]] = {}
    for client in sorted(clients, key=lambda c: (task_of.get(c, ""), clients.index(c))):
        out.setdefault(task_of.get(client, ""), []).append(client)
    return out


def _headed(groups: Mapping[str, list[Row]]) -> list[Row]:
    """Returns rows under a heading for each group."""
    return [row for name, rows in groups.items() for row in (Row(f"{name}"), *rows)]


def score_card(run: RunRecord, alone: Alone | None) -> Card:
    """Returns the figure of what each client of a finished run has gained, over training alone if that is known."""
    s, key = run.summary, Key(run.strategy if alone is None else f"{run.strategy} (this run)", 0, 0)
    own, base = s["score_by_client"], s["score_base_by_client"]
    known = {} if alone is None else alone.scores
    reference, over = (base, "the base model") if alone is None else (known, "training alone")
    gained = gains(own, reference)
    mean = "" if gained is None else f" Mean gain over {over}: {change(gained.mean)}."
    groups = by_task(list(own), run.task_of)
    if len(own) <= MOST_ROWS:
        legend = [BASE, *([ALONE] if known else []), key]
        rows = {task: [_gain_row(c, ((BASE, base), (ALONE, known), (key, own)), reference) for c in clients]
                for task, clients in groups.items()}
        drawn = rows_chart(_headed(rows), Axis("score on the client's own test data", [0.0, 1.0]), legend)
        about = f"The thick line and the number at the right: the gain over {over}, or the loss."
    else:
        keys = task_keys(run.tasks)
        drawn = strips({f"{task}: {counted(len(clients), 'client')}": [
            Mark(keys[task], own[c] - reference[c], f"{c}: {change(own[c] - reference[c], 3)} "
                 f"({reference[c]:.3f} → {own[c]:.3f})") for c in clients if c in reference]
            for task, clients in groups.items()}, Axis(f"gain over {over}", [0.0], 0.0))
        about = f"A dot is a client; right of the line it gained over {over}."
    columns = ["client", "task", "base model", *(["training alone"] if known else []), run.strategy,
               *(["gain over training alone"] if known else []), "gain over the base model"]
    rows_of = [[c, task, decimal(base.get(c)), *([decimal(known.get(c))] if known else []), decimal(own[c]),
                *([_gain(own[c], known.get(c))] if known else []), _gain(own[c], base.get(c))]
               for task, clients in groups.items() for c in clients]
    rows_of += [[c, task, "no test data", *["–"] * (len(columns) - 3)]
                for c, task in run.task_of.items() if c not in own]
    table = Table(columns, rows_of)
    return Card("scores", "What each client gained", f"Scores of {counted(len(own), 'client')} on their own test "
                f"data.{mean}", drawn, about=about, table=table)


def _gain_row(client: str, series: Sequence[tuple[Key, Mapping[str, float]]], reference: Mapping[str, float]) -> Row:
    """Returns a client's scores in a row, with a line from its score in `reference` to that of the last series."""
    found = [(key, values[client]) for key, values in series if client in values]
    marks = [Mark(key, value, f"{client}, {key.name}: {value:.3f}", hollow=key is BASE) for key, value in found]
    if client not in reference:
        return Row(client, marks)
    return Row(client, marks, change(found[-1][1] - reference[client]), len(marks) - 2)


def _gain(value: float, reference: float | None) -> str:
    return "–" if reference is None else change(value - reference, 3)


def run_keys(runs: Sequence[RunRecord]) -> list[Key]:
    """Returns the colour and marker of each run; equal names get a number."""
    names = [run.name for run in runs]
    return [Key(name if names.count(name) == 1 else f"{name} ({number + 1})", number % (COLOURS - 1), number)
            for number, (run, name) in enumerate(zip(runs, names, strict=True))]


def shared_cards(runs: Sequence[RunRecord]) -> list[Card]:
    """Returns the figures that have all of several runs."""
    keys = run_keys(runs)
    pairs = [(key, run) for key, run in zip(keys, runs, strict=True) if run.summary.get("score_by_client")]
    cards = [_scores_of_runs(pairs)] if pairs else []
    losses = [(key, {r: _mean_loss(run, r) for r in sorted({p["round"] for p in run.updates})})
              for key, run in zip(keys, runs, strict=True)]
    cards += _over_rounds("losses", "Training loss of all runs", "mean training loss of all clients", losses, [0.0])
    scores = [(key, mean_by_round(run.validation)) for key, run in zip(keys, runs, strict=True)]
    return cards + _over_rounds("validation", "Validation score of all runs", "mean score on validation data", scores,
                                [0.0, 1.0])


def _mean_loss(run: RunRecord, round_: int) -> float:
    values = [u["loss"] for u in run.updates if u["round"] == round_]
    return sum(values) / len(values)


def _over_rounds(name: str, title: str, up: str, values: Sequence[tuple[Key, Mapping[int, float]]],
                 around: Sequence[float]) -> list[Card]:
    values = [(key, by_round) for key, by_round in values if by_round]
    rounds = sorted({r for _, by_round in values for r in by_round})
    if not rounds:
        return []
    lines = [Line(key, [(rounds.index(r), v, f"{key.name}, round {r}: {v:.3f}") for r, v in by_round.items()])
             for key, by_round in values]
    table = Table(["run", *(f"round {r}" for r in rounds)],
                  [[key.name, *(decimal(by_round.get(r)) for r in rounds)] for key, by_round in values])
    return [Card(name, title, f"{title} in {counted(len(rounds), 'round')}.",
                 lines_chart(lines, [str(r) for r in rounds], "round", up, around, [key for key, _ in values]),
                 about="Losses of different strategies can have different terms." if name == "losses" else "",
                 table=table)]


def _scores_of_runs(pairs: Sequence[tuple[Key, RunRecord]]) -> Card:
    """Returns the scores of all runs, a row for each client, or for each task where there are many clients."""
    task_of = {c: t for _, run in pairs for c, t in run.task_of.items()}
    first = pairs[0][1]
    clients = list(dict.fromkeys(c for _, run in pairs for c in run.summary["score_by_client"]))
    groups, base = by_task(clients, task_of), first.summary["score_base_by_client"]
    series = [(BASE, base), *((key, run.summary["score_by_client"]) for key, run in pairs)]

    def marks(name: str, of: Sequence[str]) -> list[Mark]:
        found = [(key, mean_score([values[c] for c in of if c in values])) for key, values in series]
        return [Mark(key, value, f"{name}, {key.name}: {value:.3f}", hollow=key is BASE)
                for key, value in found if value is not None]

    if len(clients) <= MOST_ROWS:
        rows = _headed({task: [Row(c, marks(c, [c])) for c in of] for task, of in groups.items()})
    else:
        rows = [Row(f"{task}: mean of {counted(len(of), 'client')}", marks(task, of)) for task, of in groups.items()]
    table = Table(["client", "task", *(key.name for key, _ in series)], [
        [c, task, *(decimal(values.get(c)) for _, values in series)] for task, of in groups.items() for c in of])
    means = "; ".join(f"{key.name} {decimal(run.summary['score_mean'])}" for key, run in pairs)
    return Card("scores", "Score of each client in each run",
                f"Scores of {counted(len(clients), 'client')} in {counted(len(pairs), 'run')}. Means: {means}.",
                rows_chart(rows, Axis("score on the client's own test data", [0.0, 1.0]), [k for k, _ in series]),
                table=table)


def overview_table(runs: Sequence[RunRecord]) -> Table:
    """Returns the table with one row for each run."""
    rows = []
    for key, run in zip(run_keys(runs), runs, strict=True):
        s = run.summary
        if not s:
            rows.append([key.name, run.strategy, "not ended yet", *["–"] * 4])
            continue
        score = decimal(s["score_mean"]) if s["score_by_client"] else "no test data"
        rows.append([key.name, run.strategy, score, decimal(s["score_base"]), size(s["bytes_up"]),
                     size(s["bytes_down"]), duration(s["wall_seconds"])])
    return Table(["run", "strategy", "test score", "base model", "uploaded", "downloaded", "time"], rows)


def config_differences(runs: Sequence[RunRecord]) -> Table | None:
    """Returns the keys in which the runs' configs differ, with each run's value; None if all are equal."""
    configs = [run_config(run.folder) for run in runs]
    lines = [line for other in configs[1:] for line in differences(configs[0], other)]
    keys = list(dict.fromkeys(line.split(":", 1)[0] for line in lines))
    if not keys:
        return None
    return Table(["key", *(key.name for key in run_keys(runs))],
                 [[key, *(_value(config, key) for config in configs)] for key in keys])


def _value(config: Config, key: str) -> str:
    """Returns the value of a key as text; a dash if the config has no such key."""
    node = config.model_dump(mode="json")
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return "–"
        node = node[part]
    return str(node)
